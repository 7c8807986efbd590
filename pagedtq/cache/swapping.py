"""Swapping sequences between a cache and the host, and what a change leaves behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends import Backend
from ..config import CacheConfig
from ..errors import StepError
from ..paging.arguments import Bools
from ..paging.page_tables import PageTables
from ..paging.swap_plan import SwapPlan
from .reads import CacheReads, SeqIds

Array = npt.NDArray[Any]

#: What debug mode writes into pages that are free or fresh: as float16, NaN.
POISON = 0xFF


class CacheSwaps(CacheReads):
    """The part of `PagedKVCache` that moves sequences between the tiers."""

    def __init__(
        self, config: CacheConfig, backend: Backend, tables: PageTables, debug: bool
    ) -> None:
        super().__init__(config, backend, tables)
        self.debug = debug
        # Swaps whose bytes were copied, by the identity of their plans.
        self._copied: set[int] = set()

    def is_swapped(self, seq_ids: SeqIds) -> Bools:
        """Tell which sequences are on the host, ``bool[B]``."""
        return self.tables.is_swapped(self._ids(seq_ids))

    def swap_out(self, seq_ids: SeqIds) -> None:
        """Move sequences to the host, all of them or none: their pages and windows become free.

        Until `swap_in` they can only be asked for their length and state, and closed. Whoever
        shares pages with them keeps these, and published blocks can still be found.

        Parameters
        ----------
        seq_ids : int or sequence of int
            The sequences, each at most once.

        Raises
        ------
        OutOfHostPages
            If the host has no room; see ``CacheConfig.num_host_pages``.
        StepError, SwappedError, UnknownSequence, ArgumentError
        """
        self._swap(self.begin_swap_out(seq_ids))

    def swap_in(self, seq_ids: SeqIds) -> None:
        """Bring sequences back, all of them or none, to the byte as they were.

        Pages that the device still has are not copied.

        Parameters
        ----------
        seq_ids : int or sequence of int
            Sequences that are swapped out, each at most once.

        Raises
        ------
        OutOfPages, OutOfWindowSlots
            If they do not fit.
        StepError, UnknownSequence, ArgumentError
        """
        self._swap(self.begin_swap_in(seq_ids))

    def begin_swap_out(self, seq_ids: SeqIds) -> SwapPlan:
        """Begin to move sequences to the host; `copy_swap` and `commit_swap` follow.

        Until the commit they can be read, but not changed; other sequences can step, also while
        another thread is in `copy_swap`.

        Raises
        ------
        OutOfHostPages, StepError, SwappedError, UnknownSequence, ArgumentError
        """
        return self.tables.begin_swap_out(self._ids(seq_ids))

    def begin_swap_in(self, seq_ids: SeqIds) -> SwapPlan:
        """Begin to bring sequences back; `copy_swap` and `commit_swap` follow.

        Raises
        ------
        OutOfPages, OutOfWindowSlots, StepError, UnknownSequence, ArgumentError
        """
        plan = self.tables.begin_swap_in(self._ids(seq_ids))
        if self.debug:
            self.backend.fill_pages(plan.pages, POISON)
        return plan

    def copy_swap(self, plan: SwapPlan) -> None:
        """Copy the bytes of a swap that was begun; nothing else is touched.

        Raises
        ------
        StepError
            If it is not under way.
        """
        self.tables.check_swap(plan, "copy_swap")
        self._host.copy(plan)
        self._copied.add(id(plan))

    def commit_swap(self, plan: SwapPlan) -> None:
        """End a swap whose bytes are copied.

        Raises
        ------
        StepError
            If it is not under way, not copied yet, or a step is open.
        """
        self.tables.check_swap(plan, "commit_swap")
        if id(plan) not in self._copied:
            raise StepError("cannot commit_swap this plan: its bytes are not copied, see copy_swap")
        freed = self.tables.commit_swap(plan)
        self._copied.discard(id(plan))
        self._freed(freed)

    def abort_swap(self, plan: SwapPlan) -> None:
        """Give a swap up: its sequences stay where they were.

        Raises
        ------
        StepError
            If it is not under way, or a step is open.
        """
        freed = self.tables.abort_swap(plan)
        self._copied.discard(id(plan))
        self._freed(freed)

    def _swap(self, plan: SwapPlan) -> None:
        try:
            self.copy_swap(plan)
        except BaseException:
            self.abort_swap(plan)
            raise
        self.commit_swap(plan)

    # -- after a change ----------------------------------------------------------------------

    def _freed(self, pages: Array) -> None:
        if self.debug and len(pages):
            prefix = self.tables.prefix
            # Pages that can be found again keep their bytes, and so do those still being read.
            gone = pages if prefix is None else pages[~prefix.held[pages]]
            gone = np.setdiff1d(gone, self.tables.pool.parked_ids())
            self.backend.fill_pages(gone, POISON)
        self._host.drop_unowned()
        self._after_change()

    def _after_change(self) -> None:
        if self.debug:
            self.check_integrity()
