"""A device is sent the entries of the page tables that changed, and then holds all of them.

The machines of this folder update a `DeviceTable` between their operations; here are literal cases.
"""

from __future__ import annotations

import numpy as np
import pytest
from export_model import DeviceTable

from pagedtq.errors import ArgumentError, UnknownSequence
from pagedtq.paging import BlockHasher, PageTables, TableExport
from pagedtq.serving import BlockManager, ServedRequest


def append(tables, seq_ids, count):
    tables.commit(tables.reserve(seq_ids, count))


def open_with(tables, *lengths):
    ids = tables.open_many(len(lengths))
    append(tables, ids, list(lengths))
    return ids


def test_a_step_sends_one_entry_for_each_new_page_and_nothing_else():
    tables = PageTables(4, 40)
    ids = open_with(tables, 3, 4, 9)
    export = TableExport(tables, 4, 8)
    first = export.update(ids)
    assert first.indices.tolist() == [0, 8, 16, 17, 18]
    assert first.values.tolist() == [1, 2, 3, 4, 5]
    assert not first.resized
    append(tables, ids, 1)
    second = export.update(ids)
    assert (second.rows.tolist(), second.indices.tolist(), second.values.tolist()) == (
        [1],
        [9],
        [6],
    )
    third = export.update(ids)
    assert third.indices.size == third.rows.size == 0
    assert export.block_table.tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [2, 6, 0, 0, 0, 0, 0, 0],
        [3, 4, 5, 0, 0, 0, 0, 0],
    ]
    assert export.seq_lens.tolist() == [4, 5, 10]


def test_a_cut_sends_zeros_and_a_page_that_was_swapped_for_another_is_sent():
    tables = PageTables(4, 40)
    ids = open_with(tables, 12, 2)
    export = TableExport(tables, 2, 4)
    export.update(ids)
    tables.truncate(int(ids[0]), 5)
    assert export.update(ids).indices.tolist() == [2]
    # Cut and grown back between two updates: same length, another page.
    tables.truncate(int(ids[0]), 4)
    append(tables, ids[1:], 4)
    append(tables, ids[:1], 1)
    update = export.update(ids)
    assert update.indices.tolist() == [1, 5]
    assert np.array_equal(export.block_table[:, :2], tables.block_table(ids))


@pytest.mark.parametrize("cuts", [(5,), (5, 1), (1, 5)])
def test_what_was_cut_and_grown_back_beyond_the_old_end_is_sent_from_the_cut_on(cuts):
    tables = PageTables(4, 40)
    seq_id, other = open_with(tables, 12, 3).tolist()
    device = DeviceTable(tables)
    device.update([seq_id, other])
    for cut in cuts:
        tables.truncate(seq_id, cut)
        append(tables, [other], 4)
        append(tables, [seq_id], 20)
    device.update([seq_id, other])


def test_a_copy_on_write_sends_the_copy():
    tables = PageTables(4, 40)
    (parent,) = open_with(tables, 6).tolist()
    child = tables.fork(parent)
    export = TableExport(tables, 2, 2)
    export.update([parent, child])
    append(tables, [child], 1)
    update = export.update([parent, child])
    assert (update.indices.tolist(), update.values.tolist()) == ([3], [3])


def test_an_aborted_step_is_taken_back():
    tables = PageTables(4, 40)
    ids = open_with(tables, 4)
    export = TableExport(tables, 1, 4)
    export.update(ids)
    plan = tables.reserve(ids, 5)
    assert export.update(ids).values.tolist() == [2, 3]
    tables.abort(plan)
    assert export.update(ids).values.tolist() == [0, 0]


def test_growing_sends_the_whole_table_once():
    tables = PageTables(4, 100)
    device = DeviceTable(tables)
    ids = open_with(tables, 4, 8, 40)
    device.update(ids)
    shape = device.export.buffer.shape
    assert device.num_entries == 13
    device.update(ids)
    assert (device.num_entries, device.num_partial) == (13, 1)
    more = open_with(tables, 4)
    device.update([*ids, *more])
    assert device.num_entries == 14 + (13 if device.export.buffer.shape != shape else 0)


def test_a_member_in_anothers_place_is_compared_with_what_was_there():
    tables = PageTables(4, 40)
    ids = open_with(tables, 8, 8)
    device = DeviceTable(tables)
    device.update(ids)
    tables.close(int(ids[0]))
    before = device.num_entries
    device.update(ids[1:])
    assert device.num_entries == before + 2
    newer = open_with(tables, 12)
    device.update([*ids[1:], *newer])
    device.update([])
    device.update([*newer, *ids[1:]])


def test_two_exports_do_not_disturb_each_other():
    tables = PageTables(4, 40)
    ids = open_with(tables, 3, 4)
    one, other = TableExport(tables, 2, 4), TableExport(tables, 2, 4)
    one.update(ids)
    append(tables, ids, 1)
    assert one.update(ids).values.tolist() == [3]
    assert other.update(ids).values.tolist() == [1, 2, 3]


def test_a_batch_that_is_refused_changes_nothing():
    tables = PageTables(4, 40)
    ids = open_with(tables, 3, 4)
    export = TableExport(tables, 2, 4)
    export.update(ids)
    before = export.buffer.copy()
    with pytest.raises(UnknownSequence, match="sequence 5 is not open"):
        export.update([int(ids[0]), 5])
    assert np.array_equal(export.buffer, before)
    assert export.update(ids).indices.size == 0


@pytest.mark.parametrize("shape", [(0, 1), (1, 0)])
def test_an_empty_buffer_is_refused(shape):
    with pytest.raises(ArgumentError, match=r"must be in \[1, "):
        TableExport(PageTables(4, 8), *shape)


def test_the_one_request_calls_are_seen_as_well():
    manager = BlockManager(40, 4)
    requests = [ServedRequest(str(i), range(i + 3), BlockHasher(4)) for i in range(4)]
    device = DeviceTable(manager.tables)
    for step in range(12):
        for request in requests:
            new = request.num_tokens - request.num_computed_tokens
            assert manager.allocate_slots(request, new) is not None
            request.num_computed_tokens = request.num_tokens
            request.append_token(step)
        device.update([manager.sequence_of(request.request_id) for request in requests])
    assert device.num_partial > 6
