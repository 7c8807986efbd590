"""An engine that keeps the page tables of its batch on the device, and is sent what changed."""

from __future__ import annotations

from typing import Any

import numpy as np

from pagedtq.backends.device import Device
from pagedtq.paging import PageTables, TableExport


class EngineTable:
    """The dense table of a changing batch on a device, brought up to date by scatters."""

    def __init__(self, device: Device, tables: PageTables) -> None:
        self.device, self.export = device, TableExport(tables, 4, 4)
        self.table = device.zeros(self.export.buffer.shape, np.int32)
        self.num_resized = self.num_entries = 0

    def update(self, seq_ids: Any) -> None:
        update = self.export.update(seq_ids)
        if update.resized:
            self.num_resized += 1
            self.table = self.device.zeros(self.export.buffer.shape, np.int32)
        if update.indices.size:
            indices = self.device.upload(update.indices)
            self.table.ravel()[indices] = self.device.upload(update.values)
        self.num_entries += update.indices.size


def check_engine(device: Device, steps: int = 150) -> EngineTable:
    """Let a batch grow, fork, shrink and change members; the device always holds its table."""
    rng = np.random.default_rng(8)
    tables = PageTables(4, 400)
    engine, batch = EngineTable(device, tables), []
    for _ in range(steps):
        if len(batch) < 2 or rng.random() < 0.2:
            batch.append(tables.open())
            tables.commit(tables.reserve([batch[-1]], int(rng.integers(1, 60))))
        elif rng.random() < 0.1:
            batch.append(tables.fork(batch[0]))
        if len(batch) > 9 or rng.random() < 0.1:
            tables.close(batch.pop(int(rng.integers(len(batch)))))
        if batch and rng.random() < 0.1:
            tables.truncate(batch[-1], tables.length_of(batch[-1]) // 2)
        tables.commit(tables.reserve(batch, 1))
        engine.update(batch)
        held = device.download(engine.table)[: len(batch)]
        want = tables.block_table(batch)
        assert np.array_equal(held[:, : want.shape[1]], want)
        assert not held[:, want.shape[1] :].any()
    return engine
