"""Threads that meet in one block manager: one goes on, the other is refused, no page is lost."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from pagedtq.errors import ArgumentError, ConcurrentCallError, StepError
from tests.serving.served import admit, manager_of, request_of


@pytest.fixture
def eager_switching():
    """Let threads interrupt each other as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Worker(threading.Thread):
    """Serves requests of its own, and frees some that are everybody's; repeats what was refused."""

    def __init__(self, manager, seed, common, together):
        super().__init__()
        self.manager, self.seed, self.common, self.together = manager, seed, common, together
        self.refused, self.failure = 0, None

    def insist(self, call, *arguments):
        while True:
            try:
                return call(*arguments)
            except ConcurrentCallError:
                self.refused += 1

    def run(self):
        try:
            rng = np.random.default_rng(self.seed)
            self.together.wait()
            for number, common in enumerate(self.common):
                self.serve(request_of(f"{self.seed}-{number}", [int(rng.integers(3))] * 40))
                # Freed by everybody, at once if it comes to it.
                self.insist(self.manager.free, common)
        except BaseException as error:
            self.failure = error

    def serve(self, request):
        manager = self.manager
        while True:
            found, count = self.insist(manager.get_computed_blocks, request)
            try:
                rest = request.num_tokens - count
                new = self.insist(manager.allocate_slots, request, rest, count, found)
            except ArgumentError:
                # What was found has been reused since: look again.
                continue
            if new is not None:
                break
        request.num_computed_tokens = request.num_tokens
        for token in range(20):
            request.append([token])
            if self.insist(manager.allocate_slots, request, 1) is None:
                break
            request.num_computed_tokens += 1
        self.insist(manager.take_events)
        self.insist(manager.free, request)


@pytest.mark.usefixtures("eager_switching")
def test_threads_that_repeat_what_was_refused_lose_no_page():
    manager = manager_of(60, enable_events=True, log_stats=True)
    common = [request_of(f"common-{at}", [at] * 5) for at in range(40)]
    for request in common:
        admit(manager, request)
    together = threading.Barrier(4)
    workers = [Worker(manager, seed, common, together) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.failure for worker in workers] == [None] * 4
    assert sum(worker.refused for worker in workers) > 0, "the threads never met"
    manager.tables.check_integrity()
    assert manager.tables.num_sequences == manager.tables.pool.num_used == 0
    assert manager.usage == 0
    assert manager.make_prefix_cache_stats().requests >= 160


CALLS = {
    "get_computed_blocks": lambda m, r: m.get_computed_blocks(r),
    "allocate_slots": lambda m, r: m.allocate_slots(r, 1),
    "cache_blocks": lambda m, r: m.cache_blocks(r, 16),
    "free": lambda m, r: m.free(r),
    "evict_blocks": lambda m, r: m.evict_blocks([1]),
    "reset_prefix_cache": lambda m, r: m.reset_prefix_cache(),
    "take_events": lambda m, r: m.take_events(),
    "make_prefix_cache_stats": lambda m, r: m.make_prefix_cache_stats(),
    "the tables' own": lambda m, r: m.tables.open(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_inside_another_is_refused_and_changes_nothing(name):
    """An observer is called in the middle of `allocate_slots`: what it calls meets that call."""
    manager, met = manager_of(log_stats=True), []
    request, held = request_of("a", range(40)), request_of("b", [7] * 20)
    admit(manager, held)

    class Observer:
        def stored(self, keys, parent, tokens):
            with pytest.raises(ConcurrentCallError, match="another call"):
                CALLS[name](manager, held)
            met.append(manager.get_block_ids("b"))

        def removed(self, key):
            pass

        def cleared(self):
            pass

    manager.tables.prefix.observer = Observer()
    admit(manager, request)
    assert met == [([1, 2],)]
    assert manager.get_block_ids("b") == ([1, 2],)
    assert manager.get_block_ids("a") == ([3, 4, 5],)
    manager.tables.check_integrity()


def test_while_a_step_is_open_a_request_is_refused_and_keeps_what_it_has():
    manager = manager_of()
    held, other = request_of("a", [3] * 40), request_of("b", [3] * 40)
    admit(manager, held)
    found, count = manager.get_computed_blocks(other)
    plan = manager.tables.reserve([manager.sequence_of("a")], 1)
    for call in (
        lambda: manager.free(held),
        lambda: manager.allocate_slots(held, 9),
        lambda: manager.allocate_slots(other, 8, count, found),
    ):
        with pytest.raises(StepError, match="a step is open"):
            call()
    assert manager.get_block_ids("a") == ([1, 2, 3],)
    assert manager.sequence_of("b") is None
    manager.tables.abort(plan)
    assert admit(manager, other) == ([1, 2], [4])
    manager.free(held)
    manager.free(other)
    assert manager.tables.num_sequences == 0


def test_a_request_that_finds_no_memory_leaves_nothing_behind(monkeypatch):
    manager = manager_of()
    admit(manager, request_of("a", [3] * 40))
    request = request_of("b", [3] * 40)
    found, count = manager.get_computed_blocks(request)

    def fail(count):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(manager.tables.pool, "acquire", fail)
        with pytest.raises(MemoryError):
            manager.allocate_slots(request, 8, count, found)
    assert manager.sequence_of("b") is None
    assert manager.tables.num_sequences == 1
    manager.tables.check_integrity()
    assert admit(manager, request) == ([1, 2], [4])
