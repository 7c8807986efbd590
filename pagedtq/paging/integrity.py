"""Proof that the tables and pools obey every invariant; used by tests, the CLI and debug mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import IntegrityError
from .arguments import Bools, Int64
from .sequence_rows import AWAY, LEAVING, RETURNING
from .swap_plan import SwapPlan

if TYPE_CHECKING:
    from .block_chain import BlockChain
    from .shared_prefixes import SharedPrefixes


def check_tables(tables: SharedPrefixes) -> None:
    """Check ids and rows, states, page tables, owners of pages and slots, and sink records.

    Parameters
    ----------
    tables : SharedPrefixes
        The tables; a step may be open.

    Raises
    ------
    IntegrityError
        Naming the first broken invariant and where.
    """
    rows = _check_rows(tables)
    _check_states(tables, rows)
    here = rows[tables._away[rows] < AWAY]
    _check_pages(tables, here)
    _check_windows(tables, here)
    _check_swapped(tables, rows)
    _check_prefixes(tables, rows)


def _check_rows(tables: SharedPrefixes) -> Int64:
    rows = np.flatnonzero(tables._ids >= 0)
    free = np.array(tables._free_rows, np.int64)
    everything = np.sort(np.concatenate((rows, free)))
    if not np.array_equal(everything, np.arange(tables._ids.size)):
        raise IntegrityError("a row must be either open or free")
    dirty = tables._fields[:, free].any(axis=0) | tables._table[free].any(axis=1)
    dirty |= tables._slot[free] >= 0
    _require(~dirty, free, "is free but not empty")
    return rows


def _check_states(tables: SharedPrefixes, rows: Int64) -> None:
    size, window = tables.page_size, tables.window_tokens
    length, coded, ring_start, sinks, keep, start = tables._fields[:6, rows]
    _require(length >= 0, rows, "has a negative length")
    if window:
        _require((ring_start >= 0) & (ring_start <= coded), rows, "breaks 0 <= r <= c")
        _require(coded <= length, rows, "breaks c <= L")
        _require(length - ring_start <= window, rows, "breaks L - r <= W")
        # Stronger than L - c < P: whole blocks are always coded.
        _require(coded >= length // size * size, rows, "has a whole block that is not coded")
        _require((sinks >= 0) & (sinks <= np.minimum(length, tables.num_sinks)), rows, "breaks s")
    else:
        ring_start = length
    _require((keep <= start) & (start <= ring_start), rows, "breaks keep <= start <= r")


def _check_pages(tables: SharedPrefixes, rows: Int64) -> None:
    size = tables.page_size
    table = tables._table[rows]
    length, evicted = tables._length[rows], tables._evicted[rows]
    ring_start = tables._ring_start[rows] if tables.window_tokens else length
    block = np.arange(table.shape[1])
    exists = block < -(-length // size)[:, None]
    null = exists & (table == 0)
    _require(~(~exists & (table != 0)).any(axis=1), rows, "has a page behind its last block")
    _require(null.sum(axis=1) == evicted, rows, "has pages missing that were not evicted")
    readable = null & ((block + 1) * size > ring_start[:, None])
    _require(~readable.any(axis=1), rows, "lacks the page of a block that is open or in the ring")
    ordered = np.sort(table, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)
    _require(~twice.any(axis=1), rows, "holds a page twice")
    entries = [table[table > 0], *(plan._entry_pages for plan in _on_the_way(tables, "in"))]
    held = np.bincount(np.concatenate(entries), minlength=tables.pool.num_pages)
    held[0] = 0
    if tables.retention is not None:
        held += tables.retention.pinned
    tables.pool.check_integrity(held)


def _check_windows(tables: SharedPrefixes, rows: Int64) -> None:
    slots = tables._slot[rows]
    if not tables.window_tokens:
        _require(slots < 0, rows, "has a window slot, but there is no window")
        tables.windows.check_integrity(np.zeros(tables.windows.num_slots, np.int64))
        return
    in_ring = tables._length[rows] > tables._ring_start[rows]
    _require(~in_ring | (slots >= 0), rows, "has tokens in the ring, but no slot")
    taken = np.concatenate([slots, *(p._row_slots for p in _on_the_way(tables, "in"))])
    held = np.bincount(taken[taken >= 0], minlength=tables.windows.num_slots)
    tables.windows.check_integrity(held)
    # Sink records belong to pages that are someone's block 0; those that wait for another rest.
    allowed = np.zeros(tables.pool.num_pages, np.bool_)
    if tables.num_sinks:
        allowed[tables._table[rows, 0]] = True
        for plan in _on_the_way(tables, "in"):
            counts = -(-tables._length[plan._rows] // tables.page_size)
            allowed[plan._entry_pages[(np.cumsum(counts) - counts)[counts > 0]]] = True
        allowed[0] = False
        if tables.retention is not None:
            allowed |= tables.retention.pinned
    recorded = tables.windows.sink_record >= 0
    resting = np.zeros_like(allowed)
    resting[tables.windows.resting_pages] = True
    # A block 0 has none if none was left: others rested, or waited for a fence.
    wrong = np.flatnonzero((allowed & recorded) != (recorded & ~resting))
    if wrong.size:
        raise IntegrityError(f"page {int(wrong[0])} has a sink record or lacks one wrongly")
    if tables.prefix is not None:
        wrong = np.flatnonzero(resting & ~(tables.prefix.held & (tables.pool.ref_counts == 0)))
        if wrong.size:
            raise IntegrityError(f"page {int(wrong[0])} rests, but is owned or holds no block")
    lost = (tables._sinks[rows] > 0) & ~recorded[tables._table[rows, 0]]
    _require(~lost, rows, "has sinks without a sink record of block 0")


def _check_swapped(tables: SharedPrefixes, rows: Int64) -> None:
    """Check sequences on the host and on the way: owners of host pages and rings, and twins."""
    host, size = tables.host, tables.page_size
    away = rows[tables._away[rows] >= AWAY]
    if sorted(tables._swapped) != away.tolist():
        raise IntegrityError("the rows that are marked as swapped out are not those on the host")
    moving = [row for plan in tables._swaps.values() for row in plan._rows.tolist()]
    marked = np.flatnonzero((tables._away == LEAVING) | (tables._away == RETURNING))
    if sorted(moving) != marked.tolist():
        raise IntegrityError("the rows that are marked as being swapped are not those of swaps")
    if int(np.count_nonzero(tables._away)) != tables._num_away:
        raise IntegrityError(f"the number of swapped rows is wrong: {tables._num_away}")
    empty = ~tables._table[away].any(axis=1) & (tables._slot[away] < 0)
    _require(empty, away, "is swapped out, but has pages or a window slot")
    pages, rings = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    for row, left in tables._swapped.items():
        blocks = -(-int(tables._length[row]) // size)
        missing = int(np.count_nonzero(left.host_pages == 0))
        right = left.host_pages.size == blocks and missing == int(tables._evicted[row])
        _require(np.array([right]), np.array([row]), "has pages missing on the host")
        in_ring = tables.window_tokens > 0 and tables._ring_start[row] < tables._length[row]
        _require(np.array([left.ring >= 0 or not in_ring]), np.array([row]), "lacks its ring")
        pages.append(left.host_pages)
        rings.append(np.array([left.ring], np.int32))
    for plan in _on_the_way(tables, "out"):
        pages.append(plan._entry_host_pages)
        rings.append(plan._row_rings)
    owners = np.bincount(np.concatenate(pages), minlength=host.num_pages + 1)
    owners[0] = 0
    host.check_integrity(owners)
    owned = np.concatenate(rings)
    host.rings.check_integrity(np.bincount(owned[owned >= 0], minlength=host.num_pages))
    tables._twins.check_integrity(host.ref_counts)


def _on_the_way(tables: SharedPrefixes, direction: str) -> list[SwapPlan]:
    return [plan for plan in tables._swaps.values() if plan.direction == direction]


def _check_prefixes(tables: SharedPrefixes, rows: Int64) -> None:
    if tables.prefix is None:
        return
    tables.prefix.check_integrity()
    if tables.retention is not None:
        wrong = np.flatnonzero(tables.retention.pinned & ~tables.prefix.held)
        if wrong.size:
            raise IntegrityError(f"page {int(wrong[0])} is pinned, but holds no block")
    size = tables.page_size
    unpaired = set(tables._chains) - set(rows.tolist())
    if unpaired:
        raise IntegrityError(f"row {unpaired.pop()} is closed, but keys of its blocks are kept")
    unshared = np.setdiff1d(rows, list(tables._chains))
    found = tables.prefix.held[tables._table[unshared]].any(axis=1)
    _require(~found, unshared, "was opened without tokens, but one of its pages can be found")
    for row, chain in tables._chains.items():
        here, length = np.array([row]), int(tables._length[row])
        done, known = int(tables._published[row]), int(tables._known[row])
        _require(np.array([done <= min(length // size, len(chain.keys))]), here, "published more")
        _require(np.array([known <= length]), here, "knows tokens that it does not have")
        # A page that was cut inside its block forgets it when it is written on; a fork may have
        # published a block whose key this row has not computed.
        whole = min(length // size, len(chain.keys))
        for block, page in enumerate(tables._table[row, :whole].tolist()):
            if tables.prefix.key_of(page) not in (None, chain.keys[block]):
                raise IntegrityError(f"page {page} of row {row} holds another block than {block}")
        if not chain.opaque:
            _check_chain(tables, row, chain)


def _check_chain(tables: SharedPrefixes, row: int, chain: BlockChain) -> None:
    """Recompute the keys of a row from the tokens in its pages."""
    count = min(int(tables._known[row]) // tables.page_size, len(chain.keys))
    pages, of_page = tables._table[row, :count], tables._page_tokens
    if row in tables._swapped:
        pages, of_page = tables._swapped[row].host_pages[:count], tables._host_tokens
    if not pages.all():
        count = int(np.argmin(pages > 0))
    tokens = of_page[pages[:count]].ravel()
    if tables._hasher.chain(tokens, extras=chain.extras) != chain.keys[:count]:
        raise IntegrityError(f"row {row} has keys that its tokens do not hash to")


def _require(holds: Bools, rows: Int64, problem: str) -> None:
    if not holds.all():
        raise IntegrityError(f"row {int(rows[np.flatnonzero(~holds)[0]])} {problem}")
