"""Sequences, their pages and their exact windows: every operation that changes them.

The rules are those of the exact window (`L, c, r, s` in `SequenceState`), vectorised over a batch.
Each operation checks everything first and changes after, so that a failed call changes nothing.
No byte of a page is touched here: a `StepPlan` says what a data plane has to do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..errors import ArgumentError, ArgumentTypeError, EvictedError
from . import integrity
from .adoption import Adoption
from .arguments import Int32, Int64, Integers, integer, integers
from .block_chain import BlockChain, Tokens
from .exclusive import exclusive
from .one_row import OneRow
from .sequence_rows import AWAY
from .swaps import Swaps


class PageTables(Adoption, Swaps, OneRow):
    """Page tables of all sequences over one page pool and one window pool.

    Parameters
    ----------
    page_size : int
        Tokens in a page, P.
    num_pages : int
        Pages of the pool, the null page 0 included.
    window_tokens : int
        Ring rows of a sequence, W; a multiple of ``page_size``, 0 for no window.
    num_sinks : int
        First tokens of a sequence kept exact, S; at most ``page_size``, unused without a window.
    num_window_slots : int
        Sequences that can own a window at a time; at least 1 with a window, unused without.
    sharing : SharingOptions, optional
        Share pages between sequences that begin alike; without it only forks share.
    num_host_pages : int
        Pages of the host tier, to which sequences can be swapped out.

    Attributes
    ----------
    pool : PagePool
        Owners of pages.
    windows : WindowPool
        Owners of window slots, and the sink record of each block-0 page.
    fences : Fences
        What is freed while work in flight may read it waits here.
    prefix : PrefixIndex or None
        Which page holds which block, with ``sharing``.
    host : HostPool
        Owners of pages of the host tier.
    num_blocks_evicted : int
        Blocks dropped by `evict`; only grows.
    """

    num_blocks_evicted = 0

    @exclusive
    def open(
        self,
        token_ids: Tokens | BlockChain | None = None,
        *,
        salt: bytes = b"",
        extra_keys: Mapping[int, bytes] | None = None,
        block_keys: Sequence[bytes] | None = None,
    ) -> int:
        """Open a sequence and return its id, which is never used again in this process.

        With tokens it begins with the pages that hold its first blocks already: its length is
        then a multiple of the page size, and what is left of the tokens is to be appended. Without
        tokens it begins empty and is never shared.

        Parameters
        ----------
        token_ids : integers or BlockChain, optional
            Its first tokens, in int32, or what `prepare` made of them.
        salt : bytes
            Sequences with different salts never share a page.
        extra_keys : mapping of block to bytes, optional
            What else decides the keys and values of a block, opaque.
        block_keys : sequence of bytes, optional
            Instead of tokens: keys of its leading blocks, made by the caller, which must name all
            that decides a block's keys and values. More can follow with `extend_keys`.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            For bad tokens, salts or keys.
        """
        if isinstance(token_ids, BlockChain):
            chain: BlockChain | None = token_ids.copy()
        else:
            chain = self.prepare(token_ids, salt=salt, extra_keys=extra_keys, block_keys=block_keys)
        pages = [] if chain is None else self.find_pages(chain)
        self._grow_width(len(pages))
        ids, rows = self._new_rows(1)
        self._adopt(int(rows[0]), chain, pages)
        return int(ids[0])

    @exclusive
    def open_many(self, count: int) -> Int64:
        """Open ``count`` empty sequences without tokens; return their ids, ``int64[count]``."""
        ids, rows = self._new_rows(integer("count", count, 0))
        self._known[rows] = -1
        return ids

    @exclusive
    def close(self, seq_ids: int | Integers) -> Int32:
        """Close sequences: drop their pages, each sequence's last first, and their windows.

        Sequences that are swapped out leave the host.

        Returns
        -------
        int32[n]
            Pages that became free, in the order in which they joined the free queue.
        """
        self._refuse_open_step("close")
        if isinstance(seq_ids, int | np.integer):
            rows = np.array([self._row_of(seq_ids)])
        else:
            rows = self._distinct_rows(seq_ids)
        here = rows
        if self._num_away:
            swapped = self._away[rows] == AWAY
            here = rows[~swapped]
            self._refuse_away(here, "close")
            rows = np.concatenate((here, rows[swapped]))
        self.version += 1
        freed = self._drop_blocks(here, np.zeros(here.size, np.int64))
        if self.window_tokens:
            self.windows._release_row(self._slot[here])
        self._drop_swapped(rows[here.size :])
        self._recycle_rows(rows)
        return freed

    @exclusive
    def fork(self, seq_id: int) -> int:
        """Open a sequence that shares all pages and the window of another; takes no page."""
        self._refuse_open_step("fork")
        self._resident_row(seq_id, "fork")
        new_id, new_rows = self._new_rows(1)
        row, new_row = self._row_of(seq_id), int(new_rows[0])
        self.version += 1
        self.pool._retain_row(self._table[row])
        self._fields[:, new_row] = self._fields[:, row]
        self._table[new_row] = self._table[row]
        self._slot[new_row] = self._slot[row]
        self.windows._retain_row(self._slot[row : row + 1])
        self._share_chain(row, new_row)
        return int(new_id[0])

    @exclusive
    def truncate(self, seq_id: int, length: int) -> Int32:
        """Cut a sequence to its first ``length`` tokens.

        No byte moves; what the ring covers shrinks by what was cut and grows back.

        Returns
        -------
        int32[n]
            Pages that became free, the last block's first.

        Raises
        ------
        ArgumentError
            If ``length`` is negative or above the current length.
        EvictedError
            If the new end lies inside an evicted block.
        """
        self._refuse_open_step("truncate")
        row = self._resident_row(seq_id, "truncate")
        before = int(self._length[row])
        length = integer("length", length, 0, before)
        block, offset = divmod(length, self.page_size)
        if offset and self._table[row, block] == 0:
            raise EvictedError(
                f"cannot truncate sequence {seq_id} to {length} tokens: block {block} was evicted; "
                f"expected a multiple of {self.page_size} or a length inside a resident block"
            )
        self.version += 1
        freed = self._cut(np.array([row]), np.array([length]))
        if length < before:
            self._cut_chain(row, length)
        return freed

    @exclusive
    def evict(
        self, seq_id: int, blocks: Integers, boundary: tuple[int, int] | None = None
    ) -> Int32:
        """Drop whole blocks of a sequence; the others keep their places and positions.

        Parameters
        ----------
        seq_id : int
            The sequence.
        blocks : integers
            Block indices, each at most once: resident, and wholly below the ring's start r (which
            the open block never is). With block 0 the sinks go.
        boundary : (keep, start), optional
            Set the read boundary as well, see `set_start`.

        Returns
        -------
        int32[n]
            Pages that became free; shared ones only lose this owner.

        Raises
        ------
        ArgumentError
            If a block does not exist, is open, is held by the ring, or appears twice.
        EvictedError
            If a block was evicted before.
        """
        self._refuse_open_step("evict")
        row = self._resident_row(seq_id, "evict from")
        dropped = np.sort(self._evictable(seq_id, row, integers("blocks", blocks)))[::-1]
        if boundary is not None:
            self._hide(row, *self._checked_boundary(seq_id, row, *_pair(boundary)))
        if dropped.size == 0:
            return np.empty(0, np.int32)
        self.version += 1
        self._taint_rows(np.array([row]))
        freed = self._release_pages(self._table[row, dropped])
        self._table[row, dropped] = 0
        self._touch(row, int(dropped[-1]))
        self._evicted[row] += dropped.size
        self.num_blocks_evicted += dropped.size
        if dropped[-1] == 0:
            self._sinks[row] = 0
        return freed

    def check_evict(self, seq_id: int, blocks: Integers, boundary: tuple[int, int]) -> None:
        """Refuse what `evict` would refuse; changes nothing."""
        self._refuse_open_step("evict")
        row = self._resident_row(seq_id, "evict from")
        self._evictable(seq_id, row, integers("blocks", blocks))
        self._checked_boundary(seq_id, row, *_pair(boundary))

    @exclusive
    def set_start(self, seq_id: int, keep: int, start: int) -> None:
        """Let attention read only positions ``[0, keep)`` and ``[start, inf)`` of a sequence.

        Raises
        ------
        ArgumentError
            Unless ``0 <= keep <= start <= r``, the ring's start.
        """
        self._refuse_open_step("set_start")
        row = self._resident_row(seq_id, "set the start of")
        self._hide(row, *self._checked_boundary(seq_id, row, keep, start))

    def check_integrity(self) -> None:
        """Prove every invariant of the tables and pools; see `integrity.check_tables`.

        Raises
        ------
        IntegrityError
            Naming the first broken invariant.
        """
        integrity.check_tables(self)

    def _hide(self, row: int, keep: int, start: int) -> None:
        self._keep[row], self._start[row] = keep, start
        if keep < start:
            self._taint_rows(np.array([row]))

    def _evictable(self, seq_id: int, row: int, blocks: Int64) -> Int64:
        size, ring_start = self.page_size, self._ring_start_of(row)
        count = -(-int(self._length[row]) // size)
        if np.unique(blocks).size != blocks.size:
            raise ArgumentError(f"sequence {seq_id}: a block to evict appears twice")
        for block in blocks.tolist():
            if not 0 <= block < count:
                raise ArgumentError(f"sequence {seq_id} has no block {block}, only {count}")
            if self._table[row, block] == 0:
                raise EvictedError(f"sequence {seq_id}: block {block} was evicted before")
            if (block + 1) * size > int(self._length[row]):
                raise ArgumentError(f"sequence {seq_id}: block {block} is open")
            if (block + 1) * size > ring_start:
                raise ArgumentError(
                    f"sequence {seq_id}: block {block} ends at {(block + 1) * size}, inside the "
                    f"exact window, which starts at {ring_start}"
                )
        return blocks

    def _checked_boundary(self, seq_id: int, row: int, keep: int, start: int) -> tuple[int, int]:
        keep, start = integer("keep", keep, 0), integer("start", start, 0)
        ring_start = self._ring_start_of(row)
        if not keep <= start <= ring_start:
            raise ArgumentError(
                f"sequence {seq_id}: expected keep <= start <= {ring_start} (the start of the "
                f"exact window), got keep {keep}, start {start}"
            )
        return keep, start


def _pair(boundary: tuple[int, int]) -> tuple[int, int]:
    """Return a read boundary as two numbers, whatever these are."""
    try:
        keep, start = boundary
    except (TypeError, ValueError):
        raise ArgumentTypeError(
            f"boundary must be a pair (keep, start), got {type(boundary).__name__}"
        ) from None
    return keep, start
