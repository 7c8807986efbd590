"""The kernels' machine code: no spills, registers that fit, loops within their budget.

``budget.json`` holds, per specialisation and architecture, registers, and for `attend` instructions
and integer-pipe instructions per key or value element of the hot loop. The compiler is pinned, so
the figures are exact: more is a regression, less an improvement that the budget must follow, which
is what ``python -m tests.gate.update`` does.

``pytest tests/gate -m fullgate`` compiles what the list leaves out, for sm_90.
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
    PAGE_DIMS,
    TUNED_DIMS,
    UNTUNED_DIMS,
    before_sm80,
    elements,
    matrix_instructions,
    other_kernels,
    remaining_attend,
    remaining_pages,
    remaining_scores,
    specialisation,
    untuned_attend,
)

BUDGET = json.loads((Path(__file__).parent / "budget.json").read_text(encoding="utf-8"))

OTHERS = other_kernels()

#: Registers of a multiprocessor over threads of a block; three blocks leave 168 per thread.
THREE_BLOCKS = 168


#: Budgets are rounded to three decimals.
ROUNDING = 0.0006


def assert_as_budgeted(name: str, arch: int, **measured: float) -> None:
    """Refuse more than a budget allows, and a budget that allows more than is needed."""
    allowed = BUDGET[name][str(arch)]
    assert allowed.keys() == measured.keys()
    for what, value in measured.items():
        assert value <= allowed[what] + ROUNDING, f"{what} of {name} for sm_{arch}: a regression"
        assert value >= allowed[what] - ROUNDING, (
            f"{what} of {name} for sm_{arch}: an improvement that the budget does not know, and "
            "that could be lost unseen; run python -m tests.gate.update"
        )


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
    assert_as_budgeted(
        name,
        arch,
        registers=cubin.registers,
        instructions=loop.total / elements(kernel),
        alu=loop.alu / elements(kernel),
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_kernels_keep_everything_in_registers(name, arch, tools):
    cubin = compile_cubin(OTHERS[name], arch)
    assert (cubin.spill_bytes, cubin.stack_bytes) == (0, 0)
    assert_as_budgeted(name, arch, registers=cubin.registers)
    lines = sass.disassemble(cubin.image)
    assert not {"LDL", "STL"} & {opcode for opcode, _ in lines}
    if name.startswith("score-"):
        kernel = ATTEND[name.removeprefix("score-")]
        products = kernel.head_dim // 16 * (2 if kernel.prod else 1)
        assert "CALL" not in sass.hot_loop(lines, products).counts


def _complaint(special, kernel=None) -> str | None:
    """What of a specialisation for sm_90 does not stay in registers, or leaves the hot loop."""
    cubin = compile_cubin(special, 90)
    found = [cubin.spill_bytes, cubin.stack_bytes]
    lines = sass.disassemble(cubin.image)
    opcodes = {"LDL", "STL"} & {opcode for opcode, _ in lines}
    if kernel is not None:
        loop = sass.hot_loop(lines, matrix_instructions(kernel), beside="MUFU")
        opcodes |= {"CALL", "RET"} & set(loop.counts)
    if found == [0, 0] and not opcodes:
        return None
    return f"{special}: spills {found[0]}, stack {found[1]}, {sorted(opcodes)}"


def _assert_none(complaints) -> None:
    bad = list(filter(None, complaints))
    assert not bad, "\n".join(bad)


# One test per head dim, so that the whole gate can be run in pieces: ``-m fullgate -k d96``.
@pytest.mark.fullgate
@pytest.mark.parametrize("head_dim", TUNED_DIMS, ids="d{}".format)
def test_every_other_tuned_specialisation_keeps_everything_in_registers(head_dim, tools):
    _assert_none(_complaint(specialisation(k), k) for k in remaining_attend(head_dim))


@pytest.mark.fullgate
@pytest.mark.parametrize("head_dim", UNTUNED_DIMS, ids="d{}".format)
def test_untuned_specialisations_keep_everything_in_registers(head_dim, tools):
    _assert_none(_complaint(specialisation(k), k) for k in untuned_attend(head_dim))


@pytest.mark.fullgate
@pytest.mark.parametrize("head_dim", TUNED_DIMS, ids="d{}".format)
def test_every_other_score_kernel_keeps_everything_in_registers(head_dim, tools):
    _assert_none(map(_complaint, remaining_scores(head_dim)))


@pytest.mark.fullgate
@pytest.mark.parametrize("head_dim", PAGE_DIMS, ids="d{}".format)
def test_every_other_page_kernel_keeps_everything_in_registers(head_dim, tools):
    _assert_none(map(_complaint, remaining_pages(head_dim)))


@pytest.mark.fullgate
def test_attention_compiles_for_devices_before_sm_80(tools):
    for kernel in before_sm80():
        cubin = compile_cubin(specialisation(kernel), 75)
        assert (cubin.spill_bytes, cubin.stack_bytes) == (0, 0), kernel
        opcodes = {opcode for opcode, _ in sass.disassemble(cubin.image)}
        assert ("HMMA" in opcodes) is not kernel.cuda_cores
    for name, special in OTHERS.items():
        if name not in ("score-k3v3-d128",):
            assert compile_cubin(special, 75).spill_bytes == 0, name


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
    assert sass.hot_loop(lines, 1, beside="MOV")[:2] == (6, 2)


def test_the_budget_of_four_bits_leaves_room_for_three_blocks_and_full_bandwidth():
    figures = BUDGET["k4v4-d128"]["90"]
    assert figures["instructions"] <= 2.50
    assert figures["alu"] <= 1.80
    assert figures["registers"] <= THREE_BLOCKS


@pytest.mark.parametrize(
    ("name", "instructions", "alu"), [("k3v3", 2.10, 1.32), ("k2v2", 2.15, 1.10)]
)
def test_keys_as_bytes_cost_less_than_keys_as_halves(name, instructions, alu):
    bytes_, halves = BUDGET[f"{name}-d128"], BUDGET[f"{name}-d128-f16"]
    for arch in map(str, ARCHITECTURES):
        assert bytes_[arch]["alu"] < 0.85 * halves[arch]["alu"]
        assert bytes_[arch]["instructions"] < 0.95 * halves[arch]["instructions"]
    assert bytes_["90"]["instructions"] <= instructions and bytes_["90"]["alu"] <= alu
    assert bytes_["90"]["registers"] <= THREE_BLOCKS


def test_values_as_bytes_take_work_from_the_integer_pipe():
    for name in ("k3v3-d128", "k2v2-d128"):
        bytes_, halves = BUDGET[f"{name}-v8"], BUDGET[name]
        for arch in map(str, ARCHITECTURES):
            assert bytes_[arch]["alu"] < 0.95 * halves[arch]["alu"]
            assert bytes_[arch]["instructions"] < 1.06 * halves[arch]["instructions"]
    # The default for 2 bits on newer devices costs less of everything.
    default, halves = BUDGET["k2v2-d128-v8"]["90"], BUDGET["k2v2-d128"]["90"]
    assert default["instructions"] < 0.96 * halves["instructions"]
    assert default["alu"] <= 1.01 and default["registers"] <= THREE_BLOCKS


def test_the_list_is_named_and_at_most_sixty():
    assert len(ATTEND) + len(OTHERS) <= 60
    assert set(BUDGET) == {*ATTEND, *OTHERS}
