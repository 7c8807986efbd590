"""Threads that meet inside the tables: a typed error, and never a corrupted pool."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from pagedtq.errors import (
    ArgumentError,
    CapacityError,
    ConcurrentCallError,
    StepError,
    UnknownSequence,
)
from pagedtq.paging import EvictionPlan, PageTables, Retention, SharingOptions, eviction
from pagedtq.paging.sequence_rows import NO_BATCH
from tests.table_snapshot import snapshot

TYPED = (ConcurrentCallError, StepError, CapacityError)


@pytest.fixture
def eager_switching():
    """Let threads interrupt each other as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def worker(
    tables: PageTables, seed: int, wanted: int, together: threading.Barrier, outcome: dict
) -> None:
    """Open, append, fork, truncate and close own sequences until so many calls were done."""
    rng = np.random.default_rng(seed)
    mine: list[int] = []
    done = refused = 0
    together.wait()
    try:
        while done < wanted:
            assert refused < 1_000_000, f"only {done} calls were done"
            try:
                kind = rng.integers(9)
                if kind == 0 or not mine:
                    mine.append(tables.open(rng.integers(0, 3, 20)))
                elif kind < 4:
                    plan = tables.reserve(mine[:6], 1)
                    while True:
                        try:
                            tables.commit(plan)
                            break
                        except ConcurrentCallError:
                            refused += 1
                elif kind == 4:
                    mine.append(tables.fork(mine[0]))
                elif kind == 5:
                    tables.truncate(mine[-1], 0)
                elif kind == 6:
                    tables.fences.close(tables.fences.open())
                elif kind == 7:
                    tables.retention.keep(mine[0], int(rng.integers(101)), seconds=0.0)
                else:
                    tables.close([mine[-1]])
                    mine.pop()
                done += 1
            except TYPED:
                refused += 1
    except BaseException as error:
        outcome[seed] = error
        raise
    outcome[seed] = (done, refused, mine)


def pinner(tables: PageTables, done: threading.Event, outcome: dict) -> None:
    """Pin what can be found and take the pins away again, until the others are done."""
    pinned = refused = 0
    try:
        while not done.is_set() or (not pinned and tables.prefix.num_pages_held):
            try:
                found = np.flatnonzero(tables.prefix.held)[-9:]
                pinned += tables.retention.pin_pages(found).size
                tables.retention.unpin(found)
            except TYPED:
                refused += 1
            except ArgumentError as error:
                # Somebody took the page since it was found.
                assert "holds no block" in str(error)
    except BaseException as error:
        outcome["pinner"] = error
        raise
    outcome["pinner"] = (pinned, refused, [])


@pytest.mark.usefixtures("eager_switching")
def test_threads_get_typed_errors_and_the_books_stay_right():
    tables = PageTables(4, 300, 4, 2, 40, SharingOptions(), num_host_pages=50)
    retention = Retention(tables)
    outcome: dict = {}
    together, done = threading.Barrier(3), threading.Event()
    threads = [
        threading.Thread(target=worker, args=(tables, seed, 80, together, outcome))
        for seed in range(3)
    ]
    pinning = threading.Thread(target=pinner, args=(tables, done, outcome))
    for thread in (*threads, pinning):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    pinning.join()
    assert all(isinstance(result, tuple) for result in outcome.values()), outcome
    assert sum(refused for _, refused, _ in outcome.values()) > 0, "the threads never met"
    for epoch in list(tables.fences._open):
        tables.fences.close(epoch)
    tables.check_integrity()
    tables.close(tables.sequence_ids())
    retention.unpin(np.flatnonzero(retention.pinned))
    tables.check_integrity()
    assert tables.pool.num_used == tables.windows.num_used == 0


def pruned(seq_id: int) -> EvictionPlan:
    return EvictionPlan(seq_id, np.array([0]), 0, 0)


