"""Sequences as plain arrays, apart from any pool, and the proof that such arrays are sound."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import ArgumentError
from .arguments import MAX_TOKENS, Bools, Int32, Int64, ranges


class SequenceImage(NamedTuple):
    """Sequences and what they share.

    Attributes
    ----------
    states : int64[n, 6]
        ``L, c, r, s, keep, start`` of each sequence (see `SequenceState`, `Reads`).
    rings : int32[n]
        Ring of each sequence, -1 without one.
    blocks : int32[sum of ceil(L / P)]
        Page tables, one sequence after the other: 0 where a block was evicted, else 1 + the
        number of its page.
    num_pages : int
        Pages.
    num_filled : int
        Pages ``[0, num_filled)`` hold bytes; the others wait for the first block that is coded.
    num_rings : int
        Rings.
    """

    states: Int64
    rings: Int32
    blocks: Int32
    num_pages: int
    num_filled: int
    num_rings: int

    def block_counts(self, page_size: int) -> Int64:
        """Return the number of blocks of each sequence, ``int64[n]``."""
        return -(-self.states[:, 0] // page_size)

    def evicted_counts(self, page_size: int) -> Int64:
        """Return the number of evicted blocks of each sequence, ``int64[n]``."""
        member, _ = self._places(page_size)
        missing = np.bincount(member[self.blocks == 0], minlength=len(self.states))
        return missing.astype(np.int64, copy=False)

    def first_pages(self, page_size: int) -> Int32:
        """Return the pages that are some sequence's block 0, ascending, ``int32[n]``."""
        _, block = self._places(page_size)
        firsts = self.blocks[block == 0]
        return np.unique(firsts[firsts > 0]) - 1

    def sink_rows(self, page_size: int) -> Int64:
        """Return how many sinks the owners of each of `first_pages` have at most, ``int64[n]``."""
        member, block = self._places(page_size)
        places = np.flatnonzero((block == 0) & (self.blocks > 0))
        rows = np.zeros(self.num_pages, np.int64)
        np.maximum.at(rows, self.blocks[places] - 1, self.states[member[places], 3])
        return rows[self.first_pages(page_size)]

    def ring_spans(self) -> Int64:
        """Return the positions ``[begin, end)`` each ring holds for its owners.

        ``int64[num_rings, 2]``; begin = end = 0 where all its owners have an empty ring.
        """
        length, ring_start = self.states[:, 0], self.states[:, 2]
        used = np.flatnonzero((self.rings >= 0) & (ring_start < length))
        begin = np.full(self.num_rings, MAX_TOKENS + 1, np.int64)
        end = np.zeros(self.num_rings, np.int64)
        np.minimum.at(begin, self.rings[used], ring_start[used])
        np.maximum.at(end, self.rings[used], length[used])
        return np.stack((np.minimum(begin, end), end), axis=1)

    def page_tokens(self, page_size: int, sealed_only: bool) -> Int64:
        """Return how many leading slots of each page hold bytes that count, ``int64[num_pages]``.

        Slots behind them were never written by these sequences, or were truncated away.
        """
        member, block = self._places(page_size)
        limit = self.states[member, 1 if sealed_only else 0] - block * page_size
        tokens = np.zeros(self.num_pages + 1, np.int64)
        np.maximum.at(tokens, self.blocks, np.clip(limit, 0, page_size))
        return tokens[1:]

    def _places(self, page_size: int) -> tuple[Int64, Int64]:
        """Return sequence and block index of each entry of ``blocks``."""
        counts = self.block_counts(page_size)
        return np.repeat(np.arange(counts.size), counts), ranges(counts)


def check_image(
    image: SequenceImage, page_size: int, window_tokens: int, num_sinks: int, sealed_only: bool
) -> None:
    """Prove that an image obeys the invariants of the tables it is to enter.

    Parameters
    ----------
    image : SequenceImage
        Arrays of the right dtypes; nothing else about them is taken for granted.
    page_size, window_tokens, num_sinks : int
        Of the tables.
    sealed_only : bool
        Whether all layers keep the exact window.

    Raises
    ------
    ArgumentError
        Naming the first broken invariant and the sequence, page or ring.
    """
    _check_states(image.states, page_size, window_tokens, num_sinks)
    _check_blocks(image, page_size, window_tokens)
    if not np.array_equal(
        image.page_tokens(page_size, sealed_only) > 0,
        np.arange(image.num_pages) < image.num_filled,
    ):
        raise ArgumentError(f"pages [0, {image.num_filled}) must be those that hold bytes")
    _check_rings(image, page_size, window_tokens)


