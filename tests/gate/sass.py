"""Reading the disassembly of a compiled kernel: its hot loop, and what the loop costs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

#: Instructions of the integer and logic pipe, half the issue rate of the others on sm_80 to sm_90:
#: what bounds decoding.
ALU = frozenset(
    (
        *("LOP3", "PRMT", "SHF", "ISETP", "FSETP", "FMNMX", "FMNMX3", "SEL", "FSEL", "IADD3"),
        *("IADD", "LEA", "VOTE", "PLOP3", "MOV", "VIADD", "VIADDMNMX", "VIMNMX", "VIMNMX3"),
        *("HSETP2", "HMNMX2", "IABS", "IMNMX", "BREV", "FLO", "POPC", "SGXT", "BMSK", "R2P", "P2R"),
    )
)
_LABEL = re.compile(r"^\.(L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);")
_PREDICATE = re.compile(r"^@!?U?P[0-9T]+\s+")


class Loop(NamedTuple):
    """A loop's instructions.

    Attributes
    ----------
    total, alu : int
        Instructions, and those of the integer pipe.
    counts : Counter
        By opcode, modifiers left out.
    """

    total: int
    alu: int
    counts: Counter[str]


def missing_tools() -> str | None:
    """Say what of the gate's wheels is not installed, None if all are."""
    for module in ("cupy", "nvidia"):
        if importlib.util.find_spec(module) is None:
            return f"the wheels of the extra `gate` are not installed (no module {module})"
    if not _disassembler().exists():
        return "the wheel nvidia-cuda-nvdisasm is not installed"
    return None


def require_tools() -> None:
    """Skip the test, or fail it where CI forbids that, without the gate's wheels."""
    missing = missing_tools()
    if missing is None:
        return
    reason = f"{missing}: the kernels' machine code was NOT checked"
    if os.environ.get("PAGEDTQ_REQUIRE_GATE") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


def _disassembler() -> Path:
    spec = importlib.util.find_spec("nvidia")
    assert spec is not None and spec.submodule_search_locations is not None
    for place in spec.submodule_search_locations:
        for found in Path(place).glob("cu*/bin/nvdisasm"):
            return found
    return Path("nvdisasm-is-not-installed")


def disassemble(image: bytes) -> list[tuple[str, str]]:
    """Return a cubin's instructions as (opcode without modifiers, text), labels as ("", name)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        command = [str(_disassembler()), "-c", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            lines.append(("", label[1]))
        elif instruction := _INSTRUCTION.match(line):
            bare = _PREDICATE.sub("", instruction[1].strip())
            # Before sm_90 a jump out of a loop to a local label may be spelled as a call.
            bare = re.sub(r"^CALL\.REL\.NOINC (?=`\(\.L_x_)", "BRA ", bare)
            lines.append((re.split(r"[.\s]", bare, maxsplit=1)[0], bare))
    return lines


def hot_loop(
    lines: list[tuple[str, str]], matrix_instructions: int, beside: str | None = None
) -> Loop:
    """Find the shortest loop with at least so many matrix instructions, and count it.

    With ``beside``, one that has that opcode as well: "MUFU", the exponential, tells the loop over
    tiles from those inside it that walk along a row. A loop is everything between a label and a
    branch back to it, so the rarely taken block that rescales the sums counts as if it always ran.
    """
    labels = {name: at for at, (opcode, name) in enumerate(lines) if not opcode}
    best: list[tuple[str, str]] | None = None
    for at, (opcode, text) in enumerate(lines):
        target = re.search(r"\.(L_x_\d+)", text) if opcode == "BRA" else None
        if target is None or labels.get(target[1], at) >= at:
            continue
        body = [line for line in lines[labels[target[1]] : at + 1] if line[0]]
        matrix = sum(opcode in ("HMMA", "IMMA") for opcode, _ in body)
        if beside is not None and beside not in {opcode for opcode, _ in body}:
            continue
        if matrix >= matrix_instructions and (best is None or len(body) < len(best)):
            best = body
    assert best is not None, f"no loop with {matrix_instructions} matrix instructions"
    counts = Counter(opcode for opcode, _ in best)
    return Loop(len(best), sum(n for opcode, n in counts.items() if opcode in ALU), counts)
