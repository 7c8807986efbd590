"""Looking up what a block manager holds already: blocks of a prompt, how often, and events."""

from __future__ import annotations

import msgspec

from ..paging import PageTables
from ..paging.exclusive import exclusive
from .events import AllBlocksCleared, BlockRemoved, BlockStored, EventLog
from .manager_views import ManagerViews
from .request import Blocks, Request
from .request_checks import block_hashes, known_tokens, problem_of

NO_BLOCKS = Blocks()


class PrefixCacheStats(msgspec.Struct):
    """Prefix lookups since the last time: requests, tokens asked for, tokens found."""

    requests: int = 0
    queries: int = 0
    hits: int = 0


class ManagerLookups(ManagerViews):
    """Requests that begin with pages that are here; see `BlockManager`."""

    def __init__(self, tables: PageTables, block_size: int, enable_caching: bool) -> None:
        super().__init__(tables)
        self.block_size, self.enable_caching = block_size, enable_caching
        self._stats: PrefixCacheStats | None = None
        self._log: EventLog | None = None
        # The tables' own turn: a request and its sequence change together.
        self._turn = tables.turn

    @exclusive
    def make_prefix_cache_stats(self) -> PrefixCacheStats | None:
        """Return the lookups since the last call; None if they are not counted."""
        if self._stats is None:
            return None
        stats, self._stats = self._stats, PrefixCacheStats()
        return stats

    @exclusive
    def take_events(self) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
        """Return the events since the last call."""
        return [] if self._log is None else self._log.take()

    @exclusive
    def get_computed_blocks(self, request: Request) -> tuple[Blocks, int]:
        """Return the blocks of a request that are here, and how many tokens they hold.

        The last token is never among them. Nothing is taken: the pages can still be reused until
        `allocate_slots` gets them.

        Raises
        ------
        ArgumentTypeError
            If a hash is not bytes.
        """
        prefix = self.tables.prefix
        if not self.enable_caching or prefix is None:
            return NO_BLOCKS, 0
        if getattr(request, "skip_reading_prefix_cache", False):
            return NO_BLOCKS, 0
        try:
            num_tokens = known_tokens(request)
        except AttributeError:
            problem = problem_of(request)
            if problem is None:
                raise
            raise problem from None
        most = max(num_tokens - 1, 0) // self.block_size
        pages = prefix.longest(block_hashes(request, 0, most))
        found = len(pages) * self.block_size
        if self._stats is not None:
            self._stats.requests += 1
            self._stats.queries += num_tokens
            self._stats.hits += found
        return Blocks(pages), found
