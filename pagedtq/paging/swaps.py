"""Swapping: whole sequences leave the device for the host tier, and come back.

A swap is begun, then its bytes are copied (`SwapPlan` says which), then it is committed or aborted;
meanwhile other sequences can step, and several swaps can be under way. Whatever either side needs
is taken when the swap begins, all of it or nothing, and given back when it ends: pages that are
copied from are never used for anything else in between.

What is shared stays shared. Pages that others hold stay with them, and pages that hold a published
block can still be found, while copies of them are on the host. Sequences that leave together share
the host's pages as they shared the device's; one that follows later uses the copies that are there.
On the way back a page is not copied if the device still has its bytes (see `Twins`), or holds the
same published block; blocks that could be found before can be found again.
"""

from __future__ import annotations

import numpy as np

from ..errors import ArgumentError, OutOfHostPages, OutOfPages, OutOfWindowSlots, StepError
from .arguments import Int32, Int64, Integers
from .sequence_rows import AWAY, LEAVING, RETURNING
from .swap_plan import SwappedRow, SwapPlan
from .swapped_rows import NO_PAGES, SwappedRows


class Swaps(SwappedRows):
    """Beginning to move sequences between the tiers."""

    def begin_swap_out(self, seq_ids: Integers) -> SwapPlan:
        """Begin to move sequences to the host; all of them or none.

        Until `commit_swap` they keep their pages and can be read, but not changed.

        Parameters
        ----------
        seq_ids : integers [B]
            Sequences, each at most once. Those that share pages share their copies.

        Raises
        ------
        UnknownSequence, ArgumentError, ArgumentTypeError
            For bad ids.
        SwappedError
            If one is swapped out already.
        StepError
            If a step is open, or a sequence is being swapped.
        OutOfHostPages
            If the host has no room.
        """
        self._refuse_open_step("begin_swap_out")
        rows = self._resident_rows(seq_ids, "swap out")
        member, block = self._places(rows)
        entries = self._table[rows[member], block]
        held = np.flatnonzero(entries)
        pages, inverse = _in_order(entries[held])
        known = self._twins.hosts_of(pages)
        # A twin whose bytes are shorter than the block would not do; only full blocks have one.
        fresh = known == 0
        need = int(np.count_nonzero(fresh))
        if need > self.host.num_free:
            raise OutOfHostPages(need, self.host.num_free, self.host.num_pages)
        slots, row_rings = _numbered(self._slot[rows])
        if slots.size > self.host.rings.num_free:
            raise OutOfWindowSlots(slots.size, self.host.rings.num_free, self.host.num_pages)
        host_pages = known.copy()
        taken, rings = self._take_host(need, slots.size)
        # Nothing fails from here on.
        self.version += 1
        host_pages[fresh] = taken
        owners = np.bincount(inverse, minlength=pages.size)
        self.host.retain(np.repeat(host_pages, owners - fresh))
        self.host.rings.retain(np.repeat(rings, _owners(row_rings, rings.size) - 1))
        if self.prefix is not None:
            self._host_tokens[taken] = self._page_tokens[pages[fresh]]
        entry_host_pages = np.zeros_like(entries)
        entry_host_pages[held] = host_pages[inverse]
        first = np.flatnonzero((block == 0) & (entries > 0))
        sink_pages, counts = self._sinks_of(rows[member[first]], entries[first])
        plan = SwapPlan(
            direction="out",
            seq_ids=self._ids[rows],
            pages=pages[fresh],
            host_pages=taken,
            window_slots=slots,
            rings=rings,
            ring_spans=self._spans(rows, row_rings, slots.size),
            sink_records=self.windows.sink_record[sink_pages],
            sink_host_pages=_looked_up(pages, host_pages, sink_pages),
            num_sinks=counts,
            num_reused=pages.size - need,
            _rows=rows,
            _entry_pages=entries,
            _entry_host_pages=entry_host_pages,
            _row_slots=self._slot[rows],
            _row_rings=np.append(rings, np.int32(-1))[row_rings],
        )
        return self._begin(plan, LEAVING)

    def begin_swap_in(self, seq_ids: Integers) -> SwapPlan:
        """Begin to bring sequences back to the device; all of them or none.

        They can be used again after `commit_swap`. Each takes a window slot, if it had one.

        Parameters
        ----------
        seq_ids : integers [B]
            Sequences that are swapped out, each at most once.

        Raises
        ------
        UnknownSequence, ArgumentError, ArgumentTypeError
            For bad ids, or if one is not swapped out.
        StepError
            If a step is open, or a sequence is being swapped.
        OutOfPages, OutOfWindowSlots
            If the device has no room.
        """
        self._refuse_open_step("begin_swap_in")
        rows = self._distinct_rows(seq_ids)
        self._require_swapped(rows)
        left = [self._swapped[row] for row in rows.tolist()]
        member, block = self._places(rows)
        entries = np.concatenate([*(row.host_pages for row in left), NO_PAGES])
        held = np.flatnonzero(entries)
        host_pages, inverse = _in_order(entries[held])
        place = held[_first_places(inverse, host_pages.size)]
        known = self._still_here(rows, left, host_pages, member[place], block[place])
        fresh = known == 0
        need = int(np.count_nonzero(fresh)) + self.pool.num_leaving(known[~fresh])
        if need > self.pool.num_free:
            raise OutOfPages(need, self.pool.num_free, self.pool.num_pages - 1)
        rings, row_slots = _numbered(np.array([row.ring for row in left], np.int32))
        if rings.size > self.windows.num_free:
            raise OutOfWindowSlots(rings.size, self.windows.num_free, self.windows.num_slots)
        first = np.flatnonzero((block == 0) & (entries > 0))
        sink_hosts, counts = self._sinks_of(rows[member[first]], entries[first])
        copied = _looked_up(host_pages, known, sink_hosts) == 0
        sink_hosts, counts = sink_hosts[copied], counts[copied]
        num_records = self.windows.num_records_available(known[~fresh])
        if sink_hosts.size > num_records:
            raise OutOfWindowSlots(sink_hosts.size, num_records, self.windows.num_slots)
        self._grow_width(max((row.host_pages.size for row in left), default=0))
        owners = np.bincount(inverse, minlength=host_pages.size)
        found = np.repeat(known[~fresh], owners[~fresh])
        taken, slots, records = self._take_beside(
            found, int(np.count_nonzero(fresh)), rings.size, sink_hosts.size
        )
        # Nothing fails from here on.
        self.version += 1
        pages = known.copy()
        pages[fresh] = taken
        self.pool.retain(np.repeat(taken, owners[fresh] - 1))
        self.windows.retain(np.repeat(slots, _owners(row_slots, rings.size) - 1))
        self.windows.bind_records(_looked_up(host_pages, pages, sink_hosts), records)
        entry_pages = np.zeros_like(entries)
        entry_pages[held] = pages[inverse]
        plan = SwapPlan(
            direction="in",
            seq_ids=self._ids[rows],
            pages=taken,
            host_pages=host_pages[fresh],
            window_slots=slots,
            rings=rings,
            ring_spans=self._spans(rows, row_slots, rings.size),
            sink_records=records,
            sink_host_pages=sink_hosts,
            num_sinks=counts,
            num_reused=pages.size - taken.size,
            _rows=rows,
            _entry_pages=entry_pages,
            _entry_host_pages=entries,
            _row_slots=np.append(slots, np.int32(-1))[row_slots],
            _row_rings=np.array([row.ring for row in left], np.int32),
        )
        return self._begin(plan, RETURNING)

    def _take_beside(
        self, found: Int32, num_pages: int, num_slots: int, num_records: int
    ) -> tuple[Int32, Int32, Int32]:
        """Own pages that are found, and take what else is needed: all of it, or nothing."""
        self.pool.touch(found)
        try:
            taken = self._take(num_pages, num_slots, num_records, found)
        except BaseException:
            self.pool.untouch(found)
            raise
        self.windows.wake_records(found)
        return taken

    def _take_host(self, num_pages: int, num_rings: int) -> tuple[Int32, Int32]:
        """Take pages and rings of the host: all of them, or nothing."""
        pages = self.host.acquire(num_pages)
        try:
            return pages, self.host.rings.acquire(num_rings)
        except BaseException:
            self.host.put_back(pages)
            raise

    def _require_swapped(self, rows: Int64) -> None:
        away = self._away[rows]
        if (away == AWAY).all():
            return
        worst = int(np.flatnonzero(away != AWAY)[0])
        seq_id = int(self._ids[rows[worst]])
        if away[worst]:
            raise StepError(f"cannot swap in sequence {seq_id}: it is being swapped")
        raise ArgumentError(f"cannot swap in sequence {seq_id}: it is not swapped out")

    def _spans(self, rows: Int64, ring_of: Int32, num_rings: int) -> Int64:
        """Return the positions each ring holds for its owners, ``int64[num_rings, 2]``."""
        length, _, ring_start, _ = self._states(rows)
        used = np.flatnonzero((ring_of >= 0) & (ring_start < length))
        begin = np.full(num_rings, np.iinfo(np.int64).max)
        end = np.zeros(num_rings, np.int64)
        np.minimum.at(begin, ring_of[used], ring_start[used])
        np.maximum.at(end, ring_of[used], length[used])
        return np.stack((np.minimum(begin, end), end), axis=1)

    def _sinks_of(self, rows: Int64, pages: Int32) -> tuple[Int32, Int64]:
        """Return distinct pages (of either tier) of blocks 0 that have sinks, and how many."""
        sinks = self._sinks[rows]
        firsts, inverse = np.unique(pages[sinks > 0], return_inverse=True)
        counts = np.zeros(firsts.size, np.int64)
        np.maximum.at(counts, inverse, sinks[sinks > 0])
        return firsts, counts

    def _still_here(
        self, rows: Int64, left: list[SwappedRow], host_pages: Int32, member: Int64, block: Int64
    ) -> Int32:
        """Return a page of the device with the bytes of each page of the host, 0 without one.

        ``member`` and ``block`` say where each page of the host is met first.
        """
        known = self._twins.pages_of(host_pages)
        in_reach = self.pool.ref_counts[known] > 0
        if self.prefix is not None:
            in_reach |= self.prefix.held[known]
        known[~in_reach] = 0
        if self.prefix is not None:
            used = dict(zip(known.tolist(), block.tolist()))
            for at in np.flatnonzero(known == 0).tolist():
                of, index = int(member[at]), int(block[at])
                if not left[of].findable[index]:
                    continue
                page = self.prefix.get(self._chains[int(rows[of])].keys[index])
                # Keys made by the caller may name two blocks alike; a sequence has a page once.
                if (
                    page
                    and self._same(page, host_pages[at])
                    and used.setdefault(page, index) == index
                ):
                    known[at] = page
        if self.num_sinks:
            # A block 0 that has lost its sinks is not what this sequence had.
            known[(block == 0) & (self.windows.sink_record[known] < 0)] = 0
        return known

    def _same(self, page: int, host_page: int) -> bool:
        """Tell whether the tokens of two pages of one key agree, if that is to be verified."""
        if self.sharing is None or not self.sharing.verify_tokens:
            return True
        return np.array_equal(self._page_tokens[page], self._host_tokens[host_page])


