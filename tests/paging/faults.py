"""Allocations that fail when it is their turn."""

from __future__ import annotations

import numpy as np

from pagedtq.paging import sequence_rows
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
