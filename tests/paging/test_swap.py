"""Swapping sequences to the host and back: what moves, and what others see meanwhile."""

from __future__ import annotations

import numpy as np
import pytest
from swap_tables import SIZE, filled, swap_in, swap_out, tables_of
from token_model import snapshot

from pagedtq.errors import OutOfHostPages, OutOfPages, OutOfWindowSlots
from pagedtq.paging import SharingOptions

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


def test_swapping_out_nothing_is_allowed():
    tables = tables_of()
    plan, freed = swap_out(tables)
    assert (plan.pages.size, plan.ring_spans.shape, freed.size) == (0, (0, 2), 0)
    swap_in(tables)
    assert np.array_equal(tables.is_swapped([]), [])


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
