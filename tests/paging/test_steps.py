"""Steps: what a reserve takes, what its plan says, commit and abort."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import OutOfPages, OutOfWindowSlots, StepError, UnknownSequence
from pagedtq.paging import PageTables
from tests.table_snapshot import snapshot

SIZE = 16


def append(tables, seq_ids, counts):
    plan = tables.reserve(seq_ids, counts)
    tables.commit(plan)
    return plan


def filled(num_tokens, window=0, num_sinks=0, num_slots=8, num_pages=200):
    tables = PageTables(SIZE, num_pages, window, num_sinks, num_slots)
    seq_id = tables.open()
    append(tables, [seq_id], num_tokens)
    return tables, seq_id


@pytest.mark.parametrize("writer", ["parent", "child"])
@pytest.mark.parametrize("k", [1, 16, 129])
@pytest.mark.parametrize("n", [1, 16, 129])
def test_an_append_after_a_fork_copies_a_partial_tail_and_nothing_else(n, k, writer):
    tables, parent = filled(n)
    used = tables.pool.num_used
    assert used == -(-n // SIZE)
    child = tables.fork(parent)
    assert tables.pool.num_used == used
    other, seq_id = (child, parent) if writer == "parent" else (parent, child)
    static = tables.block_table([other])[0].tolist()
    plan = append(tables, [seq_id], k)
    copied = int(n % SIZE > 0)
    assert plan.cow_src.size == plan.copy_src.size == copied
    assert tables.pool.num_used - used == -(-(n + k) // SIZE) - -(-n // SIZE) + copied
    # As vLLM counts it: the blocks this append touched, a copied one included.
    if copied:
        assert tables.pool.num_used - used == -(-(n + k) // SIZE) - n // SIZE
        assert plan.cow_src.tolist() == [static[-1]]
        assert plan.cow_dst.tolist() == [tables.block_table([seq_id])[0, n // SIZE]]
    assert tables.block_table([other])[0].tolist() == static
    again = append(tables, [seq_id], 1)
    assert again.cow_src.size == 0
    tables.close([parent])
    tables.close([child])
    assert tables.pool.num_used == 0
    tables.check_integrity()


@pytest.mark.parametrize(("prompt", "appended"), [(0, 0), (1, 15), (16, 1), (129, 1), (17, 63)])
def test_an_append_takes_exactly_the_pages_that_its_tokens_begin(prompt, appended):
    tables, seq_id = filled(prompt)
    before = tables.pool.num_free
    append(tables, [seq_id], appended)
    expected = -(-(prompt + appended) // SIZE) - -(-prompt // SIZE)
    assert before - tables.pool.num_free == expected


def test_pages_are_given_in_the_order_of_the_batch_as_if_one_by_one():
    tables = PageTables(SIZE, 64)
    a, b, c = tables.open_many(3)
    append(tables, [a, b, c], [20, 0, 40])
    assert tables.block_table([a, b, c]).tolist() == [[1, 2, 0], [0, 0, 0], [3, 4, 5]]
    fork = tables.fork(a)
    # The fork copies page 2 first and then takes a new one; c only takes a new one.
    append(tables, [fork, c], [20, 10])
    assert tables.block_table([fork, c]).tolist() == [[1, 6, 7, 0], [3, 4, 5, 8]]


def test_a_closed_sequence_returns_its_pages_in_reverse():
    tables, a = filled(50, num_pages=9)
    b = tables.open()
    append(tables, [b], 20)
    assert tables.close([a]).tolist() == [4, 3, 2, 1]
    assert tables.close(b).tolist() == [6, 5]
    assert tables.pool.free_ids().tolist() == [7, 8, 4, 3, 2, 1, 6, 5]


def test_of_several_forks_in_one_step_the_last_owner_writes_in_place():
    tables, parent = filled(20, window=SIZE, num_sinks=4)
    forks = [tables.fork(parent) for _ in range(3)]
    page, slot = tables.block_table([parent])[0, 1], tables.window_slots([parent])[0]
    order = [forks[2], parent, forks[0], forks[1]]
    plan = append(tables, order, 1)
    assert plan.cow_src.tolist() == [page] * 3
    assert tables.block_table(order)[:, 1].tolist() == [*plan.cow_dst.tolist(), page]
    assert plan.window_copy_src.tolist() == [slot] * 3
    assert tables.window_slots(order).tolist() == [*plan.window_copy_dst.tolist(), slot]
    # The ring holds positions 4 to 19, the open block's codes do not exist yet.
    assert plan.copy_src.size == 0
    assert set(plan.cow_dst) <= set(plan.new_pages)
    assert tables.pool.num_shared == 1
    assert tables.windows.num_shared == 0
    tables.check_integrity()


def test_a_fork_outside_the_batch_makes_all_members_copy():
    tables, parent = filled(20, window=SIZE)
    forks = [tables.fork(parent) for _ in range(2)]
    plan = append(tables, forks, 1)
    assert plan.cow_src.size == plan.window_copy_src.size == 2
    # Its forks are gone: the parent owns page and slot again and writes in place.
    plan = append(tables, [parent], 1)
    assert plan.cow_src.size == plan.window_copy_src.size == 0


def test_members_without_new_tokens_own_but_do_not_write():
    tables, parent = filled(20, window=SIZE)
    fork = tables.fork(parent)
    plan = append(tables, [parent, fork], [0, 1])
    assert plan.cow_src.size == plan.window_copy_src.size == 1
    assert plan.num_new.tolist() == [0, 1]
    before = tables.state(parent), tables.pool.num_free
    plan = append(tables, [parent, fork], [0, 0])
    assert plan.positions.size == plan.new_pages.size == plan.seal_rows.size == 0
    assert before == (tables.state(parent), tables.pool.num_free)


def test_an_empty_step_is_a_step():
    tables, _ = filled(20, window=SIZE, num_sinks=4)
    plan = tables.reserve([], [])
    for array in (plan.positions, plan.store_mapping, plan.ring_mapping, plan.sink_mapping):
        assert array.size == 0
    assert plan.filled_pages.size == 0
    assert tables.abort(plan).size == 0


def test_shared_sinks_are_copied_with_the_page_of_block_0():
    tables, parent = filled(3, window=SIZE, num_sinks=4)
    fork = tables.fork(parent)
    record = tables.sink_records([parent])[0]
    plan = append(tables, [fork], 3)
    assert plan.sink_copy_src.tolist() == [record]
    assert plan.sink_copy_dst.tolist() == tables.sink_records([fork]).tolist()
    assert plan.sink_mapping.tolist() == [int(plan.sink_copy_dst[0]) * 4 + 3, -1, -1]
    assert tables.state(fork).num_sinks == 4
    assert tables.windows.num_records_used == 2
    tables.close([fork])
    assert tables.windows.num_records_used == 1


def test_the_plan_of_a_long_append_seals_stores_and_keeps_the_last_tokens():
    tables, seq_id = filled(20, window=SIZE, num_sinks=4)
    assert tables.state(seq_id) == (20, 16, 4, 4)
    slot = int(tables.window_slots([seq_id])[0])
    plan = tables.reserve([seq_id], 30)
    pages = tables.block_table([seq_id])[0].astype(np.int64)
    assert tables.state(seq_id) == (50, 48, 34, 4)
    assert plan.positions.tolist() == list(range(20, 50))
    positions = plan.positions
    assert plan.slot_mapping.tolist() == (pages[positions // 16] * 16 + positions % 16).tolist()
    stored = np.where(positions < 48, plan.slot_mapping, -1)
    assert plan.store_mapping.tolist() == stored.tolist()
    ring = np.where(positions >= 34, slot * 16 + positions % 16, -1)
    assert plan.ring_mapping.tolist() == ring.tolist()
    assert (plan.sink_mapping == -1).all()
    assert plan.seal_rows.tolist() == [slot * 16 + p % 16 for p in range(16, 20)]
    assert plan.seal_mapping.tolist() == [pages[1] * 16 + p for p in range(4)]
    assert plan.filled_pages.tolist() == pages[1:3].tolist()
    assert plan.new_pages.tolist() == pages[2:].tolist()
    rows, mapping = plan.abort_seal()
    assert rows.tolist() == plan.seal_rows.tolist()
    assert mapping.tolist() == plan.seal_mapping.tolist()


def test_sealing_starts_inside_a_page_after_a_truncation():
    tables, seq_id = filled(40, window=SIZE)
    assert tables.state(seq_id) == (40, 32, 24, 0)
    tables.truncate(seq_id, 26)
    assert tables.state(seq_id) == (26, 26, 24, 0)
    append(tables, [seq_id], 2)
    assert tables.state(seq_id) == (28, 26, 24, 0)
    plan = append(tables, [seq_id], 4)
    page = int(tables.block_table([seq_id])[0, 1])
    assert plan.seal_mapping.tolist() == [page * 16 + 10, page * 16 + 11]
    assert plan.store_mapping.tolist() == [page * 16 + p for p in range(12, 16)]
    assert tables.state(seq_id) == (32, 32, 24, 0)


def test_coverage_shrinks_by_what_was_cut_and_grows_back():
    tables, seq_id = filled(100, window=2 * SIZE)
    assert tables.state(seq_id).ring_start == 68
    tables.truncate(seq_id, 70)
    assert tables.state(seq_id) == (70, 70, 68, 0)
    tables.truncate(seq_id, 10)
    assert tables.state(seq_id) == (10, 10, 10, 0)
    append(tables, [seq_id], 5)
    assert tables.state(seq_id) == (15, 10, 10, 0)
    append(tables, [seq_id], 40)
    assert tables.state(seq_id) == (55, 48, 23, 0)


def test_an_abort_is_a_truncation_to_the_old_length():
    tables, seq_id = filled(20, window=SIZE, num_sinks=4)
    twin, twin_id = filled(20, window=SIZE, num_sinks=4)
    plan = tables.reserve([seq_id], 30)
    assert tables.abort(plan).tolist() == [4, 3]
    append(twin, [twin_id], 30)
    twin.truncate(twin_id, 20)
    assert tables.state(seq_id) == twin.state(twin_id) == (20, 20, 20, 4)
    assert tables.pool.free_ids().tolist() == twin.pool.free_ids().tolist()
    tables.check_integrity()


def test_an_abort_keeps_the_copies_of_its_step():
    tables, parent = filled(20, window=SIZE)
    fork = tables.fork(parent)
    plan = tables.reserve([fork], 1)
    tables.abort(plan)
    assert tables.pool.num_shared == 1
    assert tables.windows.num_shared == 0
    assert tables.window_slots([fork])[0] != tables.window_slots([parent])[0]
    tables.check_integrity()


def test_a_step_that_does_not_fit_takes_nothing_and_says_what_it_needs():
    tables, a = filled(20, num_pages=6)
    b = tables.fork(a)
    before = snapshot(tables)
    # Each needs two pages; one of the two copies its tail as well.
    with pytest.raises(OutOfPages) as caught:
        tables.reserve([a, b], [30, 30])
    assert (caught.value.need, caught.value.free, caught.value.total) == (5, 3, 5)
    assert before == snapshot(tables)
    plan = append(tables, [a, b], [12, 12])
    assert plan.cow_src.size == 1
    assert tables.pool.num_free == 2


def test_window_slots_that_run_out_half_way_through_a_batch_take_nothing():
    tables = PageTables(SIZE, 64, SIZE, 4, 2)
    ids = tables.open_many(3)
    before = snapshot(tables)
    with pytest.raises(OutOfWindowSlots) as caught:
        tables.reserve(ids, 5)
    assert (caught.value.need, caught.value.free, caught.value.total) == (3, 2, 2)
    assert before == snapshot(tables)
    append(tables, ids, [5, 0, 5])
    # Both slots are in use: a fork can share one, but not write.
    fork = tables.fork(int(ids[0]))
    with pytest.raises(OutOfWindowSlots):
        tables.reserve([fork], 1)
    tables.close([ids[0]])
    append(tables, [fork], 1)
    tables.check_integrity()


def test_token_arrays_can_be_read_until_the_tables_change_next():
    tables, seq_id = filled(20, window=SIZE)
    plan = append(tables, [seq_id], 3)
    tables.open()
    slots = plan.slot_mapping.tolist()
    append(tables, [seq_id], 1)
    assert plan.slot_mapping.tolist() == slots
    with pytest.raises(StepError, match="before its tables change"):
        plan.ring_mapping  # noqa: B018


def test_a_plan_does_not_change_with_the_arrays_it_was_made_from():
    tables, seq_id = filled(20)
    ids, counts = np.array([seq_id]), np.array([3])
    plan = tables.reserve(ids, counts)
    ids[0], counts[0] = 0, 7
    assert plan.seq_ids.tolist() == [seq_id]
    assert plan.positions.tolist() == [20, 21, 22]


def test_rows_and_width_grow_without_changing_what_they_hold():
    tables = PageTables(4, 4000, 4, 2, 600)
    ids = tables.open_many(5)
    append(tables, ids, [1, 9, 30, 31, 32])
    table, reads = tables.block_table(ids), tables.reads(ids, True)
    more = tables.open_many(500)
    append(tables, more, 17)
    append(tables, more[:1], 4 * 700)
    assert tables.block_table(ids).tolist() == table.tolist()
    assert all((a == b).all() for a, b in zip(tables.reads(ids, True), reads))
    tables.check_integrity()
    tables.close(more)
    tables.check_integrity()


def test_a_batch_that_was_valid_is_looked_at_again_once_a_member_closed():
    tables = PageTables(4, 40)
    ids = tables.open_many(3)
    tables.commit(tables.reserve(ids, 1))
    tables.commit(tables.reserve(ids, 1))
    tables.close(int(ids[1]))
    with pytest.raises(UnknownSequence, match=f"sequence {ids[1]} is not open"):
        tables.reserve(ids, 1)
    # Its row has a new owner now.
    (newer,) = tables.open_many(1)
    with pytest.raises(UnknownSequence):
        tables.reserve(ids, 1)
    plan = tables.reserve([ids[0], newer, ids[2]], [1, 2, 3])
    tables.commit(plan)
    assert tables.lengths([ids[0], newer, ids[2]]).tolist() == [3, 2, 5]
    with pytest.raises(ValueError, match="read-only"):
        plan.rows[0] = 7


def test_a_member_of_a_step_may_append_nothing():
    """A batch keeps its shape while some of its rows sit a step out."""
    tables = PageTables(4, 20)
    a, b = tables.open_many(2).tolist()
    tables.commit(tables.reserve([a, b], [6, 3]))
    child = tables.fork(a)
    pages = tables.block_table([a, b]).tolist()
    for counts in (0, [0, 0]):
        plan = tables.reserve([a, b], counts)
        assert (plan.num_tokens, plan.new_pages.size, plan.copy_src.size) == (0, 0, 0)
        tables.commit(plan)
    assert tables.reserve([a, b], [0, 1]).num_tokens == 1
    assert tables.lengths([a, b, child]).tolist() == [6, 4, 6]
    assert tables.block_table([a, b]).tolist() == pages
