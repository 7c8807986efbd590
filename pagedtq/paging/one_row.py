"""Operations on one sequence at a time, for callers that schedule request by request.

They work on the same arrays as the batched calls and cost a fraction of a batch of one. They know
no tokens: what is written is named by keys of the caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import ArgumentError, OutOfPages, StepError
from .arguments import MAX_TOKENS, ONLY_INT, Int32, integer, integers
from .block_chain import BlockChain, opaque_keys
from .block_keys import token_array
from .exclusive import exclusive
from .steps import Steps

#: What is looked into without a conversion.
LISTED = list, tuple


class OneRow(Steps):
    """Opening on found pages, growing, and publishing of single sequences."""

    @exclusive
    def open_on(
        self, block_keys: Sequence[bytes], pages: Sequence[int], num_tokens: int | None = None
    ) -> int:
        """Open a sequence on pages that were found, and return its id.

        Parameters
        ----------
        block_keys : sequence of bytes
            Keys of its first blocks.
        pages : sequence of int
            Pages that hold them, as `PrefixIndex.longest` finds them; they become its own.
        num_tokens : int, optional
            Tokens that were looked up, for the count of lookups.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If a page does not hold its block, a key is not bytes, or a number is none.
        """
        keys: list[bytes] = []
        found: list[int] = []
        if type(block_keys) is not list or block_keys or type(pages) not in LISTED or pages:
            keys, found = self._blocks_held(block_keys, pages)
        if num_tokens is not None:
            num_tokens = integer("num_tokens", num_tokens, 0)
        self._grow_width(len(keys))
        seq_id, row = self._new_row()
        self._adopt(row, BlockChain(keys, opaque=True), found, num_tokens)
        return seq_id

    def _blocks_held(
        self, block_keys: Sequence[bytes], pages: Sequence[int]
    ) -> tuple[list[bytes], list[int]]:
        """Return keys and pages of blocks as lists, if each page holds its block."""
        keys = opaque_keys(block_keys)
        if type(pages) in LISTED and ONLY_INT.issuperset(map(type, pages)):
            found = list(pages)
        else:
            found = integers("pages", pages).tolist()
        if len(keys) != len(found):
            raise ArgumentError(f"expected one page per key, got {len(keys)} and {len(found)}")
        prefix, last = self.prefix, self.pool.num_pages - 1
        within = not found or 0 < min(found) <= max(found) <= last
        if prefix is None or not within or list(map(prefix.key_of, found)) != keys:
            for key, page in zip(keys, found, strict=True):
                if prefix is None or not 0 < page <= last or prefix.key_of(page) != key:
                    raise ArgumentError(f"page {page} does not hold block {key.hex()}")
        if len(set(found)) < len(found):
            raise ArgumentError(f"a sequence has a page once, got pages {found}")
        return keys, found

    @exclusive
    def lengthen(self, seq_id: int, length: int, keep_free: int = 0) -> list[int]:
        """Make room in one sequence for positions below ``length``; return its new pages.

        This is `reserve` and `commit` of one sequence; a shorter length changes nothing. Nothing is
        published, see `publish_keys`, and nothing has to be copied.

        Raises
        ------
        UnknownSequence, ArgumentError, ArgumentTypeError
            For a bad id or number.
        OutOfPages, OutOfWindowSlots
            If it does not fit, or would leave less than ``keep_free`` pages free.
        StepError
            If a step is open, or the sequence shares its open page or its exact window: then bytes
            have to be copied, and a plan of `reserve` says which.
        """
        if self._step is not None:
            self._refuse_open_step("lengthen")
        row = self._row_of(seq_id)
        if self._num_away:
            self._refuse_away(np.array([row]), "append to")
        if type(length) is not int or not 0 <= length <= MAX_TOKENS:
            length = integer("length", length, 0, MAX_TOKENS)
        size, old = self.page_size, self._length.item(row)
        if (
            old < length
            and length <= old + -old % size
            and not (self.window_tokens or self._twins.count)
        ):
            # Inside the open page, as most decode steps are: done if nobody else knows it.
            page = self._table.item(row, old // size)
            if self.pool.ref_counts.item(page) == 1 and not (
                self.prefix is not None and self.prefix.holds(page)
            ):
                self.version += 1
                self._length[row] = length
                return []
        return self._lengthen(seq_id, row, old, length, keep_free)

    def _lengthen(self, seq_id: int, row: int, old: int, length: int, keep_free: int) -> list[int]:
        """Do what `lengthen` does, of a row and a length that are checked."""
        size = self.page_size
        if type(keep_free) is not int or keep_free < 0:
            keep_free = integer("keep_free", keep_free, 0)
        if length <= old:
            return []
        first, stop = -(-old // size), -(-length // size)
        open_page = self._table.item(row, old // size) if old % size else 0
        need, free = stop - first, self.pool.num_free - keep_free
        shared = self.pool.num_shared and open_page and self.pool.ref_counts.item(open_page) > 1
        slot = self._slot.item(row) if self.window_tokens else -1
        if shared or (slot >= 0 and self.windows.ref_counts.item(slot) > 1):
            raise StepError(
                f"sequence {seq_id} shares its {'open page' if shared else 'exact window'}: append "
                "with reserve, whose plan says what has to be copied"
            )
        if need and need > free:
            raise OutOfPages(need, max(free, 0), self.pool.num_pages - 1)
        if self.window_tokens:
            plan = self._reserve(np.array([seq_id]), length - old)
            self._end_step(plan, "commit")
            taken: list[int] = self._table[row, first:stop].tolist()
            return taken
        if need and self.retention is not None:
            self.retention._refresh()
        if stop > self._table.shape[1]:
            self._grow_width(stop)
        pages, _, _ = self._take(need)
        self.version += 1
        self._length[row] = length
        if open_page and self._twins.count:
            self._twins.part(np.array([open_page], np.int32))
        if open_page and self.prefix is not None and self.prefix.key_of(open_page) is not None:
            self.prefix.forget(np.array([open_page], np.int32))
        if not need:
            return []
        self._table[row, first:stop] = pages
        new: list[int] = pages.tolist()
        return new

    def length_of(self, seq_id: int) -> int:
        """Return the number of tokens of one sequence."""
        return self._length.item(self._row_of(seq_id))

    def num_published(self, seq_id: int) -> int:
        """Return how many blocks of a sequence were published or found."""
        return self._published.item(self._row_of(seq_id))

    @exclusive
    def publish_keys(
        self, seq_id: int, block_keys: Sequence[bytes], token_ids: Int32 | None = None
    ) -> None:
        """Publish the next blocks of a sequence that names its own; their bytes are written.

        Those that depend on pruned tokens are counted as published, but nobody finds them.

        Parameters
        ----------
        seq_id : int
            A sequence opened with ``block_keys`` or `open_on`.
        block_keys : sequence of bytes
            Keys of the blocks behind those published already.
        token_ids : int32[n], optional
            Their tokens, for whoever observes the index.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If the sequence names no blocks, has other keys for them, or is too short, or keys or
            tokens are none.
        """
        keys = opaque_keys(block_keys)
        row = self.check_names(seq_id, keys)
        stop = self._published.item(row) + len(keys)
        if stop * self.page_size > self._length.item(row):
            raise ArgumentError(
                f"sequence {seq_id} has {self._length.item(row)} tokens, not {stop} whole blocks"
            )
        if token_ids is not None:
            token_ids = token_array("token_ids", token_ids)
            if token_ids.size != len(keys) * self.page_size:
                raise ArgumentError(
                    f"token_ids of {len(keys)} blocks must be {len(keys) * self.page_size}, "
                    f"got {token_ids.size}"
                )
        if keys:
            self._publish_named(seq_id, keys, token_ids)

    def check_names(self, seq_id: int, keys: list[bytes]) -> int:
        """Refuse keys that `publish_keys` would refuse for a sequence; return its row.

        Raises
        ------
        ArgumentError
            If the sequence names no blocks, or has other keys for those behind the published ones.
        """
        row = self._resident_row(seq_id, "publish blocks of")
        chain = self._chains.get(row)
        if chain is None or not chain.opaque:
            raise ArgumentError(f"sequence {seq_id} was not opened with block_keys")
        first = self._published.item(row)
        known = chain.keys[first : first + len(keys)]
        if known and known != keys[: len(known)]:
            raise ArgumentError(f"sequence {seq_id} was opened with other keys")
        return row

    def _publish_named(
        self,
        seq_id: int,
        keys: list[bytes],
        token_ids: Int32 | None = None,
        taken: Sequence[int] = (),
    ) -> None:
        """Publish the next blocks of a sequence, of which all is checked: nothing can go wrong.

        ``taken`` are the pages of the first blocks to publish, all of them or none, if they were
        just taken: such pages hold no block.
        """
        row = self._row_of(seq_id)
        chain = self._chains[row]
        first = self._published.item(row)
        stop = first + len(keys)
        chain.keys += keys[len(chain.keys) - first :]
        self._keyed[row] = len(chain.keys) * self.page_size
        self._published[row] = stop
        taint = self._taint.item(row)
        if taint:
            # What depends on pruned tokens is named, so that the next block finds its place, but
            # nobody else may find it.
            stop = max(first, min(stop, taint // self.page_size))
            if token_ids is not None:
                token_ids = token_ids[: (stop - first) * self.page_size]
        if stop == first or self.prefix is None:
            return
        if taken:
            parent = chain.keys[first - 1] if first else None
            self.prefix.enter(keys[: stop - first], taken[: stop - first], parent, token_ids)
        else:
            self._publish_blocks(row, first, stop, token_ids)
