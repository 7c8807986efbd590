"""How swaps end, and what is known of sequences that are on the host."""

from __future__ import annotations

import numpy as np

from ..errors import StepError
from .arguments import Bools, Int32, Int64, Integers, ranges
from .exclusive import exclusive
from .sequence_rows import AWAY, LEAVING
from .steps import Steps
from .swap_plan import SwappedRow, SwapPlan


class SwappedRows(Steps):
    """Sequences on the host and on the way; swaps are begun by `Swaps`."""

    def is_swapped(self, seq_ids: Integers) -> Bools:
        """Tell which sequences are on the host, those on their way back included, ``bool[B]``."""
        away: Bools = self._away.take(self._rows_of(seq_ids)) >= AWAY
        return away

    @property
    def num_swapped(self) -> int:
        """Sequences that are on the host."""
        return len(self._swapped)

    @exclusive
    def commit_swap(self, plan: SwapPlan) -> Int32:
        """End a swap whose bytes are copied: its sequences are on the other side now.

        Returns
        -------
        int32[n]
            Pages of the device that became free, each sequence's last first; none on the way in.

        Raises
        ------
        StepError
            If a step is open, or this swap is not under way.
        """
        self._end(plan, "commit_swap")
        if plan.direction == "out":
            return self._leave(plan)
        self._return(plan)
        return NO_PAGES

    @exclusive
    def abort_swap(self, plan: SwapPlan) -> Int32:
        """Give a swap up: its sequences stay where they were, and what it took is given back.

        Returns
        -------
        int32[n]
            Pages of the device that became free; none on the way out.

        Raises
        ------
        StepError
            If a step is open, or this swap is not under way.
        """
        self._end(plan, "abort_swap")
        if plan.direction == "out":
            self._away[plan._rows] = 0
            self._num_away -= plan._rows.size
            self._release_host(plan._entry_host_pages, plan._row_rings)
            return NO_PAGES
        self._away[plan._rows] = AWAY
        self.windows._release_row(plan._row_slots)
        pages = plan._entry_pages[::-1]
        return self._release_pages(pages[pages > 0])

    def _begin(self, plan: SwapPlan, away: int) -> SwapPlan:
        if away == LEAVING:
            self._num_away += plan._rows.size
        self._away[plan._rows] = away
        self._swaps[id(plan)] = plan
        return plan

    def check_swap(self, plan: SwapPlan, operation: str) -> None:
        """Refuse a plan that is not under way in these tables.

        Raises
        ------
        StepError
            Naming the operation that was to be done.
        """
        if self._swaps.get(id(plan), self) is not plan:
            raise StepError(f"cannot {operation} this plan: it is not under way here")

    def _end(self, plan: SwapPlan, operation: str) -> None:
        self._refuse_open_step(operation)
        self.check_swap(plan, operation)
        del self._swaps[id(plan)]
        self.version += 1

    def _leave(self, plan: SwapPlan) -> Int32:
        """Make the host the place of sequences whose bytes are there."""
        rows = plan._rows
        member, block = self._places(rows)
        findable = np.zeros(member.size, np.bool_)
        if self.prefix is not None:
            findable = self.prefix.held[plan._entry_pages].copy()
        ends = np.cumsum(-(-self._length[rows] // self.page_size))[:-1]
        parts = zip(
            rows.tolist(),
            np.split(plan._entry_host_pages, ends),
            np.split(findable, ends),
            plan._row_rings.tolist(),
        )
        full = (block + 1) * self.page_size <= self._length[rows[member]]
        for row, host_pages, found, ring in parts:
            if row in self._chains:
                # A fork may have published blocks whose keys this sequence does not know yet.
                found[len(self._chains[row].keys) :] = False
            self._swapped[row] = SwappedRow(host_pages, found, ring)
        evicted = self._evicted[rows]
        freed = self._drop_blocks(rows, np.zeros(rows.size, np.int64))
        self._evicted[rows] = evicted
        if self.window_tokens:
            self.windows._release_row(self._slot[rows])
            self._slot[rows] = -1
        self._away[rows] = AWAY
        # Only where the bytes stay in reach; the others are anyone's now.
        stays = full & (self.pool.ref_counts[plan._entry_pages] > 0)
        if self.prefix is not None:
            stays |= full & self.prefix.held[plan._entry_pages]
        self._join(plan, stays & (plan._entry_pages > 0))
        return freed

    def _return(self, plan: SwapPlan) -> None:
        """Make the device the place of sequences whose bytes are there again."""
        rows = plan._rows
        member, block = self._places(rows)
        self._table[rows[member], block] = plan._entry_pages
        self._touch(rows, 0)
        self._slot[rows] = plan._row_slots
        left = [self._swapped.pop(row) for row in rows.tolist()]
        self._away[rows] = 0
        self._num_away -= rows.size
        self._release_host(plan._entry_host_pages, plan._row_rings)
        if self.prefix is not None:
            self._page_tokens[plan.pages] = self._host_tokens[plan.host_pages]
            for row, was in zip(rows.tolist(), left):
                pages = self._table[row, : was.host_pages.size]
                fit = was.findable & ~self.prefix.held[pages]
                if fit.any():
                    chain = self._chains[row]
                    tokens = None if chain.opaque else self._page_tokens[pages]
                    self._enter_runs(chain, 0, pages, fit, tokens)
        full = (block + 1) * self.page_size <= self._length[rows[member]]
        still = self.host.ref_counts[plan._entry_host_pages] > 0
        self._join(plan, full & still & (plan._entry_pages > 0))

    def _join(self, plan: SwapPlan, chosen: Bools) -> None:
        pages, first = np.unique(plan._entry_pages[chosen], return_index=True)
        if pages.size:
            self._twins.join(pages, plan._entry_host_pages[chosen][first])

    def _drop_swapped(self, rows: Int64) -> None:
        """Release what sequences that are closed have on the host."""
        for row in rows.tolist():
            left = self._swapped.pop(row)
            self._release_host(left.host_pages, np.array([left.ring], np.int32))
        self._num_away -= rows.size

    def _release_host(self, host_pages: Int32, rings: Int32) -> None:
        self._twins.part_host(self.host._release_row(host_pages[::-1]))
        self.host.rings._release_row(rings)

    def _places(self, rows: Int64) -> tuple[Int64, Int64]:
        """Return member and index of each block of some rows."""
        counts = -(-self._length[rows] // self.page_size)
        return np.repeat(np.arange(rows.size), counts), ranges(counts)


NO_PAGES: Int32 = np.empty(0, np.int32)
