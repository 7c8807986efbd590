"""Allocations that fail when it is their turn, and the state that a failed call must leave."""

from __future__ import annotations

import numpy as np

from pagedtq.paging import PageTables, sequence_rows
from pagedtq.paging.page_pool import CountedPool


class Fault(MemoryError):
    """What an allocation raises when its turn has come."""


class Faults:
    """Counts allocations, and lets the one with a given number fail, or every one of those.

    Allocations are: taking pages, window slots, sink records, pages and rings of the host, and the
    arrays that hold rows and page tables.
    """

    def __init__(self, monkeypatch) -> None:
        self.count, self.fails_at, self.repeats = 0, None, False
        acquire = CountedPool.acquire

        def failing_acquire(pool, count):
            self.tick()
            return acquire(pool, count)

        monkeypatch.setattr(CountedPool, "acquire", failing_acquire)
        monkeypatch.setattr(sequence_rows, "np", self)

    def __getattr__(self, name):
        return getattr(np, name)

    def zeros(self, *shape):
        self.tick()
        return np.zeros(*shape)

    def concatenate(self, arrays):
        self.tick()
        return np.concatenate(arrays)

    def tick(self) -> None:
        self.count += 1
        if self.count == self.fails_at:
            if self.repeats:
                self.count = 0
            raise Fault

    def arm(self, number: int | None, repeats: bool = False) -> None:
        self.count, self.fails_at, self.repeats = 0, number, repeats


def logical(tables: PageTables) -> list[object]:
    """All state that means something; arrays may have grown."""
    rows = np.flatnonzero(tables._ids >= 0)
    windows, host, prefix = tables.windows, tables.host, tables.prefix
    pools = (tables.pool, windows, windows._records, host, host.rings)
    state: list[object] = [
        rows.tolist(),
        tables._fields[:, rows].tolist(),
        tables._slot[rows].tolist(),
        [np.trim_zeros(tables._table[row], "b").tolist() for row in rows],
        windows.sink_record.tolist(),
        windows.resting_pages.tolist(),
        [part.tolist() for part in tables._twins.pairs()],
        sorted(tables._swapped),
        len(tables._swaps),
        tables._num_away,
        tables._step is None,
        # The next row, of those that are there or of those that will be.
        tables._free_rows[-1] if tables._free_rows else tables._ids.size,
    ]
    for pool in pools:
        state += [pool.ref_counts.tolist(), pool.free_ids().tolist(), pool.parked_ids().tolist()]
        state.append(pool.num_shared)
    if prefix is not None:
        state += [prefix.key_of(page) for page in range(tables.pool.num_pages)]
        state.append([prefix.pages_of(key) for key in sorted(prefix._first)])
    state.append([list(tables._chains[row].keys) for row in sorted(tables._chains)])
    return state