def _in_order(values: Int32) -> tuple[Int32, Int64]:
    """Return distinct values in order of appearance, and the place of each value among them."""
    distinct, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    order = np.argsort(first)
    place = np.empty(order.size, np.int64)
    place[order] = np.arange(order.size)
    return distinct[order], place[inverse]


def _first_places(inverse: Int64, count: int) -> Int64:
    """Return where each of ``count`` numbers occurs first."""
    first = np.empty(count, np.int64)
    first[inverse[::-1]] = np.arange(inverse.size)[::-1]
    return first


def _looked_up(keys: Int32, values: Int32, wanted: Int32) -> Int32:
    """Return the value of each wanted one of some distinct keys."""
    order = np.argsort(keys)
    return values[order[np.searchsorted(keys, wanted, sorter=order)]]


def _owners(numbers: Int32, count: int) -> Int64:
    """Return how often each of ``count`` numbers occurs; -1 stands for none."""
    return np.bincount(numbers[numbers >= 0], minlength=count)


def _numbered(owned: Int32) -> tuple[Int32, Int32]:
    """Return the distinct ids that are not -1, and for each member the number of its own or -1."""
    distinct, inverse = _in_order(owned[owned >= 0])
    numbers = np.full(owned.size, -1, np.int32)
    numbers[owned >= 0] = inverse
    return distinct, numbers