CALLS = {
    "open": lambda t, i: t.open(),
    "open_many": lambda t, i: t.open_many(1),
    "open_on": lambda t, i: t.open_on([], []),
    "close": lambda t, i: t.close([i]),
    "fork": lambda t, i: t.fork(i),
    "truncate": lambda t, i: t.truncate(i, 1),
    "evict": lambda t, i: t.evict(i, [0]),
    "set_start": lambda t, i: t.set_start(i, 0, 1),
    "reserve": lambda t, i: t.reserve([i], 1),
    "commit": lambda t, i: t.commit(None),
    "abort": lambda t, i: t.abort(None),
    "lengthen": lambda t, i: t.lengthen(i, 20),
    "publish_keys": lambda t, i: t.publish_keys(i, []),
    "extend_keys": lambda t, i: t.extend_keys(i, []),
    "forget_blocks": lambda t, i: t.forget_blocks([1]),
    "reset_prefix_cache": lambda t, i: t.reset_prefix_cache(),
    "begin_swap_out": lambda t, i: t.begin_swap_out([i]),
    "begin_swap_in": lambda t, i: t.begin_swap_in([i]),
    "commit_swap": lambda t, i: t.commit_swap(None),
    "abort_swap": lambda t, i: t.abort_swap(None),
    "adopt": lambda t, i: t.adopt(None),
    "open a fence": lambda t, i: t.fences.open(),
    "close a fence": lambda t, i: t.fences.close(1),
    "poll": lambda t, i: t.fences.poll(),
    "attach a retention": lambda t, i: Retention(t),
    "keep": lambda t, i: t.retention.keep(i, 50),
    "pin": lambda t, i: t.retention.pin(i, 0, 4),
    "pin pages": lambda t, i: t.retention.pin_pages([1]),
    "unpin": lambda t, i: t.retention.unpin([1]),
    "refresh": lambda t, i: t.retention.refresh(),
    "apply a plan": lambda t, i: eviction.apply(t, pruned(i)),
    "apply plans": lambda t, i: eviction.apply_all(t, [pruned(i)]),
    "apply no plans": lambda t, i: eviction.apply_all(t, []),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_inside_another_is_refused_and_changes_nothing(name):
    """An observer is called in the middle of a commit: what it calls meets that call."""
    tables = PageTables(4, 30, sharing=SharingOptions(), num_host_pages=8)
    met = []

    class Observer:
        def stored(self, keys, parent, tokens):
            before = snapshot(tables)
            with pytest.raises(ConcurrentCallError, match="another call") as caught:
                CALLS[name](tables, seq_id)
            assert before == snapshot(tables)
            met.append(caught.value)

        def removed(self, key):
            pass

        def cleared(self):
            pass

    seq_id = tables.open(range(9))
    if name != "attach a retention":
        Retention(tables)
    tables.prefix.observer = Observer()
    tables.commit(tables.reserve([seq_id], 9))
    assert len(met) == 1
    tables.check_integrity()
    tables.truncate(seq_id, 4)


def test_no_call_comes_between_the_checks_of_several_plans_and_what_they_do(monkeypatch):
    tables = PageTables(4, 30, sharing=SharingOptions())
    ids = [tables.open(range(at, at + 9)) for at in (0, 20)]
    tables.commit(tables.reserve(ids, 9))
    check, refused = tables.check_evict, []

    def checked(seq_id, blocks, boundary):
        check(seq_id, blocks, boundary)
        # What another thread would do now: the plan that was just checked would not fit any more.
        with pytest.raises(ConcurrentCallError, match="cannot truncate: another call"):
            tables.truncate(seq_id, 0)
        refused.append(seq_id)

    monkeypatch.setattr(tables, "check_evict", checked)
    assert eviction.apply_all(tables, [pruned(seq_id) for seq_id in ids]).tolist() == [1, 4]
    assert refused == ids
    assert tables.truncate(ids[0], 4).size == 2
    tables.check_integrity()


QUERIES = {
    "pages_needed": lambda t, ids: t.pages_needed(ids, 1),
    "check_distinct": lambda t, ids: t.check_distinct(ids),
    "extract": lambda t, ids: t.extract(ids, False),
    "block_table": lambda t, ids: t.block_table(ids),
    "reads": lambda t, ids: t.reads(ids, False),
}


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_that_is_overtaken_does_not_make_a_closed_sequence_known(name, monkeypatch):
    """Queries need no turn, so another thread may close what they look at in their middle."""
    tables = PageTables(4, 30)
    ids = tables.open_many(2)
    tables.commit(tables.reserve(ids, 3))
    # Not the batch that the tables know already.
    ids = ids[::-1].copy()
    find, overtaken = tables._rows_of, []

    def slowly(seq_ids):
        rows = find(seq_ids)
        if not overtaken:
            overtaken.append(True)
            tables.close(ids)
            tables.open_many(2)
        return rows

    monkeypatch.setattr(tables, "_rows_of", slowly)
    QUERIES[name](tables, ids)
    assert overtaken
    monkeypatch.undo()
    for call in (lambda: tables.reserve(ids, 1), lambda: tables.close(ids)):
        with pytest.raises(UnknownSequence):
            call()
    tables.check_integrity()


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_leaves_nothing_behind(name):
    tables = PageTables(4, 30)
    ids = tables.open_many(3)
    tables.commit(tables.reserve(ids, 3))
    tables._batch, tables._scratch[:] = NO_BATCH, 7
    QUERIES[name](tables, ids[:2])
    assert tables._batch is NO_BATCH and (tables._scratch == 7).all()
