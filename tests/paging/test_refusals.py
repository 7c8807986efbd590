"""Bad inputs of the control plane: each has its typed error and changes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    EvictedError,
    OutOfPages,
    OutOfWindowSlots,
    StepError,
    UnknownSequence,
)
from pagedtq.paging import EvictionPlan, KeepFirstLast, PageTables, eviction
from tests.table_snapshot import snapshot


def world():
    """Two sequences that share all but their tails; pages 16, window 32, few pages and slots."""
    tables, other = PageTables(16, 20, 32, 4, 3), PageTables(16, 20)
    a = tables.open()
    tables.commit(tables.reserve([a], 100))
    b = tables.fork(a)
    tables.evict(a, [1])
    tables.commit(tables.reserve([b], 3))
    closed = tables.open()
    tables.close([closed])
    # State of `a`: L 100, c 96, r 68, 7 blocks; the ring holds blocks 4 (in part), 5 and 6.
    done = tables.reserve([], [])
    tables.commit(done)
    return SimpleNamespace(
        tables=tables,
        other=other,
        a=a,
        b=b,
        new=tables.open_many(2).tolist(),
        closed=closed,
        foreign=other.open(),
        done=done,
    )


BAD_IDS = {
    "closed": (lambda w: w.closed, UnknownSequence),
    "foreign": (lambda w: w.foreign, UnknownSequence),
    "zero": (lambda w: 0, UnknownSequence),
    "negative": (lambda w: -1, UnknownSequence),
    "huge": (lambda w: 1 << 62, UnknownSequence),
    "float": (lambda w: float(w.a), ArgumentTypeError),
    "bool": (lambda w: True, ArgumentTypeError),
    "string": (lambda w: "a", ArgumentTypeError),
    "none": (lambda w: None, ArgumentTypeError),
}
OF_ONE = {
    "state": lambda w, i: w.tables.state(i),
    "fork": lambda w, i: w.tables.fork(i),
    "truncate": lambda w, i: w.tables.truncate(i, 3),
    "evict": lambda w, i: w.tables.evict(i, [0]),
    "set_start": lambda w, i: w.tables.set_start(i, 0, 3),
    "slots_of": lambda w, i: w.tables.slots_of(i, [0]),
    "close": lambda w, i: w.tables.close(i),
    "plan": lambda w, i: KeepFirstLast(1, 1).plan(w.tables, i),
}
OF_MANY = {
    "reserve": lambda w, ids: w.tables.reserve(ids, 1),
    "close": lambda w, ids: w.tables.close(ids),
    "lengths": lambda w, ids: w.tables.lengths(ids),
    "block_table": lambda w, ids: w.tables.block_table(ids),
    "reads": lambda w, ids: w.tables.reads(ids, True),
    "csr": lambda w, ids: w.tables.csr(ids),
    "window_slots": lambda w, ids: w.tables.window_slots(ids),
    "sink_records": lambda w, ids: w.tables.sink_records(ids),
}

CASES = {
    "reserve a sequence twice": (lambda w: w.tables.reserve([w.a, w.b, w.a], 1), ArgumentError),
    "close a sequence twice": (lambda w: w.tables.close([w.a, w.a]), ArgumentError),
    "reserve ids of float dtype": (
        lambda w: w.tables.reserve(np.array([w.a], float), 1),
        ArgumentTypeError,
    ),
    "reserve ids of two dimensions": (lambda w: w.tables.reserve([[w.a]], 1), ArgumentError),
    "reserve one bare id": (lambda w: w.tables.reserve(w.a, 1), ArgumentTypeError),
    "reserve a negative count": (lambda w: w.tables.reserve([w.a, w.b], [1, -1]), ArgumentError),
    "reserve a negative count for all": (lambda w: w.tables.reserve([w.a], -1), ArgumentError),
    "reserve half a token": (lambda w: w.tables.reserve([w.a], [0.5]), ArgumentTypeError),
    "reserve half a token for all": (lambda w: w.tables.reserve([w.a], 0.5), ArgumentTypeError),
    "reserve True tokens": (lambda w: w.tables.reserve([w.a], True), ArgumentTypeError),
    "reserve [True] tokens": (lambda w: w.tables.reserve([w.a], [True]), ArgumentTypeError),
    "reserve bool counts": (
        lambda w: w.tables.reserve([w.a], np.array([True])),
        ArgumentTypeError,
    ),
    "reserve None tokens": (lambda w: w.tables.reserve([w.a], None), ArgumentTypeError),
    "reserve too few counts": (lambda w: w.tables.reserve([w.a, w.b], [1]), ArgumentError),
    "reserve too many counts": (lambda w: w.tables.reserve([w.a], [1, 1]), ArgumentError),
    "reserve beyond all reason": (lambda w: w.tables.reserve([w.a], 1 << 62), ArgumentError),
    "reserve an overflowing count": (
        lambda w: w.tables.reserve([w.a], np.array([(1 << 64) - 1], np.uint64)),
        ArgumentError,
    ),
    "run out of pages half-way": (lambda w: w.tables.reserve([w.a, w.b], [60, 150]), OutOfPages),
    "run out of pages alone": (lambda w: w.tables.reserve([w.a], 1 << 30), OutOfPages),
    "run out of slots half-way": (
        lambda w: w.tables.reserve([w.new[0], w.b, w.new[1]], 1),
        OutOfWindowSlots,
    ),
    "truncate to a negative length": (lambda w: w.tables.truncate(w.a, -1), ArgumentError),
    "truncate to more than there is": (lambda w: w.tables.truncate(w.a, 101), ArgumentError),
    "truncate inside an evicted block": (lambda w: w.tables.truncate(w.a, 17), EvictedError),
    "truncate to half a token": (lambda w: w.tables.truncate(w.a, 3.5), ArgumentTypeError),
    "truncate to True": (lambda w: w.tables.truncate(w.a, True), ArgumentTypeError),
    "evict the open block": (lambda w: w.tables.evict(w.a, [6]), ArgumentError),
    "evict a block in the ring": (lambda w: w.tables.evict(w.a, [5]), ArgumentError),
    "evict a block partly in the ring": (lambda w: w.tables.evict(w.a, [0, 4]), ArgumentError),
    "evict a block that is not there": (lambda w: w.tables.evict(w.a, [0, 7]), ArgumentError),
    "evict a negative block": (lambda w: w.tables.evict(w.a, [0, -1]), ArgumentError),
    "evict an evicted block": (lambda w: w.tables.evict(w.a, [0, 1]), EvictedError),
    "evict a block twice": (lambda w: w.tables.evict(w.a, [0, 2, 0]), ArgumentError),
    "evict a bare block": (lambda w: w.tables.evict(w.a, 0), ArgumentTypeError),
    "evict half a block": (lambda w: w.tables.evict(w.a, [0.5]), ArgumentTypeError),
    "evict with a boundary in the ring": (
        lambda w: w.tables.evict(w.a, [0], boundary=(4, 69)),
        ArgumentError,
    ),
    "apply a plan for evicted blocks": (
        lambda w: eviction.apply(w.tables, EvictionPlan(w.a, np.array([0, 1]), 0, 32)),
        EvictedError,
    ),
    "apply a plan for a closed sequence": (
        lambda w: eviction.apply(w.tables, EvictionPlan(w.closed, np.array([0]), 0, 0)),
        UnknownSequence,
    ),
    "start inside the ring": (lambda w: w.tables.set_start(w.a, 0, 69), ArgumentError),
    "keep more than start": (lambda w: w.tables.set_start(w.a, 9, 8), ArgumentError),
    "keep a negative number": (lambda w: w.tables.set_start(w.a, -1, 8), ArgumentError),
    "start at a float": (lambda w: w.tables.set_start(w.a, 0, 8.0), ArgumentTypeError),
    "ask for a slot behind the end": (lambda w: w.tables.slots_of(w.a, [0, 100]), ArgumentError),
    "ask for a negative position": (lambda w: w.tables.slots_of(w.a, [-1]), ArgumentError),
    "ask for half a position": (lambda w: w.tables.slots_of(w.a, [0.5]), ArgumentTypeError),
    "open a negative number": (lambda w: w.tables.open_many(-1), ArgumentError),
    "open more than there are rows": (lambda w: w.tables.open_many(1 << 24), ArgumentError),
    "open True": (lambda w: w.tables.open_many(True), ArgumentTypeError),
    "commit twice": (lambda w: w.tables.commit(w.done), StepError),
    "abort after commit": (lambda w: w.tables.abort(w.done), StepError),
    "commit nothing": (lambda w: w.tables.commit(None), StepError),
    "release a page twice": (lambda w: w.tables.pool.release([1, 1, 1]), ArgumentError),
    "release a free page": (lambda w: w.tables.pool.release([19]), ArgumentError),
    "release a page out of range": (lambda w: w.tables.pool.release([1, 20]), ArgumentError),
    "release the null page": (lambda w: w.tables.pool.release([1, 0]), ArgumentError),
    "retain the null page": (lambda w: w.tables.pool.retain([0]), ArgumentError),
    "release no slot": (lambda w: w.tables.windows.release([-1]), ArgumentError),
    "release the null page of the host": (lambda w: w.tables.host.release([0]), ArgumentError),
    "release a negative page": (lambda w: w.tables.pool.release([-1]), ArgumentError),
    "release a free slot": (lambda w: w.tables.windows.release([2]), ArgumentError),
    "release a slot out of range": (lambda w: w.tables.windows.release([3]), ArgumentError),
    "retain a free page": (lambda w: w.tables.pool.retain([1, 19]), ArgumentError),
    "give a page two sink records": (
        lambda w: w.tables.windows.acquire_records([1]),
        ArgumentError,
    ),
}

IN_A_STEP = {
    "reserve": lambda w: w.tables.reserve([w.b], 1),
    "fork": lambda w: w.tables.fork(w.b),
    "truncate": lambda w: w.tables.truncate(w.b, 1),
    "evict": lambda w: w.tables.evict(w.b, [0]),
    "apply": lambda w: eviction.apply(w.tables, EvictionPlan(w.b, np.array([0]), 0, 16)),
    "set_start": lambda w: w.tables.set_start(w.b, 0, 0),
    "close": lambda w: w.tables.close([w.b]),
    "close one": lambda w: w.tables.close(w.b),
    "commit another plan": lambda w: w.tables.commit(w.done),
    "abort another plan": lambda w: w.tables.abort(w.done),
}

BAD_TABLES = {
    "page size 0": ((0, 10), ArgumentError),
    "page size True": ((True, 10), ArgumentTypeError),
    "page size 16.0": ((16.0, 10), ArgumentTypeError),
    "one page": ((16, 1), ArgumentError),
    "window not a multiple of the page": ((16, 10, 24, 0, 1), ArgumentError),
    "negative window": ((16, 10, -16, 0, 1), ArgumentError),
    "sinks beyond a page": ((16, 10, 16, 17, 1), ArgumentError),
    "negative sinks": ((16, 10, 16, -1, 1), ArgumentError),
    "window without slots": ((16, 10, 16, 0, 0), ArgumentError),
    "sinks of float": ((16, 10, 16, 4.0, 1), ArgumentTypeError),
}


def refuses(w, call, error):
    before = snapshot(w.tables), snapshot(w.other)
    with pytest.raises(error) as caught:
        call(w)
    assert before == (snapshot(w.tables), snapshot(w.other))
    assert str(caught.value)
    w.tables.check_integrity()


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_has_its_error_and_changes_nothing(name):
    refuses(world(), *CASES[name])


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("operation", OF_ONE)
def test_a_bad_id_is_refused_by_what_takes_one(operation, bad):
    w = world()
    make, error = BAD_IDS[bad]
    refuses(w, lambda w: OF_ONE[operation](w, make(w)), error)


@pytest.mark.parametrize("bad", BAD_IDS)
@pytest.mark.parametrize("operation", OF_MANY)
def test_a_bad_id_is_refused_by_what_takes_many(operation, bad):
    w = world()
    make, error = BAD_IDS[bad]
    refuses(w, lambda w: OF_MANY[operation](w, [w.a, make(w)]), error)


@pytest.mark.parametrize("name", IN_A_STEP)
def test_nothing_else_happens_while_a_step_is_open(name):
    w = world()
    plan = w.tables.reserve([w.a], 1)
    refuses(w, IN_A_STEP[name], StepError)
    w.tables.commit(plan)
    refuses(w, lambda w: w.tables.abort(plan), StepError)


def test_a_plan_of_other_tables_is_not_this_step():
    w = world()
    w.tables.reserve([w.a], 1)
    theirs = w.other.reserve([w.foreign], 1)
    refuses(w, lambda w: w.tables.commit(theirs), StepError)


@pytest.mark.parametrize("name", BAD_TABLES)
def test_tables_that_contradict_themselves_are_refused(name):
    arguments, error = BAD_TABLES[name]
    with pytest.raises(error):
        PageTables(*arguments)


@pytest.mark.parametrize(
    ("first", "last", "error"),
    [
        (-1, 4, ArgumentError),
        (4, -1, ArgumentError),
        (True, 4, ArgumentTypeError),
        (4, 1.5, ArgumentTypeError),
    ],
)
def test_a_policy_keeps_a_number_of_tokens(first, last, error):
    with pytest.raises(error):
        KeepFirstLast(first, last)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: w.tables.reserve([w.a, w.b], [1, -7]), r"num_new_tokens\[1\] .* got -7"),
        (lambda w: w.tables.reserve([w.a], -7), "num_new_tokens must be in .* got -7"),
        (lambda w: w.tables.reserve([w.a, w.closed], 1), "sequence {0.closed} is not open here"),
        (lambda w: w.tables.reserve([w.a, w.b, w.a], 1), "sequence {0.a} appears twice .* of 3"),
        (lambda w: w.tables.reserve([w.a], 1 << 20), r"need \d+ pages, \d+ free of 19; evict,"),
        (lambda w: w.tables.close([w.b, w.b]), "sequence {0.b} appears twice in a batch of 2"),
        (lambda w: w.tables.truncate(w.a, 17), "sequence {0.a} .* block 1 was evicted; expected"),
        (lambda w: w.tables.pool.release([1, 1, 1]), "release gives page 1 3 times, but it has 2"),
        (lambda w: w.tables.pool.release([19]), "release: page 19 has no owner"),
        (lambda w: w.tables.pool.release([77]), r"page must be in \[1, 19\], got 77"),
    ],
)
def test_a_refusal_names_who_what_and_how_many(call, message):
    w = world()
    with pytest.raises((ArgumentError, OutOfPages), match=message.format(w)):
        call(w)


def test_sequences_whose_tables_hold_null_pages_are_forked_and_closed():
    """As vLLM's block tables may; only a caller that names the null page is refused."""
    w = world()
    assert (w.tables.block_table([w.a])[0, 1], w.tables.window_slots(w.new).tolist()) == (
        0,
        [-1] * 2,
    )
    child, empty = w.tables.fork(w.a), w.tables.fork(w.new[0])
    assert w.tables.close([child, empty, *w.new]).size == 0
    assert 0 not in w.tables.close([w.a, w.b]).tolist()
    assert w.tables.pool.num_used == w.tables.windows.num_used == 0
    w.tables.check_integrity()
