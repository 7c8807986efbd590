"""Which cached pages are kept longest: priorities with an end, and pins.

Without it the free queue is the policy: pages are reused least recently freed first, whatever they
hold. With it pages can be given priorities from 0 to 100, 35 where nothing is said (the scale and
the default of TensorRT-LLM's retention): lower ones are reused first, equal ones in the old order.
A priority may end some time after its page lost its last owner; the page then counts as freed at
that moment. A pin is an owner: a pinned page is not free, so nothing reuses or evicts it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ArgumentTypeError, PinLimit
from .arguments import Bools, Int32, Integers, instance, integer, integers, real
from .candidates import sealed_blocks
from .exclusive import exclusive, take_turn
from .page_scores import PageScores
from .page_tables import PageTables
from .retained_queue import DEFAULT_PRIORITY, HIGHEST_PRIORITY, queue_over


class Retention:
    """Priorities and pins over the pages of tables that share prefixes.

    Making one attaches it; there is one per tables. It lives as long as they do and is not part of
    a snapshot. Whatever changes it takes the turn of the tables.

    Parameters
    ----------
    tables : PageTables
        Tables with ``sharing``; no step is open.
    max_pinned_share : float
        Part of the pool's pages that may be pinned, 0 to 1.
    clock : callable
        Returns seconds and never runs backwards; a simulation passes its own.

    Attributes
    ----------
    max_pinned : int
        Pages that may be pinned.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the tables share nothing or have a retention already, the share is out of range, or the
        clock cannot be called.
    ConcurrentCallError
        If another call is at work in the tables; as from every method that changes something.
    """

    def __init__(
        self,
        tables: PageTables,
        max_pinned_share: float = 0.2,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if instance("tables", tables, PageTables).prefix is None:
            raise ArgumentError("retention is about pages that can be found again: needs sharing")
        max_pinned_share = real("max_pinned_share", max_pinned_share, 0, 1)
        if not callable(clock):
            raise ArgumentTypeError(f"clock must be callable, got {type(clock).__name__}")
        pool = tables.pool
        self._tables, self._turn = tables, tables.turn
        self.max_pinned = int(max_pinned_share * (pool.num_pages - 1))
        self._pinned = np.zeros(pool.num_pages, np.bool_)
        take_turn(self._turn, "attach a retention")
        try:
            if tables.retention is not None:
                raise ArgumentError("these tables have a retention already")
            self._queue = queue_over(1, pool.num_pages - 1, pool.free_ids(), clock)
            # `refresh` for steps, which have the turn.
            self._refresh = self._queue.refresh
            pool.use_queue(self._queue)
            tables.retention = self
        finally:
            self._turn.append(None)

    @property
    def pinned(self) -> Bools:
        """Whether each page is pinned, ``bool[num_pages]``; not to be written."""
        return self._pinned

    @property
    def num_pinned(self) -> int:
        """Pages that are pinned."""
        return int(np.count_nonzero(self._pinned))

    @property
    def priorities(self) -> npt.NDArray[np.int8]:
        """Priority of each page, ``int8[num_pages]``; not to be written."""
        return self._queue.priority

    @exclusive
    def refresh(self) -> None:
        """Let priorities end whose time is over; every step begins with it."""
        self._refresh()

    @exclusive
    def keep(
        self,
        seq_id: int,
        priority: int,
        start: int = 0,
        stop: int | None = None,
        seconds: float | None = None,
    ) -> int:
        """Give the pages of a range of tokens a priority.

        It belongs to the pages, so to everybody who shares them, until they are reused.

        Parameters
        ----------
        seq_id : int
            The sequence.
        priority : int
            0 (reuse first) to 100 (reuse last); 35 is that of all other pages.
        start, stop : int
            Tokens ``[start, stop)``, to the end by default; every resident block that holds one.
        seconds : float, optional
            How long it lasts once a page has no owner any more; for ever by default.

        Returns
        -------
        int
            Pages that were given the priority.

        Raises
        ------
        UnknownSequence, ArgumentError, ArgumentTypeError
            For a bad id, range, priority or time.
        """
        priority = integer("priority", priority, 0, HIGHEST_PRIORITY)
        lifetime = np.inf
        if seconds is not None:
            lifetime = real("seconds", seconds, 0)
        pages = self._range(seq_id, start, stop)
        pages = pages[pages > 0]
        self._queue.set_priority(pages, np.zeros(pages.size, np.bool_), priority, lifetime)
        return int(pages.size)

    @exclusive
    def pin(self, seq_id: int, start: int = 0, stop: int | None = None) -> Int32:
        """Pin the pages of a range of tokens; those that are pinned already stay so.

        Parameters
        ----------
        seq_id, start, stop
            As for `keep`.

        Returns
        -------
        int32[n]
            Pages that were not pinned before, for `unpin`.

        Raises
        ------
        ArgumentError
            If a block of the range was evicted, or is not published: a pin keeps what can be found.
        PinLimit
            If more pages would be pinned than may be.
        UnknownSequence, ArgumentTypeError
            For a bad id or range.
        """
        pages = self._range(seq_id, start, stop)
        first = integer("start", start, 0) // self._tables.page_size
        assert self._tables.prefix is not None
        lost = np.flatnonzero(~self._tables.prefix.held[pages])
        if lost.size:
            block = first + int(lost[0])
            raise ArgumentError(f"sequence {seq_id}: block {block} cannot be found, so not pinned")
        return self._pin(pages)

    @exclusive
    def pin_pages(self, pages: Integers) -> Int32:
        """Pin pages that hold a block, owned or not (as `PrefixIndex.longest` finds them).

        Returns
        -------
        int32[n]
            Those that were not pinned before.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If a page is out of range or holds no block.
        PinLimit
            If more pages would be pinned than may be.
        """
        return self._pin(self._checked(pages))

    @exclusive
    def unpin(self, pages: Integers) -> Int32:
        """Take the pins from pages; those without one are skipped.

        Returns
        -------
        int32[n]
            Pages that have no owner any more; they join the free queue in the order given.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If a page is out of range.
        """
        return self._unpin(self._checked(pages))

    def _forget(self, pages: Int32) -> None:
        """Take pins and priorities from pages that hold no block any more.

        For the tables, which have the turn then.
        """
        self._unpin(pages)
        special = pages[self.priorities[pages] != DEFAULT_PRIORITY]
        waiting = self._tables.pool.ref_counts[special] == 0
        self._queue.set_priority(special, waiting, DEFAULT_PRIORITY)

    def _pin(self, array: Int32) -> Int32:
        """Do what `pin_pages` does, of distinct pages in range."""
        tables = self._tables
        assert tables.prefix is not None
        without = array[~tables.prefix.held[array]]
        if without.size:
            raise ArgumentError(f"page {int(without[0])} holds no block that can be found")
        fresh = array[~self._pinned[array]]
        have = self.num_pinned
        if have + fresh.size > self.max_pinned:
            raise PinLimit(fresh.size, self.max_pinned - have, self.max_pinned)
        tables.pool.touch(fresh)
        tables.windows.wake_records(fresh)
        self._pinned[fresh] = True
        return fresh

    def _unpin(self, array: Int32) -> Int32:
        """Do what `unpin` does, of distinct pages in range."""
        held = array[self._pinned[array]]
        if not held.size:
            return held
        self._pinned[held] = False
        return self._tables._release_pages(held)

    def _checked(self, pages: Integers) -> Int32:
        """Return distinct pages in the order given."""
        array = integers("pages", pages)
        if array.size and not 0 < int(array.min()) <= int(array.max()) < self._pinned.size:
            worst = int(array[(array < 1) | (array >= self._pinned.size)][0])
            raise ArgumentError(f"pages must be in [1, {self._pinned.size - 1}], got {worst}")
        _, first = np.unique(array, return_index=True)
        return array[np.sort(first)].astype(np.int32)

    def _range(self, seq_id: int, start: int, stop: int | None) -> Int32:
        """Return the pages of the blocks that hold a token of a range, 0 where evicted."""
        tables = self._tables
        length = int(tables.lengths(np.array([tables.checked_id(seq_id)]))[0])
        stop = length if stop is None else integer("stop", stop, 0, length)
        start = integer("start", start, 0, stop)
        if start == stop:
            return np.empty(0, np.int32)
        size = tables.page_size
        return tables.block_table(np.array([seq_id]))[0, start // size : -(-stop // size)]


@dataclass(frozen=True, slots=True)
class ByPriority:
    """Blocks of live sequences go by the priority of their pages, the earlier ones first.

    Parameters
    ----------
    retention : Retention
        Knows the priorities. Pinned pages never go.
    """

    retention: Retention

    def __post_init__(self) -> None:
        instance("retention", self.retention, Retention)

    def score(self, tables: PageTables, seq_ids: Integers) -> PageScores:
        """Score a block by its page's priority; see `PageRanking`.

        Raises
        ------
        ArgumentError
            If the retention belongs to other tables.
        """
        if tables.retention is not self.retention:
            raise ArgumentError("this retention belongs to other tables")
        ids, found = integers("seq_ids", seq_ids), sealed_blocks(tables, seq_ids)
        return PageScores(ids, found, self.retention.priorities[found.pages].astype(np.float64))
