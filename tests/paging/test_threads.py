"""Threads that meet inside the tables: a typed error, and never a corrupted pool."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest
from token_model import snapshot

from pagedtq.errors import CapacityError, ConcurrentCallError, StepError
from pagedtq.paging import PageTables, SharingOptions

TYPED = (ConcurrentCallError, StepError, CapacityError)


@pytest.fixture
def eager_switching():
    """Let threads interrupt each other as often as the interpreter can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def worker(tables: PageTables, seed: int, wanted: int, outcome: dict) -> None:
    """Open, append, fork, truncate and close own sequences until so many calls were done."""
    rng = np.random.default_rng(seed)
    mine: list[int] = []
    done = refused = 0
    try:
        while done < wanted:
            assert refused < 1_000_000, f"only {done} calls were done"
            try:
                kind = rng.integers(8)
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


@pytest.mark.usefixtures("eager_switching")
def test_threads_get_typed_errors_and_the_books_stay_right():
    tables = PageTables(4, 300, 4, 2, 40, SharingOptions(), num_host_pages=50)
    outcome: dict = {}
    threads = [
        threading.Thread(target=worker, args=(tables, seed, 100, outcome)) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(isinstance(result, tuple) for result in outcome.values()), outcome
    assert sum(refused for _, refused, _ in outcome.values()) > 0, "the threads never met"
    for epoch in list(tables.fences._open):
        tables.fences.close(epoch)
    tables.check_integrity()
    tables.close(tables.sequence_ids())
    tables.check_integrity()
    assert tables.pool.num_used == tables.windows.num_used == 0


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
    tables.prefix.observer = Observer()
    tables.commit(tables.reserve([seq_id], 9))
    assert len(met) == 1
    tables.check_integrity()
    tables.truncate(seq_id, 4)
