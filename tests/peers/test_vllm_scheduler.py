"""vLLM's own scheduler runs on our block manager; opt-in, see vllm_environment.sh."""

from __future__ import annotations

import pytest

from benchmarks import vllm_scheduler as peer
from pagedtq.errors import UnsupportedError
from pagedtq.integrations.vllm import attach

COUNT, SEED = 60, 3

CASES = {
    "preempting, first come first served": (260, True, "fcfs"),
    "preempting, by priority": (260, True, "priority"),
    "preempting, without prefix caching": (400, False, "fcfs"),
    "room for all": (4000, True, "fcfs"),
}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    num_pages, caching, policy = CASES[request.param]
    return num_pages, caching, peer.run(COUNT, num_pages, caching, policy, SEED)


def test_every_request_is_served_with_the_tokens_that_no_cache_would_change(case):
    _, _, runs = case
    assert len(runs.ours.outputs) == COUNT
    assert runs.ours.outputs == runs.expected == runs.vllm.outputs


def test_nothing_is_held_once_all_are_served(case):
    _, _, runs = case
    manager = runs.manager
    manager.tables.check_integrity()
    assert (manager.tables.pool.num_used, manager.tables.num_sequences) == (0, 0)
    assert manager.usage == 0.0


def test_the_run_shares_prefixes_and_preempts(case):
    num_pages, caching, runs = case
    assert (runs.ours.found > 0) == caching
    assert (runs.ours.preemptions > 0) == (num_pages < 1000)
    # Prefill comes in chunks.
    assert max(count for step in runs.ours.steps for count, _ in step.values()) <= 256


def test_every_block_id_is_vllms_where_freed_pages_wait_their_turn(case):
    _, _, runs = case
    assert runs.ours.steps == runs.vllm_in_turn.steps
    assert runs.ours.preemptions == runs.vllm_in_turn.preemptions


def test_the_schedule_is_vllms_where_no_cached_page_is_evicted(case):
    num_pages, caching, runs = case
    if caching and num_pages < 1000:
        pytest.skip("which cached pages survive depends on the order in which pages are reused")
    assert peer.equal_steps(runs.ours, runs.vllm, ids=False) == len(runs.vllm.steps)
    assert len(runs.ours.steps) == len(runs.vllm.steps)


def test_a_scheduler_that_runs_already_is_not_attached():
    scheduler = peer.scheduler_of(100, True, "fcfs")
    scheduler.requests["0"] = object()
    with pytest.raises(UnsupportedError, match="requests"):
        attach(scheduler)
