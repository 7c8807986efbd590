"""Slots of the exact window, and the records that hold sink tokens.

A *slot* holds the ring of one sequence: ``window_tokens`` rows. Forks share it until one of them
appends, so slots are reference counted. A *record* holds the sinks; it belongs to the page of
block 0, not to a sequence: it is made with that page, shared with it, and freed with it.
"""

from __future__ import annotations

import sys

import numpy as np

from ..errors import ArgumentError, IntegrityError, OutOfWindowSlots
from .arguments import MAX_PAGES, Int32, Int64, Integers, integer, integers
from .page_pool import CountedPool


class WindowPool(CountedPool):
    """Window slots, and one sink record per page that is some sequence's block 0.

    There are as many records as slots. That is always enough while pages are shared by forks alone:
    a sequence gets a block 0 of its own only in an append, which also gives it a slot of its own.
    With prefix sharing a page keeps its record while it waits to be found again: the record rests,
    and is taken from it when another page needs one; a page may then have none.

    Parameters
    ----------
    num_slots : int
        Slots, numbered from 0; -1 stands for none in rows of tables, and is refused where slots are
        given.
    num_pages : int
        Pages of the pool the records belong to.
    """

    exhausted = OutOfWindowSlots
    noun = "window slot"

    def __init__(self, num_slots: int, num_pages: int) -> None:
        super().__init__(0, integer("num_slots", num_slots, 0, 1 << 24))
        self.num_slots = self._count
        self._records = _RecordPool(0, self._count)
        # Pages without an owner whose records rest; the one that rests longest comes first.
        self._resting: dict[int, None] = {}
        self._fenced = False
        self._record_of = np.full(integer("num_pages", num_pages, 2, MAX_PAGES), -1, np.int32)
        view = self._record_of.view()
        view.flags.writeable = False
        self._record_view = view

    @property
    def sink_record(self) -> Int32:
        """Record of each page, -1 where it has none: a read-only view, ``int32[num_pages]``."""
        return self._record_view

    @property
    def nbytes(self) -> int:
        """Bytes of what says who owns which slot and record; rows are not among them."""
        resting = sys.getsizeof(self._resting)
        return super().nbytes + self._records.nbytes + self._record_of.nbytes + resting

    @property
    def num_records_used(self) -> int:
        """Records that belong to a page."""
        return self._records.num_used

    def peek_records(self, count: int) -> Int32:
        """Return the records that `acquire_records` would take now, ``int32[count]``.

        Raises
        ------
        OutOfWindowSlots
            If fewer are free.
        """
        return self._records.peek(count)

    def acquire_records(self, pages: Integers) -> Int32:
        """Give each page a record.

        Returns
        -------
        int32[n]
            Their records.

        Raises
        ------
        ArgumentError
            If a page is out of range, given twice, or has a record.
        OutOfWindowSlots
            If fewer records are free.
        """
        array = self._pages(pages)
        if (self._record_of[array] >= 0).any() or np.unique(array).size != array.size:
            raise ArgumentError("a page can have one sink record only")
        records = self._records.acquire(array.size)
        self._record_of[array] = records
        return records

    def release_records(self, pages: Integers) -> None:
        """Take their records from pages that became free; pages without one are skipped."""
        array = self._pages(pages)
        self.wake_records(array)
        records = self._record_of[array]
        self._record_of[array] = -1
        self._records._release_row(records)

    def take_records(self, count: int, pages: Int32, kept: Int32) -> Int32:
        """Take up to ``count`` records for pages to be named by `bind_records`.

        Where too few are free, records that rest are taken from their pages: from ``pages`` first,
        which were taken for something else, then from those where they rest longest; never from
        pages in ``kept``.

        Returns
        -------
        int32[n]
            Fewer than ``count`` if no more are left.
        """
        records = self._records.acquire(min(count, self._records.num_free))
        lacking = count - records.size
        if not lacking or not self._resting:
            return records
        donors = [page for page in pages.tolist() if page in self._resting]
        others = set(donors) | set(kept.tolist())
        # Behind a fence a record of a page that is still being read must stay what it is.
        if len(donors) < lacking and not self._fenced:
            donors += [page for page in self._resting if page not in others]
        given = np.array(donors[:lacking], np.int64)
        self.wake_records(given)
        records = np.concatenate((records, self._record_of[given]))
        self._record_of[given] = -1
        return records

    def bind_records(self, pages: Int32, records: Int32) -> None:
        """Give records that were taken to pages, one each, as far as they go."""
        self._record_of[pages[: records.size]] = records

    def num_records_available(self, kept: Integers) -> int:
        """Return how many records `take_records` can give at least.

        The records that rest on pages in ``kept`` do not count.
        """
        if self._fenced or not self._resting:
            return self._records.num_free
        staying = sum(page in self._resting for page in set(self._pages(kept).tolist()))
        return self._records.num_free + len(self._resting) - staying

    def rest_records(self, pages: Int32) -> None:
        """Let the records of pages that have no owner any more rest; some may have none."""
        for page in pages[self._record_of[pages] >= 0].tolist():
            self._resting[page] = None

    def wake_records(self, pages: Int32 | Int64) -> None:
        """Let no other page take the records of pages that found an owner again."""
        if self._resting:
            for page in pages.tolist():
                self._resting.pop(page, None)

    def fence(self, epoch: int) -> None:
        """Park slots and records that are released from now on; for `Fences`."""
        super().fence(epoch)
        self._records.fence(epoch)
        self._fenced = True

    def unfence(self, oldest: int | None) -> Int32:
        """Let slots and records rejoin, see `CountedPool.unfence`; return the slots."""
        self._records.unfence(oldest)
        self._fenced = oldest is not None
        return super().unfence(oldest)

    @property
    def resting_pages(self) -> Int32:
        """Pages whose records rest, the one that rests longest first, ``int32[n]``."""
        return np.array(list(self._resting), np.int32)

    def check_integrity(self, expected_refs: Int64 | None = None) -> None:
        """Prove that slots and records are conserved; see `CountedPool.check_integrity`."""
        super().check_integrity(expected_refs)
        held = self._record_of[self._record_of >= 0]
        self._records.check_integrity(np.bincount(held, minlength=self._count))
        if np.unique(held).size != held.size:
            raise IntegrityError("two pages have the same sink record")
        if (self._record_of[self.resting_pages] < 0).any():
            raise IntegrityError("a page without a sink record counts as resting")

    def _pages(self, pages: Integers) -> Int64:
        array = integers("pages", pages)
        if array.size and (int(array.min()) < 1 or int(array.max()) >= self._record_of.size):
            worst = int(array[(array < 1) | (array >= self._record_of.size)][0])
            raise ArgumentError(f"pages must be in [1, {self._record_of.size - 1}], got {worst}")
        return array


class _RecordPool(CountedPool):
    """Sink records: as many as slots, so that running out of them means the same."""

    exhausted = OutOfWindowSlots
    noun = "sink record"
