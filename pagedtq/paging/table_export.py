"""Page tables of a batch, kept outside the tables and brought up to date by what changed.

A decode step adds a page to one sequence in ``page_size``, so that a device that holds a copy of
the dense table needs a few entries per step, not the table. `TableExport.update` says which: it
looks up which rows were written since it last looked, compares only those, and returns flat indices
and values for one scatter. Its own array is the host's copy of what the device then holds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arguments import MAX_PAGES, Bools, Int32, Int64, Integers, instance, integer, ranges
from .page_tables import PageTables
from .sequence_rows import ROW_MASK
from .step_plan import NO_IDS
from .table_views import PageIndices

#: From this part of all on, doing all costs less than picking what is needed.
_MANY = 4


class TableUpdate(NamedTuple):
    """What changed in a `TableExport`; apply as ``buffer.ravel()[indices] = values``.

    Attributes
    ----------
    rows : int64[k]
        Members of the batch whose row changed.
    indices : int64[n]
        ``member * width + block`` of every entry that changed, each once.
    values : int32[n]
        The page it holds now, 0 for none.
    resized : bool
        The buffer is a new one of other shape: begin with zeros of ``buffer.shape``.
    """

    rows: Int64
    indices: Int64
    values: Int32
    resized: bool


class TableExport:
    """A copy of the page tables of a changing batch; see the module.

    Several exports of the same tables do not disturb each other. Members keep their place in the
    buffer as long as the caller lists them in the same place; one that moves is compared with what
    was there.

    Parameters
    ----------
    tables : PageTables
        The tables.
    max_sequences, max_blocks : int
        Shape to begin with; it grows as needed, by doubling, and every growth sends the whole table
        again.

    Attributes
    ----------
    buffer : int32[max_sequences, max_blocks]
        Pages by member and block; 0 where a block was evicted and behind a member's last block.
        Rows behind the batch hold what was there last.
    """

    _csr: PageIndices | None

    def __init__(self, tables: PageTables, max_sequences: int = 8, max_blocks: int = 8) -> None:
        self._tables = instance("tables", tables, PageTables)
        shape = (
            integer("max_sequences", max_sequences, 1, ROW_MASK),
            integer("max_blocks", max_blocks, 1, MAX_PAGES),
        )
        self._allocate(*shape)
        self._size = 0
        self._lengths: Int64 = np.empty(0, np.int64)

    @property
    def block_table(self) -> Int32:
        """Pages of the batch in block order, ``int32[B, max_blocks]``: a view of the buffer."""
        return self.buffer[: self._size]

    @property
    def seq_lens(self) -> Int32:
        """Tokens of each member at the last update, ``int32[B]``."""
        return self._lengths.astype(np.int32)

    def update(self, seq_ids: Integers) -> TableUpdate:
        """Make the copy that of a batch, as the tables are now (a step may be open).

        Parameters
        ----------
        seq_ids : integers [B]
            The batch, in the order of the buffer's rows.

        Raises
        ------
        UnknownSequence, ArgumentError, ArgumentTypeError
            For bad ids; the copy stays as it was.
        """
        tables = self._tables
        rows = tables._readable_rows(seq_ids, "export")
        ids, lengths = tables._ids.take(rows), tables._length.take(rows)
        blocks = tables._num_blocks(lengths)
        size = rows.size
        resized = self._fit(size, int(np.maximum.reduce(blocks, initial=0)))
        known, stamps, had = self._ids[:size] == ids, self._stamps[:size], self._blocks[:size]
        # Appending notes nothing: it is seen by the number of blocks.
        same = known & (tables._touched_last.take(rows) <= stamps) & (blocks <= had)
        stale = (~same).nonzero()[0]
        self._size, self._lengths = size, lengths
        if self._compressed < size:
            self._moved[self._compressed : size] = True
        if stale.size == 0:
            return TableUpdate(stale, stale, NO_IDS, resized)
        begin, end = self._written(rows[stale], stale, known[stale], blocks[stale])
        member, block = self._differing(rows[stale], stale, begin, end)
        at = stale[member]
        values, flat = tables._table[rows[at], block], at * self.buffer.shape[1] + block
        buffer = self.buffer.reshape(-1)
        held = (values > 0).astype(np.int64) - (buffer[flat] > 0)
        np.add.at(self._counts, at, held)
        buffer[flat] = values
        self._ids[stale], self._blocks[stale] = ids[stale], blocks[stale]
        self._stamps[stale] = tables._touches
        self._moved[at] = True
        # They ascend, each as often as it has entries.
        first_entries = np.ones(at.size, np.bool_)
        np.not_equal(at[1:], at[:-1], out=first_entries[1:])
        return TableUpdate(at[first_entries], flat, values, resized)

    def csr(self) -> PageIndices:
        """Return the batch at the last update in compressed rows, as `PageTables.csr`.

        Runs of members that did not change since the last call are copied as they are. (On a
        device, ``kv_indices`` is better made there, from the dense table and ``kv_indptr``.)
        """
        size, page_size = self._size, self._tables.page_size
        counts = self._counts[:size]
        indptr = np.zeros(size + 1, np.int32)
        np.cumsum(counts, out=indptr[1:])
        moved = np.flatnonzero(self._moved[:size])
        if self._csr is None or moved.size * _MANY > size:
            indices, positions = self._compress(np.arange(size))
        else:
            indices, positions = np.empty((2, indptr[-1]), np.int32)
            old, fresh = self._csr, self._compress(moved)
            stops = np.cumsum(counts[moved]).tolist()
            starts, old_starts = indptr.tolist(), old.kv_indptr.tolist()
            begin, first = 0, 0
            for at, stop in zip([*moved.tolist(), size], [*stops, None]):
                if begin < at:
                    run = slice(old_starts[begin], old_starts[at])
                    into = slice(starts[begin], starts[at])
                    indices[into], positions[into] = old.kv_indices[run], old.positions[run]
                if stop is not None:
                    into = slice(starts[at], starts[at + 1])
                    indices[into], positions[into] = fresh[0][first:stop], fresh[1][first:stop]
                    begin, first = at + 1, stop
        # The open block is never evicted; without one, the last page that is left is full.
        last = np.where(counts > 0, (self._lengths - 1) % page_size + 1, 0)
        self._csr = PageIndices(indptr, indices, last.astype(np.int32), positions)
        self._moved[:] = False
        self._compressed = size
        return self._csr

    def _written(
        self, rows: Int64, members: Int64, known: Bools, blocks: Int64
    ) -> tuple[Int64, Int64]:
        """Return blocks ``[begin, end)`` that may differ from the buffer, ``int64[n]`` each."""
        tables = self._tables
        stamps, had = self._stamps[members], self._blocks[members]
        # Written since: from some block on, or more than once and then anywhere.
        once = tables._touched_before[rows] <= stamps
        begin = np.minimum(tables._touched_from[rows], had)
        begin = np.where(tables._touched_last[rows] > stamps, np.where(once, begin, 0), had)
        # What was written behind the new end becomes 0 again, as it is in the tables' row.
        return begin * known, np.maximum(blocks, had)

    def _differing(
        self, rows: Int64, members: Int64, begin: Int64, end: Int64
    ) -> tuple[Int64, Int64]:
        """Return where table rows differ from those of the buffer, in blocks ``[begin, end)``.

        Returns
        -------
        at, blocks : int64[n]
            Index into ``rows``, and the block.
        """
        table = self._tables._table
        counts = end - begin
        total, reach = int(np.add.reduce(counts)), int(np.maximum.reduce(end))
        if total * _MANY > reach * rows.size:
            at, blocks = np.nonzero(table[rows, :reach] != self.buffer[members, :reach])
            return at, blocks
        # Tails only, as in decoding.
        if total == rows.size and np.count_nonzero(counts) == total:
            at, blocks = np.arange(total), begin
        else:
            at = np.repeat(np.arange(rows.size), counts)
            blocks = begin[at] + ranges(counts)
        differing = table[rows[at], blocks] != self.buffer[members[at], blocks]
        return at[differing], blocks[differing]

    def _compress(self, members: Int64) -> tuple[Int32, Int32]:
        """Return the pages of some members without null entries, and their first positions."""
        table = self.buffer[members, : int(self._blocks[members].max(initial=0))]
        member, block = np.nonzero(table)
        return table[member, block], (block * self._tables.page_size).astype(np.int32)

    def _fit(self, size: int, blocks: int) -> bool:
        """Make the buffer large enough; tell whether it is a new one."""
        rows, width = self.buffer.shape
        if size <= rows and blocks <= width:
            return False
        self._allocate(
            max(2 * rows, size) if size > rows else rows,
            max(2 * width, blocks) if blocks > width else width,
        )
        return True

    def _allocate(self, rows: int, width: int) -> None:
        self.buffer: Int32 = np.zeros((rows, width), np.int32)
        # Per row of the buffer: whose it is, how far it was written, how many pages it holds, when
        # it was compared last, and whether it changed since the compressed rows were made.
        self._ids: Int64 = np.full(rows, -1, np.int64)
        self._blocks: Int64 = np.zeros(rows, np.int64)
        self._counts: Int64 = np.zeros(rows, np.int64)
        self._stamps: Int64 = np.zeros(rows, np.int64)
        self._moved: Bools = np.ones(rows, np.bool_)
        self._csr = None
        self._compressed = 0
