"""What can be seen of a block manager: requests, their pages, and counts of them."""

from __future__ import annotations

import numpy as np

from ..cache.reports import CacheCounters, CacheStats, cache_counters, cache_stats
from ..errors import ArgumentTypeError
from ..paging import PageTables
from .request import Blocks, Holding, Request
from .request_checks import another_request, problem_of


class ManagerViews:
    """Requests that hold pages of some tables, as whoever schedules them sees them.

    Attributes
    ----------
    tables : PageTables
        The rows of the requests; `sequence_of` gives their ids.
    """

    def __init__(self, tables: PageTables) -> None:
        self.tables = tables
        self._holdings: dict[str, Holding] = {}

    @property
    def usage(self) -> float:
        """Part of the pages that have an owner, 0 to 1."""
        return 1.0 - self.tables.pool.num_free / (self.tables.pool.num_pages - 1)

    @property
    def num_free_blocks(self) -> int:
        """Pages without an owner, those that can be found included."""
        return self.tables.pool.num_free

    def sequence_of(self, request_id: str) -> int | None:
        """Return the sequence of a request in `tables`, None if it holds nothing."""
        try:
            holding = self._holdings.get(request_id)
        except TypeError:
            raise ArgumentTypeError(
                f"request_id must be a name, got {type(request_id).__name__}"
            ) from None
        return None if holding is None else holding.seq_id

    def get_block_ids(self, request_id: str) -> tuple[list[int]]:
        """Return the pages of a request by cache group; none if it holds nothing."""
        seq_id = self.sequence_of(request_id)
        if seq_id is None:
            return ([],)
        pages: list[int] = self.tables.block_table(np.array([seq_id]))[0].tolist()
        return (pages,)

    def get_blocks(self, request_id: str) -> Blocks:
        """Return the blocks of a request; none if it holds nothing."""
        return Blocks(self.get_block_ids(request_id)[0])

    def get_num_common_prefix_blocks(self, request_id: str) -> list[int]:
        """Return how many leading pages of a request every request holds, by cache group."""
        pages = self.get_block_ids(request_id)[0]
        everyone = self.tables.pool.ref_counts[pages] == len(self._holdings)
        return [len(pages) if everyone.all() else int(np.argmin(everyone))]

    def stats(self) -> CacheStats:
        """Count pages, sequences and tokens."""
        return cache_stats(self.tables)

    def counters(self) -> CacheCounters:
        """Count what happened so far; lookups are those of requests that were admitted."""
        return cache_counters(self.tables)

    def _holding_of(self, request: Request) -> Holding | None:
        """Return what a request holds; refuse another one of its name."""
        try:
            holding = self._holdings.get(request.request_id)
        except (AttributeError, TypeError):
            problem = problem_of(request)
            if problem is None:
                raise
            raise problem from None
        if holding is not None and holding.request is not request:
            raise another_request(request.request_id)
        return holding
