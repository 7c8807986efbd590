"""What swapped sequences and swaps under way refuse, and the damage that integrity finds."""

from __future__ import annotations

import pytest
from swap_tables import SIZE, filled, swap_out, tables_of
from token_model import snapshot

from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    IntegrityError,
    StepError,
    SwappedError,
    UnknownSequence,
)

CHANGES = {
    "reserve": lambda t, i: t.reserve([i], 1),
    "lengthen": lambda t, i: t.lengthen(i, 20),
    "fork": lambda t, i: t.fork(i),
    "truncate": lambda t, i: t.truncate(i, 1),
    "evict": lambda t, i: t.evict(i, [0]),
    "set_start": lambda t, i: t.set_start(i, 0, 1),
    "publish_keys": lambda t, i: t.publish_keys(i, [b"a"]),
    "extract": lambda t, i: t.extract([i], True),
    "begin_swap_out": lambda t, i: t.begin_swap_out([i]),
}
READS = {
    "block_table": lambda t, i: t.block_table([i]),
    "reads": lambda t, i: t.reads([i], True),
    "csr": lambda t, i: t.csr([i]),
    "slots_of": lambda t, i: t.slots_of(i, [0]),
    "window_slots": lambda t, i: t.window_slots([i]),
    "sink_records": lambda t, i: t.sink_records([i]),
    "resident_lengths": lambda t, i: t.resident_lengths([i]),
}


@pytest.mark.parametrize("name", [*CHANGES, *READS])
def test_whatever_needs_the_pages_of_a_swapped_sequence_names_the_remedy(name):
    tables = tables_of()
    seq_id = filled(tables, 6)
    swap_out(tables, seq_id)
    before = snapshot(tables)
    with pytest.raises(SwappedError, match=f"sequence {seq_id}.*swap it in"):
        (CHANGES | READS)[name](tables, seq_id)
    assert before == snapshot(tables)


@pytest.mark.parametrize("name", [*CHANGES, "close", "begin_swap_in"])
@pytest.mark.parametrize("direction", ["out", "in"])
def test_nothing_changes_a_sequence_that_is_being_swapped(name, direction):
    tables = tables_of()
    seq_id = filled(tables, 6)
    if direction == "out":
        tables.begin_swap_out([seq_id])
    else:
        swap_out(tables, seq_id)
        tables.begin_swap_in([seq_id])
    call = {
        **CHANGES,
        "close": lambda t, i: t.close([i]),
        "begin_swap_in": lambda t, i: t.begin_swap_in([i]),
    }[name]
    before = snapshot(tables)
    with pytest.raises(StepError, match="being swapped"):
        call(tables, seq_id)
    assert before == snapshot(tables)


def test_a_swapped_sequence_can_be_asked_for_its_length_and_closed():
    tables = tables_of(window=SIZE, num_slots=2)
    one, two = filled(tables, 6), filled(tables, 9)
    swap_out(tables, one)
    assert tables.lengths([one]).tolist() == [6]
    assert tables.state(one) == (6, 4, 2, 2)
    assert tables.sequence_ids().tolist() == sorted([one, two])
    assert tables.close([one, two]).size == 3
    tables.check_integrity()
    assert (tables.host.num_used, tables.host.rings.num_used, tables.num_swapped) == (0, 0, 0)
    assert tables._num_away == 0


BAD = {
    "swap in what is not out": (lambda t, i: t.begin_swap_in([i]), ArgumentError),
    "swap out an unknown one": (lambda t, i: t.begin_swap_out([i, 5]), UnknownSequence),
    "swap out twice": (lambda t, i: t.begin_swap_out([i, i]), ArgumentError),
    "swap out a float": (lambda t, i: t.begin_swap_out([1.5]), ArgumentTypeError),
    "ask for an unknown one": (lambda t, i: t.is_swapped([5]), UnknownSequence),
    "commit nothing": (lambda t, i: t.commit_swap(None), StepError),
    "abort nothing": (lambda t, i: t.abort_swap(None), StepError),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_swap_has_its_error_and_changes_nothing(name):
    tables = tables_of()
    seq_id = filled(tables, 6)
    call, error = BAD[name]
    before = snapshot(tables)
    with pytest.raises(error):
        call(tables, seq_id)
    assert before == snapshot(tables)


def test_no_swap_begins_or_ends_while_a_step_is_open():
    tables = tables_of()
    one, two, three = filled(tables, 6), filled(tables, 6), filled(tables, 1)
    swap_out(tables, two)
    plan = tables.begin_swap_out([one])
    step = tables.reserve([three], 1)
    before = snapshot(tables)
    for call in (
        lambda: tables.begin_swap_out([one]),
        lambda: tables.begin_swap_in([two]),
        lambda: tables.commit_swap(plan),
        lambda: tables.abort_swap(plan),
    ):
        with pytest.raises(StepError, match="step is open"):
            call()
    assert before == snapshot(tables)
    tables.commit(step)
    tables.commit_swap(plan)


def test_a_plan_of_other_tables_is_refused():
    tables, other = tables_of(), tables_of()
    plan = other.begin_swap_out([filled(other, 3)])
    with pytest.raises(StepError, match="not under way"):
        tables.commit_swap(plan)
    other.commit_swap(plan)
    with pytest.raises(StepError, match="not under way"):
        other.commit_swap(plan)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t._swapped.clear(), "not those on the host"),
        (lambda t: t._table.__setitem__((0, 0), 9), "has pages"),
        (lambda t: t.host._refs.__setitem__(1, 2), "host page"),
        (lambda t: t._swapped[0].host_pages.__setitem__(0, 0), "missing on the host"),
        (lambda t: t._swapped.__setitem__(0, t._swapped[0]._replace(ring=-1)), "lacks its ring"),
        (lambda t: setattr(t, "_num_away", 7), "number of swapped rows"),
        (lambda t: t._away.__setitem__(1, 1), "being swapped"),
        (lambda t: t._twins._page_of.__setitem__(1, 3), "twins"),
    ],
)
def test_integrity_finds_each_kind_of_damage_to_the_host_tier(damage, message):
    tables = tables_of(num_pages=20, window=SIZE, num_slots=3)
    parent = filled(tables, 10)
    swap_out(tables, parent)
    child = filled(tables, 10)
    fork = tables.fork(child)
    swap_out(tables, fork)
    damage(tables)
    with pytest.raises(IntegrityError, match=message):
        tables.check_integrity()
