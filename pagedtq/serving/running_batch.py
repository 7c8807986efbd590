"""Sequences that decode, as a struct of arrays, and the tokens that were generated for them."""

from __future__ import annotations

import numpy as np

from ..paging.arguments import Bools, Int32, Int64

#: Whole-number fields of a decoding sequence, in order.
FIELDS = ("number", "track", "seqs", "length", "left", "generated", "priority", "token_rows")
SEQS = FIELDS.index("seqs")


class TokenRows:
    """Generated tokens, one row per sequence; rows are taken, written, copied and given back."""

    def __init__(self) -> None:
        self._tokens = np.zeros((0, 64), np.int32)
        self._free: list[int] = []

    def take(self) -> int:
        """Return a row that nobody uses."""
        self.reserve(1)
        return self._free.pop()

    def reserve(self, count: int, width: int = 0) -> None:
        """Have so many rows that nobody uses, and room for so many tokens in each."""
        while len(self._free) < count:
            self._grow()
        self._widen(width)

    def give_back(self, rows: Int64) -> None:
        """Let others use rows."""
        self._free.extend(rows.tolist())

    def write(self, rows: Int64, places: Int64, tokens: Int32) -> None:
        """Write one token into each row, where there is room for it."""
        self._tokens[rows, places] = tokens

    def begin(self, row: int, tokens: Int32) -> None:
        """Write the first tokens of a row, where there is room for them."""
        self._tokens[row, : tokens.size] = tokens

    def read(self, row: int, count: int) -> Int32:
        """Return a copy of the first tokens of a row."""
        return self._tokens[row, :count].copy()

    def copy(self, sources: Int64, targets: Int64) -> None:
        """Overwrite rows with others, all at once."""
        self._tokens[targets] = self._tokens[sources]

    def _grow(self) -> None:
        old, width = self._tokens.shape
        grown = np.zeros((max(16, 2 * old), width), np.int32)
        grown[:old] = self._tokens
        self._tokens = grown
        self._free[:0] = range(len(grown) - 1, old - 1, -1)

    def _widen(self, width: int) -> None:
        rows, old = self._tokens.shape
        if width > old:
            grown = np.zeros((rows, max(width, 2 * old)), np.int32)
            grown[:, :old] = self._tokens
            self._tokens = grown


class RunningBatch:
    """Sequences that decode, in the order in which they began or came back.

    Attributes
    ----------
    number, track : int64[n]
        Their request, and which of its sequences they are.
    seqs : int64[n]
        Sequences of the page tables.
    length : int64[n]
        Tokens stored.
    left, generated : int64[n]
        Tokens still to sample, and sampled.
    priority : int64[n]
        Of their request.
    token_rows : int64[n]
        Rows of `TokenRows`, -1 if tokens are not kept.
    last : int32[n]
        The token sampled last, which the next step stores.
    """

    number: Int64
    track: Int64
    seqs: Int64
    length: Int64
    left: Int64
    generated: Int64
    priority: Int64
    token_rows: Int64
    last: Int32

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._fields = np.zeros((len(FIELDS), 16), np.int64)
        self._last = np.zeros(16, np.int32)
        self.size = 0
        self._view()

    def push(self, fields: tuple[int, ...], last: int) -> None:
        """Add a sequence; ``fields`` in the order of ``FIELDS``."""
        self.reserve(1)
        self._fields[:, self.size] = fields
        self._last[self.size] = last
        self.size += 1
        self._view()

    def extend(self, fields: Int64, last: Int32) -> None:
        """Add sequences as `take_out` returned them."""
        self.reserve(last.size)
        at = slice(self.size, self.size + last.size)
        self._fields[:, at], self._last[at] = fields, last
        self.size += last.size
        self._view()

    def reserve(self, count: int) -> None:
        """Have room for so many more."""
        more = self.size + count - self._last.size
        if more > 0:
            more = max(more, self._last.size)
            fields = np.pad(self._fields, ((0, 0), (0, more)))
            self._fields, self._last = fields, np.pad(self._last, (0, more))
            self._view()

    def remove(self, gone: Bools) -> None:
        """Remove the marked sequences; the others keep their order."""
        kept = np.flatnonzero(~gone)
        self._fields[:, : kept.size] = self._fields[:, kept]
        self._last[: kept.size] = self._last[kept]
        self.size = kept.size
        self._view()

    def take_out(self, chosen: Bools) -> tuple[Int64, Int32]:
        """Remove the marked sequences; return their fields and their last tokens."""
        fields, last = self.fields_of(chosen), self.last[chosen]
        self.remove(chosen)
        return fields, last

    def fields_of(self, chosen: Bools) -> Int64:
        """Return the fields of the marked sequences, ``int64[fields, n]``."""
        return self._fields[:, : self.size][:, chosen]

    def advance(self, steps: int) -> None:
        """Store and sample tokens in every sequence."""
        self.length += steps
        self.left -= steps
        self.generated += steps

    def hindmost(self) -> int:
        """Return the sequence that others come before: by priority, then by age."""
        worst = np.flatnonzero(self.priority == self.priority.max())
        worst = worst[self.number[worst] == self.number[worst].max()]
        return int(worst[np.argmax(self.track[worst])])

    def pages_for_next(self) -> int:
        """Return how many sequences begin a block with their next token."""
        return int(np.count_nonzero(self.length % self._page_size == 0))

    def pages_taken(self, steps: int) -> Int64:
        """Return the pages taken after each of the next steps, cumulated, ``int64[steps]``.

        A sequence with t free slots in its last page takes one in step t + 1, and in every
        ``page_size``-th step after that.
        """
        crossings = np.bincount(-self.length % self._page_size, minlength=self._page_size)
        taken: Int64 = crossings.take(np.arange(steps), mode="wrap").cumsum()
        return taken

    def _view(self) -> None:
        (
            self.number,
            self.track,
            self.seqs,
            self.length,
            self.left,
            self.generated,
            self.priority,
            self.token_rows,
        ) = self._fields[:, : self.size]
        self.last = self._last[: self.size]
