"""The attention kernels' machine code: no spills, registers that fit, loops within their budget.

``budget.json`` holds, per specialisation and architecture, instructions and integer-pipe
instructions per key or value element of the hot loop. More than it allows is a regression; after an
improvement, ``python -m tests.gate.update`` writes the new figures.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pagedtq.backends.kernel_source import compile_cubin, specialise
from pagedtq.errors import KernelCompileError
from tests.gate import sass
from tests.gate.specialisations import (
    ARCHITECTURES,
    ATTEND,
    elements,
    matrix_instructions,
    specialisation,
    step_kernels,
)

BUDGET = json.loads((Path(__file__).parent / "budget.json").read_text(encoding="utf-8"))

#: Registers of a multiprocessor over threads of a block; three blocks leave 168 per thread.
THREE_BLOCKS = 168


@pytest.fixture(scope="module")
def tools():
    sass.require_tools()


@pytest.fixture(params=[(name, arch) for name in ATTEND for arch in ARCHITECTURES], ids=str)
def compiled(request, tools):
    name, arch = request.param
    return name, arch, compile_cubin(specialisation(ATTEND[name]), arch)


def test_the_loop_stays_within_its_budget_and_nothing_spills(compiled):
    name, arch, cubin = compiled
    assert (cubin.spill_bytes, cubin.stack_bytes) == (0, 0)
    kernel = ATTEND[name]
    loop = sass.hot_loop(sass.disassemble(cubin.image), matrix_instructions(kernel))
    forbidden = {"CALL", "LDL", "STL", "RET"} & set(loop.counts)
    assert not forbidden, f"{forbidden} in the hot loop"
    allowed = BUDGET[name][str(arch)]
    assert cubin.registers <= allowed["registers"]
    assert loop.total / elements(kernel) <= allowed["instructions"] + 0.01
    assert loop.alu / elements(kernel) <= allowed["alu"] + 0.01


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_other_kernels_of_a_step_compile_without_spilling(arch, tools):
    for file, special in step_kernels().items():
        cubin = compile_cubin(special, arch)
        assert (cubin.spill_bytes, cubin.stack_bytes) == (0, 0), file


def test_a_failed_compile_names_the_specialisation_and_shows_the_log(tools):
    with pytest.raises(KernelCompileError, match=r"attend\.cu \[HEAD_DIM=128\].*sm_90") as failure:
        compile_cubin(specialise("attend.cu", {"HEAD_DIM": 128}), 90)
    assert "KEY_FORMAT" in str(failure.value)


def test_a_loop_is_the_shortest_with_enough_matrix_instructions():
    def line(opcode, text=""):
        return (opcode, f"{opcode} {text}")

    lines = [
        ("", "L_x_0"), line("HMMA"), line("MOV"),
        ("", "L_x_1"), line("HMMA"), line("PRMT"), line("BRA", "`(.L_x_1)"),
        line("BRA", "`(.L_x_0)"), line("EXIT"), line("BRA", "`(.L_x_2)"), ("", "L_x_2"),
    ]  # fmt: skip
    assert sass.hot_loop(lines, 1)[:2] == (3, 1)
    assert sass.hot_loop(lines, 2)[:2] == (6, 2)
    with pytest.raises(AssertionError, match="no loop"):
        sass.hot_loop(lines, 3)


def test_the_figures_the_design_promises_are_in_the_budget():
    figures = BUDGET["k4v4-d128"]["90"]
    assert figures["instructions"] <= 2.50
    assert figures["alu"] <= 1.80
    assert figures["registers"] <= THREE_BLOCKS


def test_the_list_is_named_and_at_most_sixty():
    assert len(ATTEND) <= 60
    assert set(BUDGET) == set(ATTEND)
