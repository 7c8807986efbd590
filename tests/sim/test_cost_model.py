"""The cost of a step is what its documentation says, counted by hand."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.config import Exact, LayerOverride
from pagedtq.errors import ConfigError
from pagedtq.models import MODELS
from pagedtq.sim.cost_model import CostModel, Hardware
from pagedtq.sizing import Format

LLAMA = MODELS["llama-3.1-8b"]
#: A machine of round numbers: 1 GB/s, free arithmetic.
BYTES_ONLY = Hardware(bandwidth=1e9, efficiency=1.0, flops=1e30, step_overhead=0.0)
FLOPS_ONLY = Hardware(bandwidth=1e30, efficiency=1.0, flops=1e12, step_overhead=0.0)


def seconds(cost, new, read, exact, pairs):
    return float(cost.step_seconds(*(np.int64(x) for x in (new, read, exact, pairs))))


def model(name, hardware, **fields):
    storage = Format.parse(name)
    return CostModel(LLAMA, storage.config(LLAMA, **fields), hardware, storage.byte_share)


@pytest.mark.parametrize(("name", "token"), [("fp16", 131072), ("fp8", 65536), ("k4v4-w0", 33792)])
def test_bytes_are_weights_and_cached_tokens_read_and_written(name, token):
    cost = model(name, BYTES_ONLY)
    moved = LLAMA.weight_bytes + 1000 * token + 3 * token
    assert seconds(cost, 3, 1000, 0, 10**9) == pytest.approx(moved / 1e9, rel=1e-12)
    assert cost.exact_tokens == 0


def test_tokens_in_the_window_are_read_exact_and_written_twice():
    cost = model("k4v4", BYTES_ONLY)
    codes, exact = 33792, 131072
    assert cost.exact_tokens == 64 + 4
    moved = LLAMA.weight_bytes + (1000 - 68) * codes + 68 * exact + 1 * (codes + exact)
    assert seconds(cost, 1, 1000, 68, 0) == pytest.approx(moved / 1e9, rel=1e-12)
    assert cost.exact_part(np.array([1, 68, 5000])).tolist() == [1, 68, 68]


def test_exact_layers_read_every_token_from_pages():
    override = LayerOverride(layers=(0, -1), keys=Exact(), values=Exact())
    cost = model("k4v4", BYTES_ONLY, overrides=(override,))
    codes, exact = 33792 * 30 / 32, 131072 * 30 / 32
    boundary = 131072 * 2 / 32
    moved = LLAMA.weight_bytes + 100 * boundary + 32 * codes + 68 * exact
    assert seconds(cost, 0, 100, 68, 0) == pytest.approx(moved / 1e9, rel=1e-12)


def test_flops_are_two_per_weight_and_four_per_pair_head_and_channel():
    cost = model("fp16", FLOPS_ONLY)
    work = 7 * 2 * LLAMA.weight_bytes / 2 + 500 * 4 * 32 * 32 * 128
    assert seconds(cost, 7, 0, 0, 500) == pytest.approx(work / 1e12, rel=1e-12)
    assert cost.linear_seconds(7) == pytest.approx(7 * LLAMA.weight_bytes / 1e12)


def test_the_slower_of_the_two_counts_and_the_overhead_is_added():
    both = Hardware(bandwidth=1e9, efficiency=0.5, flops=1e12, step_overhead=0.25)
    cost = model("fp16", both)
    moved = (LLAMA.weight_bytes + 131072 * 1) / 0.5e9
    assert seconds(cost, 1, 0, 0, 0) == pytest.approx(moved + 0.25)
    work = 10**6 * LLAMA.weight_bytes / 1e12
    assert seconds(cost, 10**6, 0, 0, 0) == pytest.approx(
        max(work, (LLAMA.weight_bytes + 131072e6) / 0.5e9) + 0.25
    )


def test_a_step_costs_the_same_alone_and_among_many():
    cost = model("k3v4", Hardware())
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 10**6, (4, 200))
    together = cost.step_seconds(*steps)
    alone = [seconds(cost, *step) for step in steps.T]
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(
    "fields",
    [
        {"bandwidth": 0.0},
        {"bandwidth": float("nan")},
        {"flops": float("inf")},
        {"efficiency": 0.0},
        {"efficiency": 1.5},
        {"step_overhead": -1e-9},
    ],
)
def test_a_machine_that_cannot_be_is_refused(fields):
    with pytest.raises(ConfigError):
        Hardware(**fields)
