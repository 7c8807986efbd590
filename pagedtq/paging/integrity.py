"""Proof that the tables and pools obey every invariant; used by tests, the CLI and debug mode."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import IntegrityError
from .arguments import Bools, Int64

if TYPE_CHECKING:
    from .sequence_rows import SequenceRows


def check_tables(tables: SequenceRows) -> None:
    """Check ids and rows, states, page tables, owners of pages and slots, and sink records.

    Parameters
    ----------
    tables : SequenceRows
        The tables; a step may be open.

    Raises
    ------
    IntegrityError
        Naming the first broken invariant and where.
    """
    rows = _check_rows(tables)
    _check_states(tables, rows)
    _check_pages(tables, rows)
    _check_windows(tables, rows)


def _check_rows(tables: SequenceRows) -> Int64:
    rows = np.flatnonzero(tables._ids >= 0)
    free = np.array(tables._free_rows, np.int64)
    everything = np.sort(np.concatenate((rows, free)))
    if not np.array_equal(everything, np.arange(tables._ids.size)):
        raise IntegrityError("a row must be either open or free")
    dirty = tables._fields[:, free].any(axis=0) | tables._table[free].any(axis=1)
    dirty |= tables._slot[free] >= 0
    _require(~dirty, free, "is free but not empty")
    return rows


def _check_states(tables: SequenceRows, rows: Int64) -> None:
    size, window = tables.page_size, tables.window_tokens
    length, coded, ring_start, sinks, keep, start, _ = tables._fields[:, rows]
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


def _check_pages(tables: SequenceRows, rows: Int64) -> None:
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
    held = np.bincount(table[table > 0], minlength=tables.pool.num_pages)
    tables.pool.check_integrity(held)


def _check_windows(tables: SequenceRows, rows: Int64) -> None:
    slots = tables._slot[rows]
    if not tables.window_tokens:
        _require(slots < 0, rows, "has a window slot, but there is no window")
        tables.windows.check_integrity(np.zeros(tables.windows.num_slots, np.int64))
        return
    in_ring = tables._length[rows] > tables._ring_start[rows]
    _require(~in_ring | (slots >= 0), rows, "has tokens in the ring, but no slot")
    held = np.bincount(slots[slots >= 0], minlength=tables.windows.num_slots)
    tables.windows.check_integrity(held)
    # Exactly the pages that are someone's block 0 have a sink record.
    expected = np.zeros(tables.pool.num_pages, np.bool_)
    if tables.num_sinks:
        expected[tables._table[rows, 0]] = True
        expected[0] = False
    wrong = np.flatnonzero(expected != (tables.windows.sink_record >= 0))
    if wrong.size:
        raise IntegrityError(f"page {int(wrong[0])} has a sink record or lacks one wrongly")
    lost = (tables._sinks[rows] > 0) & (tables._table[rows, 0] == 0)
    _require(~lost, rows, "has sinks without block 0")


def _require(holds: Bools, rows: Int64, problem: str) -> None:
    if not holds.all():
        raise IntegrityError(f"row {int(rows[np.flatnonzero(~holds)[0]])} {problem}")
