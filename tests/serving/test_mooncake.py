"""The published conversation trace of Mooncake has known hit rates; ours must be those."""

from __future__ import annotations

from collections import OrderedDict, defaultdict

import numpy as np
import pytest

from benchmarks.prefix import replay
from pagedtq.sim.traces import read_mooncake
from pagedtq.sim.workload import Workload

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


def hits_of_a_linked_list(trace, num_requests, num_pages, page_size):
    """Count pages found, with nothing but dictionaries: the order of a queue, and pages by key."""
    queue, key_of, pages_of = OrderedDict.fromkeys(range(num_pages)), {}, defaultdict(list)
    hits = 0
    for request, num_tokens in enumerate(trace.prompt_tokens[:num_requests].tolist()):
        keys = trace.block_keys(request, page_size)
        held = []
        # The last token is never found.
        for key in keys[: (num_tokens - 1) // page_size]:
            if not pages_of[key]:
                break
            held.append(pages_of[key][0])
        hits += len(held)
        for page in held:
            del queue[page]
        for _ in range(len(held), -(-num_tokens // page_size)):
            page, _ = queue.popitem(last=False)
            if page in key_of:
                pages_of[key_of.pop(page)].remove(page)
            held.append(page)
        for at in range(len(held)):
            if held[at] not in key_of and at < len(keys):
                key_of[held[at]] = keys[at]
                pages_of[keys[at]].append(held[at])
        queue.update(dict.fromkeys(reversed(held)))
    return hits


@pytest.mark.parametrize("num_pages", [4_000, 40_000])
def test_pages_of_64_tokens_under_the_cap_are_found_as_by_a_linked_list(trace, num_pages):
    hits, _, _ = replay(trace.first(2000), num_pages, 64)
    assert hits == hits_of_a_linked_list(trace, 2000, num_pages, 64) > 0


def test_pages_of_a_prompt_that_comes_again_are_found_but_the_one_of_its_last_token():
    twice = Workload("twice", [0, 1], [512, 512], [1, 1], np.array([7, 7]), np.array([0, 1, 2]))
    assert replay(twice, 20, 64)[0] == 7
    assert replay(twice, 20, 512)[0] == 1
