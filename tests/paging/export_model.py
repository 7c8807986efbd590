"""A device that holds page tables and is sent nothing but what `TableExport` says has changed."""

from __future__ import annotations

import random

import numpy as np

from pagedtq.paging import TableExport


class DeviceTable:
    """Applies updates at irregular moments, for changing batches, and compares the outcome."""

    def __init__(self, tables, seed: int = 0) -> None:
        self.tables, self.random = tables, random.Random(seed)
        self.export = TableExport(tables, 1, 1)
        self.table = np.zeros(self.export.buffer.shape, np.int32)
        self.num_entries = self.num_partial = 0

    def sometimes(self, seq_ids) -> None:
        """Do nothing, or update: as before, with members gone, or in another order."""
        what = self.random.randrange(6)
        # What is on the host has no pages to export.
        ids = [i for i in seq_ids if not self.tables.is_swapped([i]).any()]
        if what == 1:
            ids = ids[: len(ids) // 2]
        elif what == 2:
            self.random.shuffle(ids)
        if what:
            self.update(ids)

    def update(self, seq_ids) -> None:
        update = self.export.update(seq_ids)
        if update.resized:
            self.table = np.zeros(self.export.buffer.shape, np.int32)
        else:
            self.num_partial += 1
        assert update.values.dtype == np.int32
        assert np.unique(update.indices).size == update.indices.size == update.values.size
        # Entries that did not change are not sent, nor rows named without one.
        assert (self.table.ravel()[update.indices] != update.values).all()
        members = update.indices // self.table.shape[1]
        assert np.array_equal(update.rows, np.unique(members))
        self.table.ravel()[update.indices] = update.values
        self.num_entries += update.values.size
        self.check(seq_ids)

    def check(self, seq_ids) -> None:
        whole = self.tables.block_table(seq_ids)
        expected = np.zeros((len(seq_ids), self.table.shape[1]), np.int32)
        expected[:, : whole.shape[1]] = whole
        assert np.array_equal(self.export.buffer, self.table)
        assert np.array_equal(self.export.block_table, expected)
        assert np.array_equal(self.export.seq_lens, self.tables.lengths(seq_ids))
        if self.random.random() < 0.7:
            for mine, full in zip(self.export.csr(), self.tables.csr(seq_ids), strict=True):
                assert mine.dtype == full.dtype == np.int32
                assert np.array_equal(mine, full)
