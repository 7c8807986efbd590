"""Measure the gate's specialisations and write ``budget.json``.

``python -m tests.gate.update [name ...]``: all of them, or those named.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pagedtq.backends.kernel_source import compile_cubin
from tests.gate import sass
from tests.gate.specialisations import (
    ARCHITECTURES,
    ATTEND,
    elements,
    matrix_instructions,
    other_kernels,
    specialisation,
)


def main(chosen: list[str]) -> None:
    target = Path(__file__).parent / "budget.json"
    budget = json.loads(target.read_text(encoding="utf-8")) if chosen else {}
    others = other_kernels()
    for name in chosen or (*ATTEND, *others):
        budget[name] = {}
        for arch in ARCHITECTURES:
            if name in others:
                cubin = compile_cubin(others[name], arch)
                budget[name][str(arch)] = {"registers": cubin.registers}
                print(f"{name:28} sm_{arch:<4} {cubin.registers} spills {cubin.spill_bytes} bytes")
                continue
            kernel = ATTEND[name]
            cubin = compile_cubin(specialisation(kernel), arch)
            loop = sass.hot_loop(sass.disassemble(cubin.image), matrix_instructions(kernel))
            figures = {
                "instructions": round(loop.total / elements(kernel), 3),
                "alu": round(loop.alu / elements(kernel), 3),
                "registers": cubin.registers,
            }
            budget[name][str(arch)] = figures
            print(f"{name:28} sm_{arch:<4} {figures} spills {cubin.spill_bytes} bytes")
    target.write_text(json.dumps(budget, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
