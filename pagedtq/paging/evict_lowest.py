"""Budgets: how many blocks go, while a ranking says which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArgumentError, OutOfEvictablePages
from .arguments import Int64, Integers, integer, integers
from .candidates import BlockList, evictable_blocks
from .eviction import EvictionPlan
from .page_scores import PageRanking, check_ranking, matched_values

if TYPE_CHECKING:
    from .page_tables import PageTables


@dataclass(frozen=True, slots=True)
class EvictLowest:
    """Keep a sequence within a budget: drop its blocks with the lowest scores.

    Whole blocks go, and no more than the budget asks for. What may not be evicted stays even if
    the budget cannot be met with it: the open block, the exact window, pages of other sequences,
    pinned pages and pages in flight, the tokens protected here, and blocks without a score or
    with a score of inf. Of equal scores the earlier block goes first.

    Parameters
    ----------
    ranking : PageRanking
        Says what blocks are worth.
    max_tokens : int, optional
        Most resident tokens to keep.
    max_pages : int, optional
        Most pages to keep, the open one included. One of the two is given.
    first_tokens, last_tokens : int
        Blocks that hold one of so many first or last tokens are not evicted.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If both budgets or none are given, a number is negative or no integer, or what should rank
        does not.
    """

    ranking: PageRanking
    max_tokens: int | None = None
    max_pages: int | None = None
    first_tokens: int = 0
    last_tokens: int = 0

    def __post_init__(self) -> None:
        if (self.max_tokens is None) == (self.max_pages is None):
            raise ArgumentError("give max_tokens or max_pages, one of the two")
        budget = "max_pages" if self.max_tokens is None else "max_tokens"
        for name in (budget, "first_tokens", "last_tokens"):
            integer(name, getattr(self, name), 0)
        check_ranking(self.ranking)

    def plan(self, tables: PageTables, seq_id: int) -> EvictionPlan:
        """Return what to drop now; changes nothing. Scores are only asked for if needed.

        Raises
        ------
        UnknownSequence
            If the sequence is not open.
        ArgumentError
            If a score is NaN.
        """
        plans = self.plan_many(tables, np.array([tables.checked_id(seq_id)]))
        if plans:
            return plans[0]
        reads = tables.reads([seq_id], overlay=True)
        nothing = np.empty(0, np.int64)
        return EvictionPlan(int(seq_id), nothing, int(reads.keep[0]), int(reads.start[0]))

    def plan_many(self, tables: PageTables, seq_ids: Integers) -> list[EvictionPlan]:
        """Return what a batch has to drop, each sequence for its own budget; changes nothing.

        Parameters
        ----------
        tables : PageTables
            The tables.
        seq_ids : integers [B]
            Sequences, each at most once.

        Returns
        -------
        list of EvictionPlan
            One per sequence that loses blocks, for `eviction.apply_all`. Sequences within their
            budget cost next to nothing.

        Raises
        ------
        UnknownSequence, ArgumentError, ArgumentTypeError
            For bad ids or scores.
        """
        ids = integers("seq_ids", seq_ids)
        tables.check_distinct(ids)
        size, resident = tables.page_size, tables.resident_lengths(ids)
        if self.max_tokens is not None:
            excess = -(-(resident - self.max_tokens) // size)
        else:
            assert self.max_pages is not None
            excess = -(-resident // size) - self.max_pages
        ids, excess = ids[excess > 0], excess[excess > 0]
        if not ids.size:
            return []
        found = evictable_blocks(tables, ids, self.first_tokens, self.last_tokens)
        # What two of them share is freed by neither alone.
        found = found.where(tables.pool.ref_counts[found.pages] == 1)
        values = matched_values(self.ranking.score(tables, ids), found)
        order = np.lexsort((found.blocks, values, found.members))
        members = found.members[order]
        rank = np.arange(order.size) - np.searchsorted(members, members)
        order = order[(rank < excess[members]) & (values[order] < np.inf)]
        return _plans(tables, ids, found.where(np.sort(order)))


def plan_free(
    tables: PageTables,
    num_pages: int,
    ranking: PageRanking,
    seq_ids: Integers | None = None,
    first_tokens: int = 0,
    last_tokens: int = 0,
) -> list[EvictionPlan]:
    """Plan to free pages over several sequences; changes nothing.

    The pages with the lowest scores go, wherever they are. A page that sequences of the batch share
    counts as much as its most wanted block, and is dropped by all of them or by none; one that
    anybody else owns stays. Of equal scores the earlier sequence's earlier block goes first.

    Parameters
    ----------
    tables : PageTables
        The tables.
    num_pages : int
        Pages to free.
    ranking : PageRanking
        Says what blocks are worth.
    seq_ids : integers, optional
        Sequences to take from; by default all that are on the device.
    first_tokens, last_tokens : int
        Blocks that hold one of so many first or last tokens of a sequence are not evicted.

    Returns
    -------
    list of EvictionPlan
        One per sequence that loses blocks, for `eviction.apply_all`.

    Raises
    ------
    OutOfEvictablePages
        If fewer pages can be freed.
    UnknownSequence, ArgumentError, ArgumentTypeError
        For bad ids, numbers or scores.
    """
    need = integer("num_pages", num_pages, 0)
    check_ranking(ranking)
    ids = tables.resident_ids() if seq_ids is None else integers("seq_ids", seq_ids)
    found = evictable_blocks(tables, ids, first_tokens, last_tokens)
    if need == 0:
        return []
    values = matched_values(ranking.score(tables, ids), found)
    _, unit_first, unit = np.unique(found.pages, return_index=True, return_inverse=True)
    # A page that one of its sharers did not score is worth inf.
    worth = np.full(unit_first.size, -np.inf)
    np.maximum.at(worth, unit, values)
    order = np.lexsort((unit_first, worth))
    order = order[worth[order] < np.inf]
    if need > order.size:
        raise OutOfEvictablePages(need, order.size, tables.pool.num_used)
    taken = np.zeros(unit_first.size, np.bool_)
    taken[order[:need]] = True
    gone = found.where(taken[unit])
    return _plans(tables, ids, gone)


def _plans(tables: PageTables, ids: Int64, gone: BlockList) -> list[EvictionPlan]:
    """Return one plan per sequence that loses blocks; what may be read stays as it is."""
    reads = tables.reads(ids, overlay=True)
    members, starts = np.unique(gone.members, return_index=True)
    return [
        EvictionPlan(int(ids[member]), blocks, int(reads.keep[member]), int(reads.start[member]))
        for member, blocks in zip(members.tolist(), np.split(gone.blocks, starts[1:]), strict=False)
    ]
