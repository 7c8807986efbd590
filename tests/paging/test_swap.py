"""Swapping sequences to the host and back: what moves, what stays shared, what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from token_model import snapshot

from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    IntegrityError,
    OutOfHostPages,
    OutOfPages,
    OutOfWindowSlots,
    StepError,
    SwappedError,
    UnknownSequence,
)
from pagedtq.paging import PageTables, SharingOptions
from pagedtq.serving import BlockRemoved, BlockStored, EventLog

SIZE = 4


def tables_of(num_pages=11, num_host_pages=8, window=0, num_slots=0, **options) -> PageTables:
    return PageTables(
        SIZE,
        num_pages,
        window,
        2 if window else 0,
        num_slots,
        num_host_pages=num_host_pages,
        **options,
    )


def filled(tables, num_tokens, token_ids=None):
    seq_id = tables.open(token_ids)
    known = int(tables.lengths([seq_id])[0])
    tables.commit(tables.reserve([seq_id], num_tokens - known))
    return seq_id


def swap_out(tables, *seq_ids):
    plan = tables.begin_swap_out(list(seq_ids))
    tables.check_integrity()
    freed = tables.commit_swap(plan)
    tables.check_integrity()
    return plan, freed


def swap_in(tables, *seq_ids):
    plan = tables.begin_swap_in(list(seq_ids))
    tables.check_integrity()
    assert tables.commit_swap(plan).size == 0
    tables.check_integrity()
    return plan


# -- the behaviours of vLLM V0's swaps, with literal ids ---------------------------------------


def test_swapping_out_maps_the_table_and_moves_the_free_counts_by_its_length():
    tables = tables_of()
    seq_id = filled(tables, 14)
    before = tables.block_table([seq_id])[0].tolist()
    assert before == [1, 2, 3, 4]
    free, host_free = tables.pool.num_free, tables.host.num_free
    plan, freed = swap_out(tables, seq_id)
    assert plan.pages.tolist() == before
    assert plan.host_pages.tolist() == [1, 2, 3, 4]
    assert freed.tolist() == [4, 3, 2, 1]
    assert tables.pool.num_free == free + 4
    assert tables.host.num_free == host_free - 4
    assert tables.is_swapped([seq_id]).tolist() == [True]
    back = swap_in(tables, seq_id)
    assert back.host_pages.tolist() == [1, 2, 3, 4]
    assert back.pages.tolist() == [5, 6, 7, 8]
    assert tables.block_table([seq_id])[0].tolist() == [5, 6, 7, 8]
    assert (tables.pool.num_free, tables.host.num_free) == (free, host_free)
    assert tables.is_swapped([seq_id]).tolist() == [False]


def test_a_swapped_sequence_comes_back_later_if_others_took_the_pages():
    tables = tables_of()
    seq_id = filled(tables, 14)
    swap_out(tables, seq_id)
    other = filled(tables, 28)
    before = snapshot(tables)
    with pytest.raises(OutOfPages) as caught:
        tables.begin_swap_in([seq_id])
    assert (caught.value.need, caught.value.free, caught.value.total) == (4, 3, 10)
    assert before == snapshot(tables)
    tables.close(other)
    assert swap_in(tables, seq_id).pages.size == 4


def test_a_swap_out_needs_room_on_the_host():
    tables = tables_of(num_host_pages=3)
    seq_id = filled(tables, 14)
    before = snapshot(tables)
    with pytest.raises(OutOfHostPages) as caught:
        tables.begin_swap_out([seq_id])
    assert (caught.value.need, caught.value.free, caught.value.total) == (4, 3, 3)
    assert "raise num_host_pages" in str(caught.value)
    assert before == snapshot(tables)


def test_tables_without_a_host_tier_swap_nothing_out():
    tables = tables_of(num_host_pages=0)
    with pytest.raises(OutOfHostPages, match="need 1 host pages, 0 free of 0"):
        tables.begin_swap_out([filled(tables, 1)])
    empty = tables.open()
    swap_out(tables, empty)
    assert tables.is_swapped([empty]).all()
    swap_in(tables, empty)


# -- between begin and commit ------------------------------------------------------------------


def test_others_step_while_a_swap_is_under_way_and_never_take_its_pages():
    tables = tables_of()
    leaving, other = filled(tables, 14), filled(tables, 3)
    plan = tables.begin_swap_out([leaving])
    assert tables.block_table([leaving])[0].tolist() == [1, 2, 3, 4]
    step = tables.reserve([other], 18)
    assert step.new_pages.tolist() == [6, 7, 8, 9, 10]
    tables.commit(step)
    with pytest.raises(OutOfPages):
        tables.reserve([other], SIZE)
    tables.commit_swap(plan)
    tables.commit(tables.reserve([other], SIZE))
    tables.check_integrity()


def test_an_aborted_swap_leaves_everything_as_it_was():
    tables = tables_of(window=SIZE, num_slots=2)
    seq_id = filled(tables, 14)
    plan = tables.begin_swap_out([seq_id])
    assert tables.abort_swap(plan).size == 0
    tables.check_integrity()
    assert (tables.host.num_used, tables.host.rings.num_used) == (0, 0)
    assert tables.block_table([seq_id])[0].tolist() == [1, 2, 3, 4]
    swap_out(tables, seq_id)
    plan = tables.begin_swap_in([seq_id])
    assert sorted(tables.abort_swap(plan).tolist()) == sorted(plan.pages.tolist())
    tables.check_integrity()
    assert tables.is_swapped([seq_id]).all()
    assert tables.windows.num_free == 2
    swap_in(tables, seq_id)
    assert tables.state(seq_id) == (14, 12, 10, 2)


def test_two_swaps_are_under_way_and_end_in_any_order():
    tables = tables_of(num_host_pages=10)
    one, two = filled(tables, 8), filled(tables, 8)
    first, second = tables.begin_swap_out([one]), tables.begin_swap_out([two])
    tables.commit_swap(second)
    back = tables.begin_swap_in([two])
    tables.check_integrity()
    tables.commit_swap(first)
    tables.commit_swap(back)
    tables.check_integrity()
    assert tables.is_swapped([one, two]).tolist() == [True, False]


def test_pages_that_leave_behind_a_fence_wait_for_it():
    tables = tables_of()
    seq_id = filled(tables, 8)
    epoch = tables.fences.open()
    _, freed = swap_out(tables, seq_id)
    assert freed.tolist() == tables.pool.parked_ids().tolist() == [2, 1]
    assert tables.fences.close(epoch).tolist() == [2, 1]


# -- what is shared ----------------------------------------------------------------------------


def test_sequences_that_leave_together_share_the_pages_of_the_host():
    tables = tables_of()
    parent = filled(tables, 10)
    child = tables.fork(parent)
    tables.commit(tables.reserve([child], 1))
    assert tables.block_table([parent, child]).tolist() == [[1, 2, 3], [1, 2, 4]]
    plan, freed = swap_out(tables, parent, child)
    assert plan.pages.tolist() == [1, 2, 3, 4]
    assert sorted(freed.tolist()) == [1, 2, 3, 4]
    assert tables.host.num_used == 4
    swap_in(tables, child, parent)
    assert tables.block_table([parent, child]).tolist() == [[5, 6, 8], [5, 6, 7]]
    assert tables.pool.ref_counts[5:9].tolist() == [2, 2, 1, 1]


def test_a_page_that_others_hold_is_copied_out_once_and_not_copied_back():
    tables = tables_of()
    parent = filled(tables, 10)
    child = tables.fork(parent)
    plan, freed = swap_out(tables, child)
    assert plan.pages.tolist() == [1, 2, 3]
    assert freed.size == 0
    # The other follows: its full blocks are there.
    plan = tables.begin_swap_out([parent])
    assert (plan.pages.tolist(), plan.num_reused) == ([3], 2)
    tables.abort_swap(plan)
    # It stays: full blocks are found where they are, only the open one is copied.
    back = swap_in(tables, child)
    assert (back.num_reused, back.pages.tolist(), back.host_pages.tolist()) == (2, [4], [3])
    assert tables.block_table([parent, child]).tolist() == [[1, 2, 3], [1, 2, 4]]
    assert tables.host.num_used == 0


def test_a_page_that_was_written_on_meanwhile_is_copied_back():
    tables = tables_of()
    parent = filled(tables, 8)
    child = tables.fork(parent)
    swap_out(tables, child)
    tables.truncate(parent, 6)
    tables.commit(tables.reserve([parent], 1))
    back = swap_in(tables, child)
    assert (back.num_reused, back.host_pages.tolist()) == (1, [2])
    assert tables.block_table([parent, child]).tolist() == [[1, 2], [1, 3]]


@pytest.mark.parametrize("length", [9, 100])
def test_a_page_that_was_written_on_one_by_one_is_copied_back_as_well(length):
    tables = tables_of(num_pages=40)
    parent = filled(tables, 8)
    child = tables.fork(parent)
    swap_out(tables, child)
    tables.truncate(parent, 6)
    tables.lengthen(parent, length)
    assert swap_in(tables, child).host_pages.tolist() == [2]


def test_a_page_that_was_taken_by_others_is_copied_back():
    tables = tables_of(num_pages=4)
    parent = filled(tables, 8)
    child = tables.fork(parent)
    swap_out(tables, child)
    tables.close(parent)
    filled(tables, 4)
    back = swap_in(tables, child)
    assert back.num_reused == 0
    assert back.pages.tolist() == [2, 1]


def test_published_pages_stay_findable_and_are_found_again_on_the_way_back():
    tables = tables_of(sharing=SharingOptions())
    tokens = list(range(10))
    seq_id = filled(tables, 10, tokens)
    swap_out(tables, seq_id)
    assert tables.num_cached_pages == 2
    other = tables.open(tokens)
    assert tables.block_table([other])[0].tolist() == [1, 2]
    back = swap_in(tables, seq_id)
    assert (back.num_reused, back.pages.size) == (2, 1)
    assert tables.block_table([seq_id])[0, :2].tolist() == [1, 2]


def test_a_block_that_another_sequence_computed_again_is_used_on_the_way_back():
    tables = tables_of(num_pages=4, sharing=SharingOptions())
    tokens = list(range(8))
    seq_id = filled(tables, 8, tokens)
    swap_out(tables, seq_id)
    tables.close(filled(tables, 12))
    assert tables.num_cached_pages == 0
    again = filled(tables, 8, tokens)
    assert tables.block_table([again])[0].tolist() == [1, 2]
    back = swap_in(tables, seq_id)
    assert (back.num_reused, back.pages.size) == (2, 0)
    assert tables.block_table([seq_id])[0].tolist() == [1, 2]


def test_blocks_that_could_be_found_can_be_found_again_and_events_say_so():
    tables = tables_of(num_pages=4, sharing=SharingOptions())
    log = tables.prefix.observer = EventLog(SIZE)
    tokens = list(range(8))
    seq_id = filled(tables, 8, tokens)
    keys = list(tables.keys_of(seq_id))
    swap_out(tables, seq_id)
    tables.close(filled(tables, 12))
    log.take()
    assert tables.num_shared_tokens([*tokens, 9]) == 0
    plan = tables.begin_swap_in([seq_id])
    assert log.take() == []
    assert tables.num_shared_tokens([*tokens, 9]) == 0, "its bytes are not there yet"
    tables.commit_swap(plan)
    (stored,) = log.take()
    assert isinstance(stored, BlockStored)
    assert (stored.block_hashes, stored.parent_block_hash) == (keys, None)
    assert stored.token_ids == tokens
    assert tables.num_shared_tokens([*tokens, 9]) == 8
    tables.check_integrity()


def test_a_block_that_was_withdrawn_is_not_published_on_the_way_back():
    tables = tables_of(num_pages=4, sharing=SharingOptions())
    log = tables.prefix.observer = EventLog(SIZE)
    seq_id = filled(tables, 8, list(range(8)))
    tables.forget_blocks([2])
    swap_out(tables, seq_id)
    tables.close(filled(tables, 12))
    swap_in(tables, seq_id)
    events = log.take()
    assert [len(e.block_hashes) for e in events if isinstance(e, BlockStored)] == [2, 1]
    assert sum(isinstance(e, BlockRemoved) for e in events) == 2
    assert tables.num_shared_tokens(range(9)) == 4


def test_the_prefix_cache_is_not_reset_while_a_sequence_is_on_the_host():
    tables = tables_of(sharing=SharingOptions())
    seq_id = filled(tables, 8, list(range(8)))
    swap_out(tables, seq_id)
    assert tables.pool.num_used == 0
    assert not tables.reset_prefix_cache()
    tables.close(seq_id)
    assert tables.reset_prefix_cache()


def test_tokens_of_a_found_block_are_compared_if_that_is_asked_for():
    tables = tables_of(num_pages=6, sharing=SharingOptions(verify_tokens=True))
    tokens = list(range(8))
    seq_id = filled(tables, 8, tokens)
    swap_out(tables, seq_id)
    filled(tables, 20)
    plan = None
    tables.close(int(tables.sequence_ids()[-1]))
    again = filled(tables, 8, tokens)
    page = int(tables.block_table([again])[0, 0])
    tables._page_tokens[page, 0] = 99
    plan = tables.begin_swap_in([seq_id])
    assert plan.num_reused == 1
    tables.abort_swap(plan)


# -- the exact window --------------------------------------------------------------------------


def test_the_window_leaves_with_its_sequence_and_comes_back():
    tables = tables_of(window=SIZE, num_slots=1)
    seq_id = filled(tables, 10)
    assert tables.state(seq_id) == (10, 8, 6, 2)
    plan, _ = swap_out(tables, seq_id)
    assert (plan.window_slots.tolist(), plan.rings.tolist()) == ([0], [0])
    assert plan.ring_spans.tolist() == [[6, 10]]
    assert (plan.sink_records.tolist(), plan.sink_host_pages.tolist()) == ([0], [1])
    assert plan.num_sinks.tolist() == [2]
    assert (tables.windows.num_free, tables.windows.num_records_used) == (1, 0)
    other = filled(tables, 1)
    with pytest.raises(OutOfWindowSlots) as caught:
        tables.begin_swap_in([seq_id])
    assert (caught.value.need, caught.value.free, caught.value.total) == (1, 0, 1)
    tables.close(other)
    back = swap_in(tables, seq_id)
    assert (back.window_slots.tolist(), back.ring_spans.tolist()) == ([0], [[6, 10]])
    assert (back.sink_records.tolist(), back.num_sinks.tolist()) == ([0], [2])
    assert tables.state(seq_id) == (10, 8, 6, 2)


def test_forks_that_share_a_ring_share_it_on_the_host():
    tables = tables_of(window=SIZE, num_slots=3)
    parent = filled(tables, 10)
    child = tables.fork(parent)
    tables.truncate(child, 9)
    plan, _ = swap_out(tables, parent, child)
    assert (plan.window_slots.tolist(), plan.ring_spans.tolist()) == ([0], [[6, 10]])
    assert tables.host.rings.num_used == 1
    back = swap_in(tables, child)
    assert back.ring_spans.tolist() == [[6, 9]]
    assert tables.host.rings.num_used == 1
    swap_in(tables, parent)
    assert tables.host.rings.num_used == 0
    assert tables.window_slots([parent, child]).tolist() != [-1, -1]
    assert tables.windows.num_used == 2


def test_a_block_0_whose_sinks_are_gone_is_copied_back_with_them():
    tables = tables_of(num_pages=20, window=SIZE, num_slots=1, sharing=SharingOptions())
    seq_id = filled(tables, 10, list(range(10)))
    swap_out(tables, seq_id)
    assert tables.windows.resting_pages.tolist() == [1]
    # Another sequence takes the one record there is.
    tables.close(filled(tables, 2))
    assert tables.windows.sink_record[1] < 0
    back = swap_in(tables, seq_id)
    assert back.num_sinks.tolist() == [2]
    assert tables.state(seq_id).num_sinks == 2
    assert back.host_pages.tolist() == [1, 3]


def test_a_swap_in_waits_for_a_sink_record():
    tables = tables_of(num_pages=20, window=SIZE, num_slots=1, sharing=SharingOptions())
    tokens = list(range(10))
    seq_id = filled(tables, 6, [7] * 6)
    swap_out(tables, seq_id)
    tables.close(filled(tables, 10, tokens))
    # Found, it owns the page with the only record, and no slot yet.
    holder = tables.open(tokens)
    assert tables.windows.num_free == 1
    with pytest.raises(OutOfWindowSlots):
        tables.begin_swap_in([seq_id])
    tables.close(holder)
    assert swap_in(tables, seq_id).num_sinks.tolist() == [2]


def test_evicted_blocks_stay_evicted():
    tables = tables_of()
    seq_id = filled(tables, 14)
    tables.evict(seq_id, [1])
    tables.set_start(seq_id, 2, 9)
    plan, _ = swap_out(tables, seq_id)
    assert plan.pages.tolist() == [1, 3, 4]
    assert tables.resident_tokens == tables.num_resident_blocks == 0
    assert tables.logical_tokens == 14
    swap_in(tables, seq_id)
    assert tables.block_table([seq_id])[0].tolist()[1] == 0
    assert tables.resident_tokens == 10
    reads = tables.reads([seq_id], True)
    assert (reads.keep.tolist(), reads.start.tolist()) == ([2], [9])


# -- refusals ----------------------------------------------------------------------------------

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


def test_swapping_out_nothing_is_allowed():
    tables = tables_of()
    plan, freed = swap_out(tables)
    assert (plan.pages.size, plan.ring_spans.shape, freed.size) == (0, (0, 2), 0)
    swap_in(tables)
    assert np.array_equal(tables.is_swapped([]), [])
