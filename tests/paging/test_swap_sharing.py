"""Pages that several sequences hold, or that can be found by their tokens, across swaps."""

from __future__ import annotations

import pytest
from swap_tables import SIZE, filled, swap_in, swap_out, tables_of

from pagedtq.paging import SharingOptions
from pagedtq.serving import BlockRemoved, BlockStored, EventLog


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
