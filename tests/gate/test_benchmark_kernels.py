"""The machine code of what the GPU benchmark compares with: an opponent that is not held back."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.gpu.plain_decode import KERNELS, kernel_macros
from pagedtq.backends.kernel_source import compile_cubin, specialise
from tests.gate import sass

ARCH = 90
#: What a multiprocessor of an H200 can issue per element at full bandwidth, bf16 and e4m3.
BUDGET = {0: 15.6, 1: 7.8}


@pytest.fixture(autouse=True)
def tools():
    sass.require_tools()


@pytest.mark.parametrize("fp8", [0, 1])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_plain_decode_needs_less_than_half_of_the_issue_slots_that_bandwidth_leaves(head_dim, fp8):
    source = specialise(str(KERNELS / "plain_decode.cu"), kernel_macros(head_dim, bool(fp8)))
    cubin = compile_cubin(source, ARCH)
    assert (cubin.spill_bytes, cubin.stack_bytes) == (0, 0)
    assert cubin.registers <= 168  # three blocks of 128 threads
    tokens = 32 if fp8 else 16
    loop = sass.hot_loop(sass.disassemble(cubin.image), tokens // 16 * head_dim // 8)
    per_element = loop.total / (tokens * head_dim * 2 / 32)
    print(f"d={head_dim} fp8={fp8}: {cubin.registers} registers, {per_element:.2f} per element")
    assert not {"CALL", "LDL", "STL"} & set(loop.counts)
    assert per_element <= 0.45 * BUDGET[fp8]


def test_the_rate_kernels_hold_exactly_the_instructions_they_count():
    cubin = compile_cubin(specialise(str(KERNELS / "rates.cu"), {}), ARCH)
    assert (cubin.spill_bytes, cubin.stack_bytes) == (0, 0)
    counts = Counter(opcode for opcode, _ in sass.disassemble(cubin.image))
    # 16 steps of 8 chains; nothing was folded or moved out of the loop.
    assert counts["HMMA"] == counts["IMMA"] == counts["PRMT"] == 128
    assert 128 <= counts["LOP3"] <= 160
