"""The published conversation trace of Mooncake has known hit rates; ours must be those."""

from __future__ import annotations

import pytest

from benchmarks.prefix import replay
from pagedtq.sim.traces import read_mooncake

KNOWN = {1_000: 4.45, 5_000: 11.18, 10_000: 21.16, 30_000: 32.57, 50_000: 35.46, 100_000: 36.37}


@pytest.fixture(scope="module")
def trace(mooncake_conversation):
    return read_mooncake(mooncake_conversation)


def test_the_trace_has_the_published_blocks(trace):
    assert len(trace) == 12_031
    assert trace.hash_ids.size == 288_500
    assert len(set(trace.hash_ids.tolist())) == 182_790


@pytest.mark.parametrize("capacity", KNOWN)
def test_the_hit_rate_of_the_least_recently_freed_rule_is_the_known_one(trace, capacity):
    hits, blocks, _ = replay(trace, capacity, 512)
    assert 100 * hits / blocks == pytest.approx(KNOWN[capacity], abs=0.1)


def test_without_a_limit_the_hit_rate_is_the_ideal_one(trace):
    hits, blocks, _ = replay(trace, 190_000, 512)
    assert 100 * hits / blocks == pytest.approx(36.6, abs=0.1)
