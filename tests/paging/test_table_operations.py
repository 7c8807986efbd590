"""Fork, truncate, evict, close, and what the tables answer."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import ArgumentError, EvictedError, IntegrityError, UnknownSequence
from pagedtq.paging import KeepFirstLast, PageTables, eviction

SIZE = 16


def filled(num_tokens, window=0, num_sinks=0, num_pages=200):
    tables = PageTables(SIZE, num_pages, window, num_sinks, 8)
    seq_id = tables.open()
    tables.commit(tables.reserve([seq_id], num_tokens))
    return tables, seq_id


def test_ids_are_never_used_again_and_rows_are():
    tables, other = PageTables(SIZE, 10), PageTables(SIZE, 10)
    seen = set()
    for _ in range(50):
        seq_id = tables.open()
        assert seq_id not in seen
        seen.add(seq_id)
        tables.close([seq_id])
        with pytest.raises(UnknownSequence):
            tables.lengths([seq_id])
    assert tables._ids.size == 16
    mine, theirs = tables.open(), other.open()
    for tables_, foreign in ((tables, theirs), (other, mine)):
        with pytest.raises(UnknownSequence, match=f"sequence {foreign} is not open here"):
            tables_.state(foreign)
        with pytest.raises(UnknownSequence):
            tables_.lengths([foreign])


def test_no_id_is_known_to_tables_without_sequences():
    tables = PageTables(SIZE, 10)
    for seq_id in (0, -1, 15, (1 << 24) - 1, -(1 << 24), (1 << 62)):
        with pytest.raises(UnknownSequence):
            tables.lengths([seq_id])
        with pytest.raises(UnknownSequence):
            tables.state(seq_id)


def test_queries_accept_a_sequence_twice_and_an_empty_batch():
    tables, seq_id = filled(20)
    assert tables.lengths([seq_id, seq_id]).tolist() == [20, 20]
    assert tables.block_table([]).shape == (0, 0)
    assert tables.csr([]).kv_indptr.tolist() == [0]
    assert tables.reads([], True).kv_lens.size == 0


def test_a_fork_of_an_empty_sequence_is_empty():
    tables = PageTables(SIZE, 10, SIZE, 4, 2)
    child = tables.fork(tables.open())
    assert tables.state(child) == (0, 0, 0, 0)
    assert tables.window_slots([child]).tolist() == [-1]
    assert tables.sink_records([child]).tolist() == [-1]


def test_truncation_returns_the_last_pages_first():
    tables, seq_id = filled(70)
    assert tables.truncate(seq_id, 17).tolist() == [5, 4, 3]
    assert tables.truncate(seq_id, 17).tolist() == []
    assert tables.truncate(seq_id, 16).tolist() == [2]
    assert tables.truncate(seq_id, 0).tolist() == [1]
    assert tables.block_table([seq_id]).shape == (1, 0)


def test_truncating_a_fork_frees_only_what_it_owns_alone():
    tables, seq_id = filled(40)
    fork = tables.fork(seq_id)
    tables.commit(tables.reserve([fork], 20))
    assert tables.truncate(fork, 5).size == 2
    assert tables.lengths([seq_id, fork]).tolist() == [40, 5]
    # Its tail is a page of the other again: the next append copies it.
    plan = tables.reserve([fork], 1)
    assert plan.copy_src.tolist() == [1]


def test_truncation_inside_an_evicted_block_is_refused_and_at_its_ends_is_not():
    tables, seq_id = filled(70)
    tables.evict(seq_id, [1, 2])
    for length in (17, 31, 33, 47):
        with pytest.raises(EvictedError, match="was evicted"):
            tables.truncate(seq_id, length)
    tables.truncate(seq_id, 48)
    assert tables.resident_tokens == 16
    tables.truncate(seq_id, 32)
    tables.check_integrity()
    tables.commit(tables.reserve([seq_id], 1))
    assert tables.block_table([seq_id])[0].tolist()[1] == 0
    tables.truncate(seq_id, 3)
    assert tables.resident_tokens == 3
    tables.check_integrity()


def test_an_evicted_block_becomes_the_null_page_and_nothing_moves():
    tables, seq_id = filled(100, window=SIZE, num_sinks=4)
    before = tables.block_table([seq_id])[0].tolist()
    freed = tables.evict(seq_id, [3, 1])
    assert freed.tolist() == [before[3], before[1]]
    assert tables.block_table([seq_id])[0].tolist() == [1, 0, 3, 0, 5, 6, 7]
    assert tables.slots_of(seq_id, [15, 16, 31, 32]).tolist() == [31, -1, -1, 48]
    assert tables.resident_tokens == tables.resident_lengths([seq_id])[0] == 68
    assert tables.state(seq_id) == (100, 96, 84, 4)
    indptr, indices, last, positions = tables.csr([seq_id, seq_id])
    assert indptr.tolist() == [0, 5, 10]
    assert indices.tolist() == [1, 3, 5, 6, 7] * 2
    assert last.tolist() == [4, 4]
    assert positions.tolist() == [0, 32, 64, 80, 96] * 2
    assert {array.dtype for array in (indptr, indices, last, positions)} == {np.dtype(np.int32)}


def test_a_block_can_go_when_the_ring_has_left_it_and_not_a_token_earlier():
    tables, seq_id = filled(47, window=SIZE)
    assert tables.state(seq_id).ring_start == 31
    with pytest.raises(ArgumentError, match="block 1 ends at 32, inside the exact window"):
        tables.evict(seq_id, [1])
    tables.commit(tables.reserve([seq_id], 1))
    assert tables.evict(seq_id, [1]).size == 1
    tables.check_integrity()


def test_the_compressed_form_has_the_last_page_length_of_what_is_left():
    tables, a = filled(48)
    b = tables.open()
    tables.evict(a, [2])
    assert tables.csr([b, a]).kv_last_page_len.tolist() == [0, 16]
    tables.evict(a, [0, 1])
    assert tables.csr([b, a]).kv_last_page_len.tolist() == [0, 0]
    assert tables.resident_tokens == 0


def test_without_block_0_there_are_no_sinks():
    tables, seq_id = filled(40, window=SIZE, num_sinks=4)
    fork = tables.fork(seq_id)
    assert tables.reads([seq_id], True).first.tolist() == [4]
    assert tables.evict(seq_id, [0]).size == 0
    assert tables.reads([seq_id, fork], True).first.tolist() == [0, 4]
    assert tables.sink_records([seq_id, fork]).tolist() == [-1, 0]
    tables.commit(tables.reserve([seq_id], 40))
    assert tables.state(seq_id).num_sinks == 0
    tables.truncate(seq_id, 0)
    tables.commit(tables.reserve([seq_id], 2))
    assert tables.state(seq_id).num_sinks == 2
    tables.check_integrity()


def test_reads_split_a_sequence_into_sinks_body_and_ring():
    tables, seq_id = filled(100, window=2 * SIZE, num_sinks=4)
    young = tables.open()
    tables.commit(tables.reserve([young], 3))
    overlay = tables.reads([seq_id, young], overlay=True)
    assert [field.tolist() for field in overlay] == [[100, 3], [4, 0], [68, 0], [0, 0], [0, 0]]
    pages_only = tables.reads([seq_id, young], overlay=False)
    assert [field.tolist() for field in pages_only] == [[100, 3], [0, 0], [100, 3], [0, 0], [0, 0]]
    assert {field.dtype for field in overlay} == {np.dtype(np.int64)}
    # Cut below the sinks' end: no position may be both a sink and in the ring.
    tables.truncate(seq_id, 2)
    tables.commit(tables.reserve([seq_id], 1))
    reads = tables.reads([seq_id], overlay=True)
    assert (reads.first.tolist(), reads.stop.tolist()) == ([2], [2])


def test_without_a_window_overlay_layers_read_pages_too():
    tables, seq_id = filled(20)
    for overlay in (False, True):
        reads = tables.reads([seq_id], overlay)
        assert [int(field[0]) for field in reads] == [20, 0, 20, 0, 0]


def test_closing_several_sequences_returns_shared_pages_once():
    tables, a = filled(20, window=SIZE, num_sinks=2)
    b = tables.fork(a)
    assert sorted(tables.close([a, b]).tolist()) == [1, 2]
    assert tables.num_sequences == 0
    assert tables.windows.num_used == 0
    tables.check_integrity()


@pytest.mark.parametrize(
    ("length", "window", "first", "last", "expected"),
    [
        # (blocks, keep, start), pages of 16 tokens
        (100, 0, 4, 40, ([1, 2], 4, 60)),
        (100, 0, 0, 40, ([0, 1, 2], 0, 60)),
        (100, 0, 16, 36, ([1, 2, 3], 16, 64)),
        (100, 0, 17, 37, ([2], 17, 63)),
        (100, 0, 4, 0, ([1, 2, 3, 4, 5], 4, 100)),
        (96, 0, 0, 0, ([0, 1, 2, 3, 4, 5], 0, 96)),
        (100, 16, 4, 0, ([1, 2, 3, 4], 4, 84)),
        (100, 32, 4, 20, ([1, 2, 3], 4, 68)),
        (100, 0, 4, 96, ([], 0, 0)),
        (100, 0, 4, 95, ([], 4, 5)),
        (100, 0, 200, 0, ([], 0, 0)),
        (10, 16, 0, 0, ([], 0, 0)),
        (0, 16, 4, 4, ([], 0, 0)),
    ],
)
def test_keep_first_last_drops_blocks_wholly_unread(length, window, first, last, expected):
    tables, seq_id = filled(length, window, 4 if window else 0)
    plan = KeepFirstLast(first, last).plan(tables, seq_id)
    assert (plan.blocks.tolist(), plan.keep, plan.start) == expected
    freed = eviction.apply(tables, plan)
    assert freed.size == len(expected[0])
    reads = tables.reads([seq_id], True)
    assert (int(reads.keep[0]), int(reads.start[0])) == expected[1:]
    again = KeepFirstLast(first, last).plan(tables, seq_id)
    assert (again.blocks.tolist(), again.keep, again.start) == ([], *expected[1:])
    tables.check_integrity()


def test_a_boundary_moves_back_with_a_truncation():
    tables, seq_id = filled(100)
    tables.set_start(seq_id, 4, 60)
    fork = tables.fork(seq_id)
    tables.truncate(seq_id, 50)
    reads = tables.reads([seq_id, fork], True)
    assert reads.keep.tolist() == [4, 4]
    assert reads.start.tolist() == [50, 60]
    tables.truncate(seq_id, 2)
    reads = tables.reads([seq_id], True)
    assert (reads.keep.tolist(), reads.start.tolist()) == ([2], [2])


def test_a_stale_eviction_plan_is_refused_as_a_whole():
    tables, seq_id = filled(100)
    plan = KeepFirstLast(4, 20).plan(tables, seq_id)
    tables.truncate(seq_id, 60)
    before = tables.block_table([seq_id]).tolist()
    with pytest.raises(ValueError, match="block"):
        eviction.apply(tables, plan)
    assert tables.block_table([seq_id]).tolist() == before
    assert tables.reads([seq_id], True).start.tolist() == [0]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t._length.__setitem__(0, 30), "c <= L"),
        (lambda t: t._coded.__setitem__(0, 31), "not coded"),
        (lambda t: t._ring_start.__setitem__(0, 10), "L - r <= W"),
        (lambda t: t._ring_start.__setitem__(0, 33), "r <= c"),
        (lambda t: t._sinks.__setitem__(0, 5), "breaks s"),
        (lambda t: t._start.__setitem__(0, 40), "start <= r"),
        (lambda t: t._table.__setitem__((0, 3), 2), "behind its last block"),
        (lambda t: t._table.__setitem__((0, 1), 0), "not evicted"),
        (lambda t: t._table.__setitem__((0, 1), 1), "twice"),
        (lambda t: t._table.__setitem__((0, 1), 7), "holds? it|hold it|no owner"),
        (lambda t: t._slot.__setitem__(0, -1), "no slot"),
        (lambda t: t._slot.__setitem__(0, 3), "window slot"),
        (lambda t: t.windows._record_of.__setitem__(1, -1), "sink record"),
        (lambda t: t._keep.__setitem__(5, 1), "free but not empty"),
        (lambda t: t._ids.__setitem__(5, 7), "open or free"),
        (lambda t: t._evicted.__setitem__(0, 1), "not evicted"),
        (lambda t: t._length.__setitem__(0, -1), "negative"),
    ],
)
def test_integrity_finds_each_kind_of_damage(damage, message):
    tables, _ = filled(40, window=SIZE, num_sinks=4)
    tables.check_integrity()
    damage(tables)
    with pytest.raises(IntegrityError, match=message):
        tables.check_integrity()


def test_integrity_finds_the_page_of_a_block_that_is_still_needed():
    tables, seq_id = filled(40, window=SIZE, num_sinks=4)
    row = tables._row_of(seq_id)
    tables.pool.release(tables._table[row, 1:2])
    tables._table[row, 1], tables._evicted[row] = 0, 1
    with pytest.raises(IntegrityError, match="open or in the ring"):
        tables.check_integrity()
