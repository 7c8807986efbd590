"""Which blocks of a sequence to drop: pure plans, applied atomically."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np

from ..errors import ArgumentError, ArgumentTypeError
from .arguments import Int32, Int64, instance, integer
from .exclusive import take_turn, unguarded

if TYPE_CHECKING:
    from .page_tables import PageTables


class EvictionPlan(NamedTuple):
    """Blocks to drop and the read boundary to set.

    Attributes
    ----------
    seq_id : int
        The sequence.
    blocks : int64[n]
        Blocks, ascending.
    keep, start : int
        Positions ``[0, keep)`` and ``[start, inf)`` stay readable.
    """

    seq_id: int
    blocks: Int64
    keep: int
    start: int


@runtime_checkable
class EvictionPolicy(Protocol):
    """Anything that can plan an eviction."""

    def plan(self, tables: PageTables, seq_id: int) -> EvictionPlan:
        """Return what to drop from a sequence now; changes nothing."""
        ...


@dataclass(frozen=True, slots=True)
class KeepFirstLast:
    """Keep the first and the last tokens of a sequence (arXiv 2309.17453), page by page.

    The read boundary is exact to the token; memory is returned in whole blocks, so a block goes
    when none of its positions is read any more. Tokens in the exact window always stay.

    Parameters
    ----------
    first_tokens, last_tokens : int
        How many to keep.
    """

    first_tokens: int
    last_tokens: int

    def __post_init__(self) -> None:
        integer("first_tokens", self.first_tokens, 0)
        integer("last_tokens", self.last_tokens, 0)

    def plan(self, tables: PageTables, seq_id: int) -> EvictionPlan:
        """Return what to drop now; changes nothing.

        Raises
        ------
        UnknownSequence
            If the sequence is not open.
        """
        state = tables.state(seq_id)
        start = min(max(state.length - self.last_tokens, 0), state.ring_start)
        if start <= self.first_tokens:
            return EvictionPlan(seq_id, np.empty(0, np.int64), 0, 0)
        size = tables.page_size
        # start <= r: whole blocks below it are neither open nor in the ring.
        first, stop = -(-self.first_tokens // size), start // size
        pages = tables.block_table(np.array([seq_id]))[0]
        blocks = first + np.flatnonzero(pages[first:stop])
        return EvictionPlan(seq_id, blocks, self.first_tokens, start)


def apply(tables: PageTables, plan: EvictionPlan) -> Int32:
    """Drop the blocks of a plan and set its boundary, both or neither.

    Returns
    -------
    int32[n]
        Pages that became free.

    Raises
    ------
    PagedTQError
        As `PageTables.evict`, if the sequence changed so that the plan no longer fits.
    """
    instance("plan", plan, EvictionPlan)
    return tables.evict(plan.seq_id, plan.blocks, boundary=(plan.keep, plan.start))


def apply_all(tables: PageTables, plans: Iterable[EvictionPlan]) -> Int32:
    """Apply plans of several sequences, all of them or none.

    Returns
    -------
    int32[n]
        Pages that became free, plan by plan.

    Raises
    ------
    ArgumentError
        If two plans are for one sequence.
    PagedTQError
        As `apply`, if one of the plans no longer fits.
    ConcurrentCallError
        If another call is at work in the tables.
    """
    try:
        plans = list(plans)
    except TypeError:
        raise ArgumentTypeError(f"plans must be several, got {type(plans).__name__}") from None
    known = {tables.checked_id(instance("a plan", plan, EvictionPlan).seq_id) for plan in plans}
    if len(known) != len(plans):
        raise ArgumentError("two plans are for the same sequence")
    evict = unguarded(tables.evict)
    # No other call comes between the checks and the changes.
    take_turn(tables.turn, "apply_all")
    try:
        for plan in plans:
            tables.check_evict(plan.seq_id, plan.blocks, (plan.keep, plan.start))
        freed = [evict(plan.seq_id, plan.blocks, (plan.keep, plan.start)) for plan in plans]
    finally:
        tables.turn.append(None)
    return np.concatenate([np.empty(0, np.int32), *freed])
