"""A fault at every allocation, and others at work at every call into the tables, one after another.

The call of the scheduler that fails is repeated; every request must still get its tokens, and every
page must come back.
"""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import ConcurrentCallError, StepError
from pagedtq.paging import sequence_rows
from pagedtq.paging.page_pool import CountedPool
from pagedtq.serving import running_batch
from tests.serving.paged_engine import CopyingEngine, PagedEngine, assert_served
from tests.serving.test_scheduler import SIZE, assert_drained, request_of, scheduler_of


class Faults:
    """Counts what may fail, and lets the one with a given number do so."""

    def __init__(self) -> None:
        self.count, self.fails_at = 0, 0

    def tick(self, error):
        self.count += 1
        if self.count == self.fails_at:
            raise error


class Allocating:
    """NumPy, whose arrays may find no memory."""

    def __init__(self, faults) -> None:
        self._faults = faults

    def __getattr__(self, name):
        return getattr(np, name)

    def zeros(self, *shape):
        self._faults.tick(MemoryError())
        return np.zeros(*shape)

    def pad(self, *arguments):
        self._faults.tick(MemoryError())
        return np.pad(*arguments)


class SharedTurn(list):
    """The turn of tables, which somebody else may have just when it is wanted."""

    def __init__(self, faults) -> None:
        super().__init__([None])
        self._faults = faults

    def pop(self):
        self._faults.tick(IndexError())
        return super().pop()


def run(faults, overlapped, fails_at):
    """Serve some requests, repeating the call that fails; return what it raised."""
    scheduler = scheduler_of(7, sharing=True, window=SIZE, slots=4, host=30, preemption="swap")
    scheduler.tables._turn = SharedTurn(faults)
    # Rows and batches that must grow.
    scheduler.tables.open_many(len(scheduler.tables._free_rows) - 2)
    others = scheduler.tables.sequence_ids()
    scheduler._batch._last = scheduler._batch._last[:1]
    scheduler._batch._fields = scheduler._batch._fields[:, :1]
    engine = CopyingEngine(scheduler) if overlapped else PagedEngine(scheduler)
    requests = [request_of("a", 7, 6), request_of("b", 9, 5, num_samples=3)]
    failures = []

    def insist(call, *arguments):
        try:
            return call(*arguments)
        except (MemoryError, ConcurrentCallError) as error:
            failures.append(error)
            scheduler.tables.check_integrity()
            return call(*arguments)

    faults.count, faults.fails_at = 0, fails_at
    for request in requests:
        insist(scheduler.add, request)
    finished, rounds = {}, 0
    while scheduler.has_work:
        rounds += 1
        assert rounds < 200
        step = insist(scheduler.schedule)
        if step is not None:
            engine.compute(step)
            output = insist(scheduler.update, engine.sample(step))
            finished |= {done.request_id: done for done in output.finished}
        if overlapped and engine.under_way and (step is None or rounds % 2):
            engine.end()
    assert scheduler.stats.swapped
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert len(failures) <= 1
    count, faults.fails_at = faults.count, 0
    scheduler.tables.close(others)
    assert_drained(scheduler)
    faults.count = count
    return failures


@pytest.mark.parametrize("overlapped", [False, True])
def test_whatever_fails_can_be_repeated_and_nothing_is_lost(overlapped, monkeypatch):
    faults = Faults()
    acquire = CountedPool.acquire

    def failing_acquire(pool, count):
        faults.tick(MemoryError())
        return acquire(pool, count)

    monkeypatch.setattr(CountedPool, "acquire", failing_acquire)
    monkeypatch.setattr(sequence_rows, "np", Allocating(faults))
    monkeypatch.setattr(running_batch, "np", Allocating(faults))
    seen, number = set(), 0
    while True:
        number += 1
        failures = run(faults, overlapped, number)
        if faults.count < number:
            break
        # Sequences that could not be closed when a step ended are closed later.
        seen.add(type(failures[0]) if failures else None)
    assert seen == {MemoryError, ConcurrentCallError, None}
    assert number > 40, "hardly anything could fail: the test proves nothing"


def test_a_step_that_is_stored_can_only_be_updated(monkeypatch):
    scheduler = scheduler_of(9)
    scheduler.add(request_of("a", 5, 3, num_samples=2))
    engine = PagedEngine(scheduler)
    step = scheduler.schedule()
    engine.compute(step)
    tokens = engine.sample(step)

    def fail(seq_id):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(scheduler.tables, "fork", fail)
        with pytest.raises(MemoryError):
            scheduler.update(tokens)
    with pytest.raises(StepError, match="its tokens are stored; call update again"):
        scheduler.abort_step()
    with pytest.raises(StepError, match="a step is open"):
        scheduler.schedule()
    assert scheduler.update(tokens).started == ["a"]
    assert scheduler.num_running == 2
