"""What a step sends to the device: what changed, at addresses that stay, and what lies near it."""

from __future__ import annotations

import sys

import fake_cupy
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedtq import CacheConfig
from pagedtq.backends import cupy_device
from pagedtq.backends.cuda_reads import StepReads
from pagedtq.backends.cupy_device import CupyDevice
from pagedtq.backends.packed_upload import PackedUpload
from pagedtq.errors import ArgumentError, ArgumentTypeError
from pagedtq.paging import PageTables

FIELDS = {
    "table": ((40, 1000), np.int32),
    "starts": ((41,), np.int32),
    "reads": ((5, 40), np.int64),
}
TABLE_BYTES = 40 * 1000 * 4


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.make())
    monkeypatch.setattr(cupy_device, "missing_cuda", lambda: None)
    return CupyDevice()


def copies(device):
    """Bytes of each copy since the last call."""
    stream = device.xp.cuda.get_current_stream()
    sizes, stream.copies = stream.copies, []
    return sizes


def test_a_row_of_a_large_table_travels_without_the_others(device):
    upload = PackedUpload(device, FIELDS)
    upload.host["table"][...] = np.arange(40_000).reshape(40, 1000) + 1
    upload.send(upload.changed())
    assert copies(device) == [TABLE_BYTES]
    upload.host["table"][3, 500] = 7
    upload.host["reads"][0] = 9
    assert upload.changed() == [(14_000, 14_008), (TABLE_BYTES + 176, TABLE_BYTES + 176 + 320)]
    upload.send(upload.changed())
    assert copies(device) == [8, 320]
    assert upload.changed() == []
    for name, host in upload.host.items():
        assert np.array_equal(upload.device[name], host)


def test_changes_that_lie_near_each_other_travel_together(device):
    upload = PackedUpload(device, FIELDS)
    upload.host["table"][[1, 5, 17], 0] = 3
    # 16 000 bytes apart are near, 48 000 too; 92 000 are not.
    upload.host["table"][39, 999] = 3
    upload.send(upload.changed())
    assert copies(device) == [16 * 4000 + 8, 8]


@given(st.lists(st.tuples(st.integers(0, 39), st.integers(0, 999), st.integers(0, 3)), max_size=8))
def test_the_device_holds_what_was_written_whatever_changed(changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cupy", fake_cupy.make())
        patch.setattr(cupy_device, "missing_cuda", lambda: None)
        upload = PackedUpload(CupyDevice(), FIELDS)
        for row, block, value in changes:
            upload.host["table"][row, block] = value
            upload.host["reads"][row % 5, row] += value
            spans = upload.changed()
            assert bool(spans) == bool(value) or value == 0
            upload.send(spans)
            for name, host in upload.host.items():
                assert np.array_equal(upload.device[name], host)


def test_a_decode_step_sends_the_lengths_and_the_rows_that_began_a_page(device):
    """256 sequences, 256 kB of tables: four neighbours begin a page, the rest only grow."""
    batch, width = 256, 256
    config = CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=64, num_pages=14_000, window=0, page_size=64
    )
    tables = PageTables(64, 14_000)
    ids = tables.open_many(batch)
    tables.commit(tables.reserve(ids, 3000 + np.arange(batch) // 4))
    reads = StepReads(device, config, batch, batch, width, 0)
    addresses = {name: array.ctypes.data for name, array in reads.on.items()}
    copies(device)
    few = 0
    for _ in range(70):
        tables.commit(tables.reserve(ids, 1))
        table, ranges = tables.block_table(ids), tables.reads(ids, False)
        version = reads.version
        reads.update(table, ranges, None, None)
        assert reads.version == version + 1
        sent = copies(device)
        # Lengths lie behind the table: far from the rows that changed, or near them.
        few += sum(sent) < 20_000
        assert len(sent) <= 2
        if version:
            assert sum(sent) < 20_000 + (64 << 10)
        assert np.array_equal(reads.on["table"][:, : table.shape[1]], table)
        assert np.array_equal(reads.on["reads"], np.stack(ranges))
        reads.update(table, ranges, None, None)
        assert (reads.version, copies(device)) == (version + 1, [])
    assert few > 35
    assert addresses == {name: array.ctypes.data for name, array in reads.on.items()}


def two_sequences(device):
    """Return tables with two sequences of two pages, their ids, and what reads them."""
    config = CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=64, num_pages=9, window=0, page_size=16
    )
    tables = PageTables(16, 9)
    ids = tables.open_many(2)
    tables.commit(tables.reserve(ids, 20))
    reads = StepReads(device, config, 2, 2, 4, 0)
    return tables, ids, reads


def test_a_table_that_is_refused_is_not_sent(device):
    tables, ids, reads = two_sequences(device)
    ranges = tables.reads(ids, False)
    reads.update(tables.block_table(ids), ranges, None, None)
    copies(device)
    with pytest.raises(ArgumentError, match=r"pages must be in \[0, 8\], got 9"):
        reads.update(np.full((2, 2), 9, np.int32), ranges, None, None)
    assert (copies(device), reads.version) == ([], 1)
    reads.update(tables.block_table(ids), ranges, None, None)
    assert copies(device) == []


def test_window_slots_are_looked_at_although_their_bytes_did_not_change(device):
    config = CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=64, num_pages=9, window=16, page_size=16,
        num_window_slots=4,
    )  # fmt: skip
    tables = PageTables(16, 9, window_tokens=16, num_window_slots=4)
    ids = tables.open_many(2)
    tables.commit(tables.reserve(ids, 20))
    reads, table, ranges = (
        StepReads(device, config, 2, 2, 4, 0), tables.block_table(ids), tables.reads(ids, True)
    )  # fmt: skip
    reads.update(table, ranges, None, None)
    nowhere = np.full(2, -1, np.int32)
    # As none they were sent already.
    with pytest.raises(ArgumentError, match=r"window_slots must not be -1 where exact rows"):
        reads.update(table, ranges, None, (nowhere, nowhere))
    assert not reads.has_window
    reads.update(table, ranges, None, (tables.window_slots(ids), nowhere))
    assert reads.has_window


def test_counts_that_a_plan_has_no_room_for_are_refused(device):
    tables, ids, reads = two_sequences(device)
    table, ranges = tables.block_table(ids), tables.reads(ids, False)
    with pytest.raises(ArgumentError, match=r"q_lens\[1\] must be in \[0, .*got -1"):
        reads.update(table, ranges, np.array([3, -1]), None)
    with pytest.raises(ArgumentTypeError, match="q_lens must be integers, got dtype float64"):
        reads.update(table, ranges, np.ones(2), None)
    with pytest.raises(
        ArgumentError,
        match="for 2 sequences, 2 query tokens and at most 4 blocks, got 2, 3 and 2",
    ):
        reads.update(table, ranges, [2, 1], None)
    assert (copies(device), reads.version, reads.reads) == ([], 0, None)
