"""What can be asked of the tables without changing them: states, page tables, read ranges."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import ArgumentError
from .arguments import Int32, Int64, Integers, integers, ranges
from .sequence_rows import AWAY, SequenceRows
from .step_plan import SequenceState


class Reads(NamedTuple):
    """Which positions an attention step reads, ``int64[B]`` each.

    Sinks are ``[0, first)``, the body (codes in pages) is ``[first, stop)``, the ring is
    ``[stop, kv_len)``; each intersected with ``[0, keep) U [start, inf)`` and with the blocks whose
    entry in the page table is not 0.
    """

    kv_lens: Int64
    first: Int64
    stop: Int64
    keep: Int64
    start: Int64


class PageIndices(NamedTuple):
    """Page tables in compressed rows, as FlashInfer takes them, ``int32`` throughout.

    Pages of evicted blocks are left out, so ``positions`` (the first token position of each page,
    one per entry of ``kv_indices``) says where the others belong. ``kv_last_page_len`` is in
    ``[1, page_size]``, 0 for a sequence without a page.
    """

    kv_indptr: Int32
    kv_indices: Int32
    kv_last_page_len: Int32
    positions: Int32


class TableViews(SequenceRows):
    """Read-only queries. All are allowed while a step is open and then show its new state."""

    def sequence_ids(self) -> Int64:
        """Return the ids of all open sequences, in the order in which they were opened."""
        # An id's high bits are the serial number of its `open`.
        return np.sort(self._ids[self._ids >= 0])

    def resident_ids(self) -> Int64:
        """Return the ids of the sequences that are on the device and stay there, as above."""
        ids = self.sequence_ids()
        return ids[self._away[self._rows_of(ids)] == 0] if self._num_away else ids

    def checked_id(self, seq_id: int) -> int:
        """Return the id of an open sequence; refuse any other."""
        self._row_of(seq_id)
        return int(seq_id)

    def check_distinct(self, seq_ids: Integers) -> None:
        """Refuse ids of sequences that are not open, and repeated ones."""
        self._distinct_rows_now(seq_ids)

    def lengths(self, seq_ids: Integers) -> Int64:
        """Return the number of tokens of each sequence, ``int64[B]``."""
        return self._length.take(self._rows_of(seq_ids))

    def state(self, seq_id: int) -> SequenceState[int]:
        """Return ``(L, c, r, s)`` of one sequence."""
        row = np.array([self._row_of(seq_id)])
        length, coded, ring_start, sinks = (int(field[0]) for field in self._states(row))
        return SequenceState(length, coded, ring_start, sinks)

    def block_table(self, seq_ids: Integers) -> Int32:
        """Return the pages of each sequence in block order.

        Returns
        -------
        int32[B, max_blocks]
            The null page 0 where a block was evicted and as padding; ``max_blocks`` is that of the
            longest sequence of the batch.
        """
        rows = self._readable_rows(seq_ids, "read")
        return self._table[rows, : self._max_blocks(rows)]

    def reads(self, seq_ids: Integers, overlay: bool) -> Reads:
        """Return what attention reads of each sequence.

        Parameters
        ----------
        seq_ids : integers
            The batch.
        overlay : bool
            Whether the layer keeps the exact window. A layer without it reads all from pages.
        """
        rows = self._readable_rows(seq_ids, "read")
        length, _, ring_start, sinks = self._states(rows)
        if overlay:
            first, stop = np.minimum(sinks, ring_start), ring_start
        else:
            first, stop = np.zeros_like(length), length
        return Reads(length, first, stop, self._keep[rows], self._start[rows])

    def window_slots(self, seq_ids: Integers) -> Int32:
        """Return the window slot of each sequence, -1 without one, ``int32[B]``."""
        return self._slot[self._readable_rows(seq_ids, "read")]

    def sink_records(self, seq_ids: Integers) -> Int32:
        """Return the sink record of each sequence's block 0, -1 without one, ``int32[B]``."""
        return self.row_sink_records(self._readable_rows(seq_ids, "read"))

    @property
    def resident_tokens(self) -> int:
        """Positions whose block has a page, summed over sequences (shared pages count for each).

        Sequences that are swapped out have none.
        """
        here = self._away < AWAY
        return int(self._length[here].sum()) - self.page_size * int(self._evicted[here].sum())

    @property
    def logical_tokens(self) -> int:
        """Tokens of all sequences, evicted ones included."""
        return int(self._length.sum())

    @property
    def num_resident_blocks(self) -> int:
        """Blocks that have a page, summed over sequences (shared pages count for each)."""
        here = self._away < AWAY
        blocks = -(-self._length[here] // self.page_size)
        return int(blocks.sum()) - int(self._evicted[here].sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the page tables and per-sequence state."""
        arrays = (self._table, self._fields, self._slot, self._ids, self._touched)
        return sum(array.nbytes for array in arrays)

    def page_fill(self) -> Int64:
        """Return how many tokens each page holds, ``int64[num_pages]``; 0 without an owner.

        For a page that several sequences share it is the most that any of them has there.
        """
        fill = np.zeros(self.pool.num_pages, np.int64)
        rows = np.flatnonzero(self._length)
        length = self._length[rows]
        blocks = -(-length // self.page_size)
        table = self._table[np.repeat(rows, blocks), ranges(blocks)]
        tokens = np.full(table.size, self.page_size)
        tokens[np.cumsum(blocks) - 1] = length - (blocks - 1) * self.page_size
        np.maximum.at(fill, table, tokens)
        # Evicted blocks stand for the null page.
        fill[0] = 0
        return fill

    def resident_lengths(self, seq_ids: Integers) -> Int64:
        """Return the number of positions of each sequence whose block has a page, ``int64[B]``."""
        rows = self._readable_rows(seq_ids, "read")
        return self._length.take(rows) - self.page_size * self._evicted.take(rows)

    def slots_of(self, seq_id: int, positions: Integers) -> Int64:
        """Return the page slots of positions of one sequence, -1 where evicted, ``int64[n]``.

        Raises
        ------
        ArgumentError
            If a position is not in ``[0, length)``.
        """
        row = int(self._readable_rows([seq_id], "read")[0])
        wanted = integers("positions", positions)
        length = int(self._length[row])
        if wanted.size and (int(wanted.min()) < 0 or int(wanted.max()) >= length):
            worst = int(wanted[(wanted < 0) | (wanted >= length)][0])
            raise ArgumentError(
                f"position {worst} is not in sequence {int(seq_id)} of {length} tokens"
            )
        return self.page_slots(np.full(wanted.size, row), wanted)

    def csr(self, seq_ids: Integers) -> PageIndices:
        """Return the page tables without evicted blocks, in compressed rows."""
        rows = self._readable_rows(seq_ids, "read")
        table = self._table[rows, : self._max_blocks(rows)]
        member, block = np.nonzero(table)
        indptr = np.zeros(rows.size + 1, np.int32)
        np.cumsum(np.bincount(member, minlength=rows.size), out=indptr[1:])
        positions = (block * self.page_size).astype(np.int32)
        last_len = np.zeros(rows.size, np.int32)
        filled = np.flatnonzero(indptr[1:] > indptr[:-1])
        ends = positions[indptr[1:][filled] - 1]
        last_len[filled] = np.minimum(self._length[rows[filled]] - ends, self.page_size)
        return PageIndices(indptr, table[member, block], last_len, positions)

    def _states(self, rows: Int64) -> SequenceState[Int64]:
        length = self._length.take(rows, mode="clip")
        if not self.window_tokens:
            return SequenceState(length, length, length, np.zeros(length.size, np.int64))
        return SequenceState(
            length,
            self._coded.take(rows, mode="clip"),
            self._ring_start.take(rows, mode="clip"),
            self._sinks.take(rows, mode="clip"),
        )

    def _max_blocks(self, rows: Int64) -> int:
        longest = int(self._length[rows].max()) if rows.size else 0
        return -(-longest // self.page_size)
