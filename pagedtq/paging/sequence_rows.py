"""Storage of all sequences as a struct of arrays: one row each, recycled, growing by doubling."""

from __future__ import annotations

import itertools

import numpy as np

from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    StepError,
    SwappedError,
    UnknownSequence,
)
from .arguments import (
    MAX_PAGE_SIZE,
    MAX_TOKENS,
    Bools,
    Int32,
    Int64,
    Integers,
    integer,
    integers,
    ranges,
)
from .exclusive import Turn
from .fences import Fences
from .page_pool import PagePool
from .window_pool import WindowPool

#: Low bits of a sequence id that hold its row.
ROW_BITS = 24
ROW_MASK = (1 << ROW_BITS) - 1

#: Where a sequence is that is not simply on the device: on the way out with its pages still there,
#: on the host, and on the way back.
LEAVING, AWAY, RETURNING = 1, 2, 3
#: A batch that no ids are.
NO_BATCH: tuple[bytes | None, Int64] = None, np.empty(0, np.int64)

# One serial per `open`, shared by all tables of the process: with the row below it an id is never
# used again, and an id of other tables is never mistaken for one of these.
_serials = itertools.count(1)


class SequenceRows:
    """Rows of sequences, their ids, and the dense page table.

    Row fields (``int64[capacity]``): ``length`` L, ``coded`` c, ``ring_start`` r, ``sinks`` s, the
    read boundaries ``keep`` and ``start``, and ``evicted``, the number of null entries among the
    row's blocks. Without a window c, r and s are not kept up to date: they are L, L and 0. The next
    five belong to `SharedPrefixes`. ``away`` says where the sequence is: 0 on the device, else
    `LEAVING`, `AWAY` or `RETURNING`.
    ``slot`` (``int32[capacity]``) is the window slot or -1; ``table`` (``int32[capacity, width]``)
    holds page ids, 0 where a block was evicted and from ``ceil(L / P)`` on. A row without a
    sequence is all zeros, its slot -1. ``touched`` (``int64[3, capacity]``) says when a row's page
    table was written last, counted in ``touches``, when before that, and from which block on the
    last time. New pages behind a row's end are not noted, and a row that is opened has a new id
    instead.
    """

    # Rows of `_fields`, rebound when it grows.
    _length: Int64
    _coded: Int64
    _ring_start: Int64
    _sinks: Int64
    _keep: Int64
    _start: Int64
    _evicted: Int64
    _known: Int64
    _prompt_end: Int64
    _published: Int64
    _taint: Int64
    _keyed: Int64
    _away: Int64
    _table: Int32

    def __init__(
        self,
        page_size: int,
        num_pages: int,
        window_tokens: int = 0,
        num_sinks: int = 0,
        num_window_slots: int = 0,
    ) -> None:
        self.page_size = integer("page_size", page_size, 1, MAX_PAGE_SIZE)
        self.window_tokens = integer("window_tokens", window_tokens, 0, MAX_TOKENS)
        if self.window_tokens % self.page_size:
            raise ArgumentError(
                f"window_tokens must be a multiple of page_size {page_size}, got {window_tokens}"
            )
        # Sinks are part of the overlay: without a window there are none.
        sinks = integer("num_sinks", num_sinks, 0, self.page_size)
        self.num_sinks = sinks if self.window_tokens else 0
        slots = integer("num_window_slots", num_window_slots, 1 if self.window_tokens else 0)
        # NumPy takes three times as long to add a Python integer to a small array as one of these.
        self._size, self._last = np.array(self.page_size), np.array(self.page_size - 1)
        self.pool = PagePool(num_pages)
        self.windows = WindowPool(slots if self.window_tokens else 0, num_pages)
        self._turn: Turn = [None]
        self.fences = Fences(self.pool, self.windows, self._turn)
        #: Grows with every change; tells a `StepPlan` whether its lazy arrays still hold.
        self.version = 0
        self._fields = np.zeros((13, 0), np.int64)
        self._ids = np.empty(0, np.int64)
        self._slot = np.empty(0, np.int32)
        self._table = np.zeros((0, 8), np.int32)
        self._touched = np.empty((3, 0), np.int64)
        self._touches = 0
        # The last valid batch, as its ids' bytes and its rows, until a row is closed.
        self._batch = NO_BATCH
        self._free_rows: list[int] = []
        #: Sequences that are on the host, or on the way from or to it.
        self._num_away = 0
        self._grow_rows(16)

    @property
    def turn(self) -> Turn:
        """What a caller takes who makes several changes as one; see `exclusive`."""
        return self._turn

    @property
    def num_sequences(self) -> int:
        """Open sequences."""
        return self._ids.size - len(self._free_rows)

    def _rows_of(self, seq_ids: Integers) -> Int64:
        """Return the rows of sequences; refuse unknown ids."""
        ids = integers("seq_ids", seq_ids)
        rows = ids & ROW_MASK
        # `take` clips: an id whose row does not exist meets an id of another row, or the -1 of a
        # free one.
        known = (self._ids.take(rows, mode="clip") == ids) & (ids > 0)
        if not known.all():
            raise self._unknown(int(ids[~known][0]))
        return rows

    def _distinct_rows(self, seq_ids: Integers) -> Int64:
        """Return the rows of sequences, read only; refuse unknown and repeated ids.

        For who has the turn: it remembers the batch. Others take `_distinct_rows_now`.
        """
        ids = integers("seq_ids", seq_ids)
        # A batch decodes for many steps: the same ids again need no second look.
        batch = ids.tobytes()
        if batch == self._batch[0]:
            return self._batch[1]
        rows = self._rows_of(ids)
        if rows.size > 1:
            order = np.arange(rows.size)
            # NumPy keeps the last of several values assigned to one place.
            self._scratch[rows] = order
            self._refuse_repeated(rows, self._scratch.take(rows, mode="clip") == order)
        rows.flags.writeable = False
        self._batch = batch, rows
        return rows

    def _distinct_rows_now(self, seq_ids: Integers) -> Int64:
        """Do what `_distinct_rows` does and change nothing, so that it needs no turn."""
        ids = integers("seq_ids", seq_ids)
        # One reading: another thread may put the next batch in its place.
        known, known_rows = self._batch
        if ids.tobytes() == known:
            return known_rows
        rows = self._rows_of(ids)
        first = np.zeros(rows.size, np.bool_)
        first[np.unique(rows, return_index=True)[1]] = True
        self._refuse_repeated(rows, first)
        return rows

    def _refuse_repeated(self, rows: Int64, unique: Bools) -> None:
        """Refuse a batch unless all its rows are met once."""
        if not unique.all():
            twice = int(self._ids[rows[~unique][0]])
            raise ArgumentError(f"sequence {twice} appears twice in a batch of {rows.size}")

    def _row_of(self, seq_id: int) -> int:
        """Return the row of one sequence."""
        if type(seq_id) is not int:
            if isinstance(seq_id, bool | np.bool_) or not isinstance(seq_id, int | np.integer):
                raise ArgumentTypeError(f"seq_id must be an integer, got {type(seq_id).__name__}")
            seq_id = int(seq_id)
        row = seq_id & ROW_MASK
        if row >= self._ids.size or self._ids.item(row) != seq_id:
            raise self._unknown(seq_id)
        return row

    def _resident_rows(self, seq_ids: Integers, operation: str) -> Int64:
        """Return the rows of distinct sequences that are on the device and stay there."""
        rows = self._distinct_rows(seq_ids)
        if self._num_away:
            self._refuse_away(rows, operation)
        return rows

    def _resident_rows_now(self, seq_ids: Integers, operation: str) -> Int64:
        """Do what `_resident_rows` does and change nothing, so that it needs no turn."""
        rows = self._distinct_rows_now(seq_ids)
        if self._num_away:
            self._refuse_away(rows, operation)
        return rows

    def _resident_row(self, seq_id: int, operation: str) -> int:
        """Return the row of one sequence that is on the device and stays there."""
        row = self._row_of(seq_id)
        if self._num_away:
            self._refuse_away(np.array([row]), operation)
        return row

    def _readable_rows(self, seq_ids: Integers, operation: str) -> Int64:
        """Return the rows of sequences whose pages are on the device."""
        ids = integers("seq_ids", seq_ids)
        known, known_rows = self._batch
        rows = known_rows if ids.tobytes() == known else self._rows_of(ids)
        if self._num_away and int(self._away.take(rows).max(initial=0)) >= AWAY:
            self._refuse_away(rows[self._away[rows] >= AWAY], operation)
        return rows

    def _refuse_away(self, rows: Int64, operation: str) -> None:
        """Refuse rows that are swapped out, or on the way out or in."""
        away = self._away.take(rows)
        if not away.any():
            return
        worst = int(np.flatnonzero(away)[0])
        seq_id = int(self._ids[rows[worst]])
        if away[worst] == AWAY:
            raise SwappedError(
                f"cannot {operation} sequence {seq_id}: it is swapped out; swap it in, or close it"
            )
        raise StepError(
            f"cannot {operation} sequence {seq_id}: it is being swapped; commit or abort the swap"
        )

    def _unknown(self, seq_id: int) -> UnknownSequence:
        return UnknownSequence(
            f"sequence {seq_id} is not open here (never opened, closed, or of another cache; "
            f"{self.num_sequences} are open)"
        )

    def _new_rows(self, count: int) -> tuple[Int64, Int64]:
        """Open ``count`` rows; return their ids and the rows."""
        self._grow_for(count)
        start = len(self._free_rows) - count
        rows = np.array(self._free_rows[start:][::-1], np.int64)
        del self._free_rows[start:]
        ids = (next(_serials) << ROW_BITS) | rows
        self._ids[rows] = ids
        return ids, rows

    def _new_row(self) -> tuple[int, int]:
        """Open one row; return its id and the row."""
        if not self._free_rows:
            self._grow_rows(self.num_sequences + 1)
        row = self._free_rows.pop()
        seq_id = (next(_serials) << ROW_BITS) | row
        self._ids[row] = seq_id
        return seq_id, row

    def _grow_for(self, count: int) -> None:
        """Have room for ``count`` more rows."""
        if count > len(self._free_rows):
            self._grow_rows(self.num_sequences + count)

    def _recycle_rows(self, rows: Int64) -> None:
        """Close rows whose pages and slots are gone already."""
        self._batch = NO_BATCH
        self._ids[rows] = -1
        self._fields[:, rows] = 0
        self._slot[rows] = -1
        self._free_rows.extend(rows[::-1].tolist())

    def _grow_rows(self, needed: int) -> None:
        old = self._ids.size
        new = max(2 * old, needed)
        if new > ROW_MASK:
            raise ArgumentError(f"at most {ROW_MASK} sequences can be open, {needed} needed")
        fields = np.zeros((self._fields.shape[0], new), np.int64)
        fields[:, :old] = self._fields
        table = np.zeros((new, self._table.shape[1]), np.int32)
        table[:old] = self._table
        ids = np.concatenate((self._ids, np.full(new - old, -1, np.int64)))
        slot = np.concatenate((self._slot, np.full(new - old, -1, np.int32)))
        scratch, touched = np.zeros(new, np.int64), np.zeros((3, new), np.int64)
        touched[:, :old] = self._touched
        # Every array exists now: running out of memory above has changed nothing.
        self._fields, self._table, self._ids, self._slot = fields, table, ids, slot
        self._scratch, self._touched = scratch, touched
        self._touched_last, self._touched_before, self._touched_from = touched
        self._length, self._coded, self._ring_start, self._sinks = fields[:4]
        self._keep, self._start, self._evicted = fields[4:7]
        self._known, self._prompt_end, self._published = fields[7:10]
        self._taint, self._keyed, self._away = fields[10:]
        # The last one is taken first: low rows before high ones.
        self._free_rows[:0] = range(new - 1, old - 1, -1)

    def _grow_width(self, blocks: int) -> None:
        width = self._table.shape[1]
        if blocks > width:
            table = np.zeros((self._table.shape[0], max(2 * width, blocks)), np.int32)
            table[:, :width] = self._table
            self._table = table

    def _touch(self, rows: int | Int64, blocks: int | Int64) -> None:
        """Note that page tables were written from some block on, and not only behind their end."""
        self._touches += 1
        # Row by row: NumPy takes three times as long to index both at once.
        self._touched_before[rows] = self._touched_last[rows]
        self._touched_last[rows] = self._touches
        self._touched_from[rows] = blocks

    def _num_blocks(self, lengths: Int64) -> Int64:
        """Return the blocks of so many tokens, open ones included."""
        blocks: Int64 = (lengths + self._last) // self._size
        return blocks

    def _cut(self, rows: Int64, lengths: Int64) -> Int32:
        """Truncate rows; return the pages that became free."""
        freed = self._drop_blocks(rows, lengths)
        self._fields[:4, rows] = np.minimum(self._fields[:4, rows], lengths)
        ring_start = self._ring_start[rows] if self.window_tokens else lengths
        start = np.minimum(self._start[rows], ring_start)
        self._start[rows] = start
        self._keep[rows] = np.minimum(self._keep[rows], start)
        return freed

    def _drop_blocks(self, rows: Int64, lengths: Int64) -> Int32:
        """Drop the blocks behind ``lengths``: row by row, each row's last block first."""
        stop, first = self._num_blocks(self._length[rows]), self._num_blocks(lengths)
        counts = stop - first
        into = np.repeat(rows, counts)
        blocks = np.repeat(stop - 1, counts) - ranges(counts)
        pages = self._table[into, blocks]
        self._table[into, blocks] = 0
        self._touch(rows, first)
        null = pages == 0
        evicted = into[null]
        if evicted.size:
            np.subtract.at(self._evicted, evicted, 1)
            pages = pages[~null]
        return self._release_pages(pages)

    def _release_pages(self, pages: Int32) -> Int32:
        freed = self.pool.release(pages)
        if self.num_sinks and freed.size:
            self.windows.release_records(freed)
        return freed

    def _ring_start_of(self, row: int) -> int:
        return int(self._ring_start[row] if self.window_tokens else self._length[row])

    # Row-level views: for `StepPlan`, which holds rows instead of ids.

    def row_pages(self, rows: Int64, blocks: Int64) -> Int32:
        """Return the page of each (row, block), 0 where it was evicted, ``int32[n]``."""
        pages: Int32 = self._table[rows, blocks]
        return pages

    def page_slots(self, rows: Int64, positions: Int64) -> Int64:
        """Return the page slot of each (row, position), -1 where it was evicted, ``int64[n]``."""
        blocks, offsets = np.divmod(positions, self.page_size)
        pages = self.row_pages(rows, blocks).astype(np.int64)
        return np.where(pages > 0, pages * self.page_size + offsets, -1)

    def ring_rows(self, rows: Int64, positions: Int64) -> Int64:
        """Return the ring row of each (row, position), -1 without a slot, ``int64[n]``."""
        if not self.window_tokens:
            return np.full(positions.size, -1, np.int64)
        slots = self._slot[rows].astype(np.int64)
        places = slots * self.window_tokens + positions % self.window_tokens
        return np.where(slots >= 0, places, -1)

    def row_sink_records(self, rows: Int64) -> Int32:
        """Return the sink record of each row's block 0, -1 without one, ``int32[n]``."""
        records: Int32 = self.windows.sink_record[self._table[rows, 0]]
        return records
