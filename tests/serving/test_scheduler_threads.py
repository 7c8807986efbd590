"""Threads that meet in one scheduler, or in its tables: typed errors, and the right tokens."""

from __future__ import annotations

import sys
import threading

import pytest

from pagedtq.errors import CapacityError, ConcurrentCallError, StepError, UnknownRequest
from tests.serving.paged_engine import PagedEngine, assert_served, expected
from tests.serving.test_scheduler import assert_drained, request_of, scheduler_of

TYPED = (ConcurrentCallError, StepError, CapacityError)


@pytest.fixture
def eager_switching():
    """Let threads interrupt each other as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("eager_switching")
def test_requests_come_and_go_from_any_thread_and_the_tables_are_used_by_others_too():
    scheduler = scheduler_of(40, sharing=True, host=60, preemption="swap")
    engine, finished, refused, failed = PagedEngine(scheduler), {}, [], []
    adding = threading.Semaphore(0)
    doomed, requests = {}, {}

    def insist(call, *arguments):
        for _ in range(1_000_000):
            try:
                return call(*arguments)
            except TYPED as error:
                refused.append(error)
        raise AssertionError("refused for ever")

    def in_thread(work):
        def run():
            try:
                work()
            except BaseException as error:
                failed.append(error)
            adding.release()

        return threading.Thread(target=run)

    def adds(kind):
        def work():
            for at in range(8):
                request = request_of(f"{kind}{at}", 5 + at, 6, num_samples=1 + at % 2)
                requests[request.request_id] = request
                insist(scheduler.add, request)
                if at % 4 == 3:
                    try:
                        doomed[request.request_id] = insist(scheduler.abort, request.request_id)
                    except UnknownRequest:
                        continue

        return work

    def uses_tables():
        tables = scheduler.tables
        for count in range(20_000):
            if refused and count > 30:
                break
            seq_id = insist(tables.open)
            insist(tables.commit, insist(tables.reserve, [seq_id], 3))
            insist(tables.close, seq_id)

    threads = [in_thread(work) for work in (adds("x"), adds("y"), uses_tables)]
    for thread in threads:
        thread.start()
    done = 0
    while done < len(threads) or scheduler.has_work:
        done += adding.acquire(blocking=False)
        step = insist(scheduler.schedule)
        if step is None:
            continue
        engine.compute(step)
        output = insist(scheduler.update, engine.sample(step))
        finished |= {request.request_id: request for request in output.finished}
    for thread in threads:
        thread.join()
    assert not failed
    assert refused, "the threads never met"
    for name, request in requests.items():
        told = finished.get(name) or doomed[name]
        if name not in doomed:
            assert_served(request, told)
            continue
        for completion in told.completions:
            tokens = expected(request, completion.index)[0]
            assert completion.token_ids.tolist() == tokens[: completion.num_tokens]
    assert len(finished) + sum(told is not None for told in doomed.values()) == len(requests)
    assert_drained(scheduler)


CALLS = {
    "add": lambda s: s.add(request_of("b")),
    "abort": lambda s: s.abort("a"),
    "schedule": lambda s: s.schedule(),
    "update": lambda s: s.update([1]),
    "abort_step": lambda s: s.abort_step(),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_inside_another_is_refused_and_changes_nothing(name):
    """An observer is called in the middle of an update: what it calls meets that call."""
    scheduler, met = scheduler_of(20, sharing=True), []

    class Observer:
        def stored(self, keys, parent, tokens):
            with pytest.raises(ConcurrentCallError, match="another call"):
                CALLS[name](scheduler)
            met.append((scheduler.num_running, scheduler.num_waiting))

        def removed(self, key):
            pass

        def cleared(self):
            pass

    scheduler.tables.prefix.observer = Observer()
    request = request_of("a", 9, 3)
    scheduler.add(request)
    engine = PagedEngine(scheduler)
    while scheduler.has_work:
        output = engine.run_step(scheduler.schedule())
    assert met == [(1, 0)]
    assert_served(request, output.finished[0])
    assert_drained(scheduler)
