"""Sequences out of one set of tables and into another: sharing, capacity, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedtq.errors import ArgumentError, OutOfPages, StepError, UnknownSequence
from pagedtq.paging import PageTables, SequenceImage, SharingOptions

P, W, S = 16, 32, 3


def tables(pages=64, window=W, slots=12):
    return PageTables(P, pages, window, S, slots if window else 0)


def append(one, seq, count):
    one.commit(one.reserve([seq], count))


def described(one, ids):
    """States, boundaries, and which entries of the page tables are the same page."""
    table = one.block_table(ids)
    _, names = np.unique(table, return_inverse=True)
    _, slots = np.unique(one.window_slots(ids), return_inverse=True)
    reads = one.reads(ids, True)
    order = {}
    shape = [order.setdefault(name, len(order)) for name in names.reshape(-1).tolist()]
    slot_order = {}
    slot_shape = [slot_order.setdefault(name, len(slot_order)) for name in slots.tolist()]
    return (
        [one.state(int(seq)) for seq in ids],
        reads.keep.tolist(),
        reads.start.tolist(),
        (table == 0).tolist(),
        shape,
        slot_shape,
        (one.window_slots(ids) < 0).tolist(),
        (one.sink_records(ids) < 0).tolist(),
    )


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["append", "fork", "truncate", "evict", "close", "open"]),
        st.integers(0, 5),
        st.integers(0, 60),
    ),
    max_size=25,
)


@given(OPERATIONS, st.sampled_from([0, 16, 32]), st.booleans())
@settings(max_examples=150)
def test_whatever_happened_before_sequences_come_over_as_they_are(operations, window, sealed_only):
    one = tables(window=window)
    ids = [one.open()]
    for name, which, number in operations:
        seq = ids[which % len(ids)] if ids else None
        try:
            if name == "open" and len(ids) < 6:
                ids.append(one.open())
            elif seq is None:
                continue
            elif name == "append":
                append(one, seq, number)
            elif name == "fork" and len(ids) < 6:
                ids.append(one.fork(seq))
            elif name == "truncate":
                one.truncate(seq, number * one.state(seq).length // 60)
            elif name == "evict":
                one.evict(seq, [number % 4])
            elif name == "close":
                one.close(seq)
                ids.remove(seq)
        except (ArgumentError, OutOfPages):
            continue
    before = described(one, ids) if ids else None
    extracted = one.extract(ids, sealed_only)
    other = tables(window=window)
    append(other, other.open(), 20)
    plan = other.plan_adoption(extracted.image, sealed_only)
    # What the plan promises is free until then.
    assert not other.pool.ref_counts[plan.pages].any()
    twins = other.adopt(plan)
    other.check_integrity()
    if not ids:
        assert twins.size == 0
        return
    assert described(other, twins) == before == described(one, ids)
    assert other.pool.ref_counts[plan.pages].all()
    again = other.extract(twins, sealed_only).image
    for mine, theirs in zip(extracted.image, again):
        np.testing.assert_array_equal(mine, theirs)
    # And they live on: every one can grow, and all can go.
    for seq in twins.tolist():
        if one.num_sequences <= other.windows.num_free or not window:
            append(other, seq, 18)
            other.check_integrity()
    other.close(twins)
    other.check_integrity()
    assert other.num_sequences == 1


def forked():
    one = tables()
    first = one.open()
    append(one, first, 70)
    second = one.fork(first)
    return one, [first, second]


def test_pages_that_forks_share_are_counted_once():
    one, ids = forked()
    image = one.extract(ids, True).image
    assert (image.num_pages, image.num_filled, image.num_rings) == (5, 4, 1)
    assert image.blocks.tolist() == [1, 2, 3, 4, 5] * 2
    assert one.extract(ids, False).image.num_filled == 5
    assert image.ring_spans().tolist() == [[38, 70]]
    assert (image.first_pages(P).tolist(), image.sink_rows(P).tolist()) == ([0], [3])
    assert image.page_tokens(P, True).tolist() == [16, 16, 16, 16, 0]
    assert image.page_tokens(P, False).tolist() == [16, 16, 16, 16, 6]


def test_extracting_and_planning_change_nothing():
    one, ids = forked()
    version, free = one.version, one.pool.free_ids().tolist()
    image = one.extract(ids, True).image
    one.plan_adoption(image, True)
    assert (one.version, one.pool.free_ids().tolist()) == (version, free)
    one.check_integrity()


def test_a_plan_holds_only_until_the_tables_change():
    one, ids = forked()
    other = tables()
    plan = other.plan_adoption(one.extract(ids, True).image, True)
    append(other, other.open(), 1)
    with pytest.raises(StepError, match="the tables changed"):
        other.adopt(plan)
    other.check_integrity()
    again = other.plan_adoption(plan.image, True)
    other.pool.acquire(1)
    with pytest.raises(StepError, match="the tables changed"):
        other.adopt(again)
    assert other.num_sequences == 1


def test_open_steps_and_unknown_sequences_are_refused():
    one, ids = forked()
    image = one.extract(ids, True).image
    plan = one.plan_adoption(image, True)
    with pytest.raises(UnknownSequence):
        one.extract([ids[0], 7], True)
    with pytest.raises(ArgumentError, match="appears twice"):
        one.extract([ids[0], ids[0]], True)
    step = one.reserve(ids, 1)
    for call in (
        lambda: one.extract(ids, True),
        lambda: one.plan_adoption(image, True),
        lambda: one.adopt(plan),
    ):
        with pytest.raises(StepError, match="must wait"):
            call()
    one.commit(step)


def broken(image, **changes):
    copies = {name: np.array(value) for name, value in image._asdict().items()}
    for name, change in changes.items():
        if callable(change):
            change(copies[name])
        else:
            copies[name] = np.array(change)
    arrays = (copies["states"], copies["rings"], copies["blocks"])
    return SequenceImage(*arrays, *(int(copies[name]) for name in image._fields[3:]))


def put(index, value):
    def change(array):
        array[index] = value

    return change


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"states": put((1, slice(0, 3)), [80, 64, 48])}, "whole block that is not coded"),
        ({"states": put((1, slice(0, 3)), [74, 64, 42])}, "would hold more than 32 positions"),
        ({"states": put((0, 3), 4)}, "sequence 0 breaks s"),
        ({"states": put((1, 4), 3)}, "sequence 1 breaks keep <= start"),
        ({"blocks": put(6, 5)}, "shares a page at another place"),
        ({"blocks": put(4, 6)}, "sequence 0 names a page that is not there"),
        ({"blocks": put(9, 0)}, "sequence 1 lacks the page of an open or exact block"),
        ({"blocks": [1, 2, 3, 4, 5]}, "expected 10 blocks, got 5"),
        ({"num_pages": 6}, "page 5 belongs to no sequence"),
        ({"num_filled": 5}, r"pages \[0, 5\) must be those that hold bytes"),
        ({"num_rings": 2}, "ring 1 belongs to no sequence"),
        ({"rings": [0, 1]}, "sequence 1 names a ring that is not there"),
        ({"rings": [0, -1]}, "sequence 1 has tokens, but no ring"),
        ({"blocks": put(5, 0)}, "sequence 1 lacks block 0"),
    ],
)
def test_an_image_that_breaks_an_invariant_is_refused(changes, problem):
    one, ids = forked()
    image = one.extract(ids, True).image
    wrong = broken(image, **changes)
    version = one.version
    with pytest.raises(ArgumentError, match=problem):
        one.plan_adoption(wrong, True)
    assert one.version == version


def test_without_a_window_there_are_no_rings_and_no_sinks():
    one = tables(window=0)
    seq = one.open()
    append(one, seq, 20)
    image = one.extract([seq], False).image
    assert (image.num_rings, image.rings.tolist()) == (0, [-1])
    for changes, problem in (
        ({"states": put((0, 1), 16)}, "r = c = L"),
        ({"states": put((0, 3), 1)}, "sinks without a window"),
        ({"rings": [0], "num_rings": 1}, "ring without a window"),
    ):
        with pytest.raises(ArgumentError, match=problem):
            one.plan_adoption(broken(image, **changes), False)


def test_ids_of_open_sequences_come_in_the_order_of_opening():
    one = tables()
    first, second, third = (one.open() for _ in range(3))
    one.close(second)
    fourth = one.open()
    assert one.sequence_ids().tolist() == [first, third, fourth]


def test_a_page_that_an_adoption_takes_is_found_no_longer():
    mine = PageTables(16, 4, sharing=SharingOptions())
    tokens = list(range(40))
    first = mine.open(tokens)
    mine.commit(mine.reserve([first], 40))
    mine.close([first])
    source = PageTables(16, 4)
    given = source.open_many(2)
    source.commit(source.reserve(given, [30, 0]))
    adopted = mine.adopt(mine.plan_adoption(source.extract(given, True).image, True))
    assert mine.block_table(adopted)[0].tolist() == [3, 2]
    assert mine.length_of(mine.open(tokens)) == 16
    # Adopted sequences have no tokens, so what they append cannot be found either.
    mine.close(adopted[:1])
    mine.commit(mine.reserve(adopted[1:], 16, list(range(16))))
    mine.check_integrity()