def _check_states(states: Int64, page_size: int, window_tokens: int, num_sinks: int) -> None:
    length, coded, ring_start, sinks, keep, start = states.T
    # First of all: the rest adds, and must not overflow.
    within = (states.min(axis=1, initial=0) >= 0) & (states.max(axis=1, initial=0) <= MAX_TOKENS)
    _require(within, f"has a state outside [0, {MAX_TOKENS}]")
    if window_tokens:
        _require((ring_start <= coded) & (coded <= length), "breaks r <= c <= L")
        _require(length - ring_start <= window_tokens, "breaks L - r <= W")
        _require(coded >= length // page_size * page_size, "has a whole block that is not coded")
        _require(sinks <= np.minimum(length, num_sinks), "breaks s <= min(S, L)")
    else:
        _require((coded == length) & (ring_start == length), "breaks r = c = L without a window")
        _require(sinks == 0, "has sinks without a window")
    _require((keep <= start) & (start <= ring_start), "breaks keep <= start <= r")


def _check_blocks(image: SequenceImage, page_size: int, window_tokens: int) -> None:
    blocks = image.blocks
    needed = sum(image.block_counts(page_size).tolist())
    if blocks.size != needed:
        raise ArgumentError(f"expected {needed} blocks, got {blocks.size}")
    member, block = image._places(page_size)
    _require((blocks >= 0) & (blocks <= image.num_pages), "names a page that is not there", member)
    ring_start = image.states[member, 2 if window_tokens else 0]
    readable = (block + 1) * page_size > ring_start
    _require((blocks > 0) | ~readable, "lacks the page of an open or exact block", member)
    _require((blocks > 0) | (block > 0) | (image.states[member, 3] == 0), "lacks block 0", member)
    held = np.flatnonzero(blocks)
    at_block = np.full(image.num_pages + 1, -1, np.int64)
    at_block[blocks[held]] = block[held]
    missing = np.flatnonzero(at_block[1:] < 0)
    if missing.size:
        raise ArgumentError(f"page {int(missing[0])} belongs to no sequence")
    # Forks share pages, and a fork's page keeps its place; so no sequence holds one twice either.
    _require(at_block[blocks[held]] == block[held], "shares a page at another place", member[held])


def _check_rings(image: SequenceImage, page_size: int, window_tokens: int) -> None:
    rings, length = image.rings, image.states[:, 0]
    _require((rings >= -1) & (rings < image.num_rings), "names a ring that is not there")
    if not window_tokens:
        _require(rings < 0, "has a ring without a window")
    else:
        # The first append takes a slot; pools of slots and sink records rely on it.
        _require((rings >= 0) | (length == 0), "has tokens, but no ring")
    unused = np.flatnonzero(np.bincount(rings[rings >= 0], minlength=image.num_rings) == 0)
    if unused.size:
        raise ArgumentError(f"ring {int(unused[0])} belongs to no sequence")
    spans = image.ring_spans()
    if spans.size and int((spans[:, 1] - spans[:, 0]).max()) > window_tokens:
        raise ArgumentError(f"a ring would hold more than {window_tokens} positions")
    # Members of one ring descend from the sequence that wrote it: they have its block 0 or none.
    _, block = image._places(page_size)
    owners = np.flatnonzero(length > 0)
    firsts = image.blocks[block == 0]
    first_of = np.zeros(image.num_rings, np.int32)
    ringed = (rings[owners] >= 0) & (firsts > 0)
    first_of[rings[owners][ringed]] = firsts[ringed]
    agree = first_of[rings[owners][ringed]] == firsts[ringed]
    _require(agree, "shares a ring, but not block 0", owners[ringed])


def _require(holds: Bools, problem: str, members: Int64 | None = None) -> None:
    if not holds.all():
        index = int(np.flatnonzero(~holds)[0])
        culprit = index if members is None else int(members[index])
        raise ArgumentError(f"sequence {culprit} {problem}")
