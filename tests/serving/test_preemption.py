"""The cost rule of preemption: known answers, and the laws it must obey."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedtq.errors import ArgumentError, ArgumentTypeError
from pagedtq.serving import PreemptionCosts, choose_preemption

#: A PCIe 4.0 x16 link both ways, and a prefill of 20 000 tokens per second.
COSTS = PreemptionCosts(out_rate=25e9, in_rate=25e9, prefill_rate=20_000)
FP16, FOUR_BIT = 131_072, 33_792  # bytes per token of an 8B model, 32 layers of 8 KV heads

rates = st.floats(1e3, 1e12)
counts = st.integers(0, 1 << 20)


def test_moving_a_gigabyte_out_and_back_takes_as_long_as_the_link_says():
    assert COSTS.swap_seconds(1e9) == pytest.approx(0.08)
    assert PreemptionCosts(10e9, 40e9, 1, latency=0.01).swap_seconds(1e9) == pytest.approx(0.145)
    assert PreemptionCosts(10e9, 40e9, 1, overlap=0.5).swap_seconds(1e9) == pytest.approx(0.0625)
    assert COSTS.recompute_seconds(5_000) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("token_bytes", "prefill_rate", "expected"),
    [
        (FP16, 20_000, "swap"),
        (FP16, 120_000, "recompute"),
        (FOUR_BIT, 120_000, "swap"),
        (FOUR_BIT, 400_000, "recompute"),
    ],
)
def test_compressed_pages_are_worth_swapping_where_fp16_pages_are_computed_again(
    token_bytes, prefill_rate, expected
):
    # Break-even is at link / (2 * bytes per token): 95 000 and 370 000 tokens per second.
    costs = PreemptionCosts(25e9, 25e9, prefill_rate)
    for num_tokens in (100, 10_000):
        assert choose_preemption(costs, num_tokens, num_tokens * token_bytes) == expected


def test_a_full_host_means_recompute():
    assert choose_preemption(COSTS, 1000, 1000) == "swap"
    assert choose_preemption(COSTS, 1000, 1000, host_has_room=False) == "recompute"


def test_what_is_found_again_is_not_computed_again():
    num_bytes = 1000 * FP16
    assert choose_preemption(COSTS, 1000, num_bytes) == "swap"
    assert choose_preemption(COSTS, 1000, num_bytes, num_found=960) == "recompute"
    shared = 960 * FP16
    assert (
        choose_preemption(COSTS, 1000, num_bytes, num_found=960, num_bytes_shared=shared) == "swap"
    )


def test_a_sequence_without_tokens_is_not_swapped():
    assert choose_preemption(COSTS, 0, 0) == "recompute"


@given(rates, rates, rates, counts, counts, counts)
def test_more_bytes_never_turn_recompute_into_swap(out_rate, in_rate, prefill, tokens, size, more):
    costs = PreemptionCosts(out_rate, in_rate, prefill)
    if choose_preemption(costs, tokens, size) == "recompute":
        assert choose_preemption(costs, tokens, size + more) == "recompute"
    if choose_preemption(costs, tokens, size) == "swap":
        assert choose_preemption(costs, tokens + more, size) == "swap"


@given(rates, rates, rates, counts, counts)
def test_the_choice_is_never_the_slower_one(out_rate, in_rate, prefill, tokens, size):
    costs = PreemptionCosts(out_rate, in_rate, prefill)
    seconds = {"swap": costs.swap_seconds(size), "recompute": costs.recompute_seconds(tokens)}
    assert seconds[choose_preemption(costs, tokens, size)] == min(seconds.values())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"out_rate": 0}, ArgumentError),
        ({"in_rate": -1.0}, ArgumentError),
        ({"prefill_rate": math.inf}, ArgumentError),
        ({"prefill_rate": math.nan}, ArgumentError),
        ({"latency": -1}, ArgumentError),
        ({"overlap": 1.5}, ArgumentError),
        ({"overlap": True}, ArgumentTypeError),
        ({"out_rate": "fast"}, ArgumentTypeError),
    ],
)
def test_costs_that_make_no_sense_are_refused(changes, error):
    with pytest.raises(error, match=next(iter(changes))):
        PreemptionCosts(**({"out_rate": 1.0, "in_rate": 1.0, "prefill_rate": 1.0} | changes))


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_tokens": -1},
        {"num_bytes": -1},
        {"num_found": 11},
        {"num_found": -1},
        {"num_bytes_shared": 101},
    ],
)
def test_parts_larger_than_the_whole_are_refused(arguments):
    with pytest.raises(ArgumentError):
        choose_preemption(COSTS, **({"num_tokens": 10, "num_bytes": 100} | arguments))
