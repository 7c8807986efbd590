"""Attention and scores over coded pages in NumPy: tile by tile, both cores, nothing materialised.

One unit of work is one (sequence, KV head): all query rows of its group read each key and value
once. A tile of pages is decoded into scratch, scored with small matrix products, folded into a
running softmax, and forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .page_reader import StreamReader
from .work_arrays import work_array

Array = npt.NDArray[Any]

# NumPy's OpenBLAS takes a process-wide lock when a product is large enough for its own threads,
# which would serialise ours; products over this many tokens stay below that size.
_CHUNK_TOKENS = 128
_TILE_TOKENS = 4096
_SCORE_ELEMENTS = 1 << 20


class Span(NamedTuple):
    """What one sequence's queries may read from pages.

    ``pages`` and ``blocks`` list the resident blocks that hold a readable position; ``whole``
    tells which of them are readable entirely.
    """

    pages: Array
    blocks: Array
    whole: Array
    first: int
    stop: int
    keep: int
    start: int

    def positions(self, page_size: int) -> Array:
        """Return the positions of the listed blocks, readable or not: ``[len(pages) * P]``."""
        return np.asarray((self.blocks[:, None] * page_size + np.arange(page_size)).reshape(-1))

    def allows(self, positions: Array) -> Array:
        """Whether each position is readable."""
        inside = (positions >= self.first) & (positions < self.stop)
        return inside & ((positions < self.keep) | (positions >= self.start))


class Rows(NamedTuple):
    """Query rows of one (sequence, KV head), ready for products with table values.

    Attributes
    ----------
    keys : ndarray ``[rows, head_dim]``
        Queries in the space of the stored keys (rotated for TurboQuant), times the score scale.
    qjl : ndarray ``[rows, sketch_dim]`` or None
        Projected queries times scale and QJL factor.
    offset : ndarray ``[rows]`` or None
        ``scale * q . mean``: what key centring took from every logit.
    last, floor : ndarray of int64 ``[rows]``
        Each row reads positions ``floor <= p <= last``.
    """

    keys: Array
    qjl: Array | None
    offset: Array | None
    last: Array
    floor: Array


def span_of(table_row: Array, page_size: int, reads: tuple[int, int, int, int]) -> Span:
    """Find the blocks of a sequence that the read ranges touch.

    Parameters
    ----------
    table_row : ndarray of int32 ``[max_blocks]``
        The sequence's page table; 0 where a block was evicted.
    page_size : int
        Tokens per page.
    reads : tuple of int
        ``first, stop, keep, start``: positions ``[first, stop)`` within
        ``[0, keep)`` or ``[start, inf)``.
    """
    first, stop, keep, start = reads
    blocks = np.arange(first // page_size, max(-(-stop // page_size), first // page_size))
    low = np.maximum(blocks * page_size, first)
    high = np.minimum((blocks + 1) * page_size, stop)
    touched = (low < np.minimum(high, keep)) | (np.maximum(low, start) < high)
    uncut = (low == blocks * page_size) & (high == (blocks + 1) * page_size)
    whole = uncut & ((high <= keep) | (low >= start) | (start <= keep))
    pages = table_row[blocks]
    chosen = touched & (pages != 0)
    return Span(pages[chosen], blocks[chosen], whole[chosen], first, stop, keep, start)


class Tile(NamedTuple):
    """Scores of one tile.

    Attributes
    ----------
    pages : ndarray ``[n]``
        The pages.
    scores : ndarray of float64 ``[chunks, rows, chunk_tokens]``
        -inf where a row does not read.
    unread : ndarray of int
        Tokens of the tile that no row reads; their slots may never have been written.
    """

    pages: Array
    scores: Array
    unread: Array


class PageAttention:
    """Score and attend on the pages of one layer.

    Parameters
    ----------
    keys, values : StreamReader
        The layer's streams.
    """

    def __init__(self, keys: StreamReader, values: StreamReader) -> None:
        self.keys = keys
        self.values = values
        self.page_size = keys.page_size
        self.head_dim = keys.head_dim
        self.dtype = values.dtype

    def tiles(self, span: Span, head: int, rows: Rows, soft_cap: float | None) -> Iterator[Tile]:
        """Yield the scores of a span, tile by tile, in block order."""
        for part in self._parts(len(span.pages), len(rows.keys)):
            pages, blocks = span.pages[part], span.blocks[part]
            unread = self._unread(span, blocks, span.whole[part])
            scores = self._scores(pages, head, rows, unread)
            if soft_cap is not None:
                if rows.offset is not None:
                    scores += rows.offset[:, None]
                scores /= soft_cap
                np.tanh(scores, out=scores)
                scores *= soft_cap
            if unread.size:
                chunk, token = np.divmod(unread, scores.shape[2])
                scores[chunk, :, token] = -np.inf
            self._mask(scores, blocks, rows)
            yield Tile(pages, scores, unread)

    def scores(self, span: Span, head: int, rows: Rows) -> Array:
        """Return true scores ``[rows, len(span.pages) * page_size]`` of a span's blocks."""
        count = len(rows.keys)
        flat = np.empty((count, len(span.pages) * self.page_size))
        at = 0
        for tile in self.tiles(span, head, rows, None):
            part = tile.scores.transpose(1, 0, 2).reshape(count, -1)
            flat[:, at : at + part.shape[1]] = part
            at += part.shape[1]
        if rows.offset is not None:
            flat += rows.offset[:, None]
        return flat

    def attend(
        self, span: Span, head: int, rows: Rows, soft_cap: float | None
    ) -> tuple[Array, Array]:
        """Attend over a span.

        Returns
        -------
        out : ndarray ``[rows, head_dim]``
            Normalised, in the space of the stored values.
        lse : ndarray of float64 ``[rows]``
            Natural log of the denominator, of true logits; -inf where nothing is readable.
        """
        count = len(rows.keys)
        total = np.zeros((count, self.head_dim), self.dtype)
        top = np.full(count, -np.inf)
        mass = np.zeros(count)
        for tile in self.tiles(span, head, rows, soft_cap):
            peak = np.maximum(top, tile.scores.max(axis=(0, 2)))
            # Rows that have read nothing yet keep a finite reference: exp(-inf) is then 0.
            reference = np.where(np.isneginf(peak), 0, peak)
            weights = tile.scores
            weights -= reference[:, None]
            np.exp(weights, out=weights)
            decay = np.exp(top - reference)
            mass = mass * decay + weights.sum(axis=(0, 2))
            total *= decay[:, None].astype(self.dtype)
            total += self._weighted_values(tile, head, weights.astype(self.dtype, copy=False))
            top = peak
        seen = mass > 0
        total /= np.where(seen, mass, 1)[:, None].astype(self.dtype)
        with np.errstate(divide="ignore"):
            lse = np.where(seen, np.log(mass) + top, -np.inf)
        if rows.offset is not None and soft_cap is None:
            lse = lse + rows.offset
        return total, lse

    def _scores(self, pages: Array, head: int, rows: Rows, unread: Array) -> Array:
        chunk = self._chunk(len(pages))
        tile = self.keys.tile(pages, head)
        _clear(tile, unread, self.keys)
        tile = tile.reshape(-1, chunk, self.head_dim)
        shape = (len(tile), len(rows.keys), chunk)
        scores = work_array("scores", shape, np.float64)
        np.matmul(rows.keys, tile.transpose(0, 2, 1), out=scores)
        scores *= _by_chunk(self.keys.norms(pages, head), chunk, unread)
        if rows.qjl is not None:
            signs = self.keys.qjl_tile(pages, head).reshape(-1, chunk, self.keys.sketch_dim)
            residual = work_array("residual", shape, np.float64)
            np.matmul(rows.qjl, signs.transpose(0, 2, 1), out=residual)
            residual *= _by_chunk(self.keys.residual_norms(pages, head), chunk, unread)
            scores += residual
        return scores

    def _weighted_values(self, tile: Tile, head: int, weights: Array) -> Array:
        chunks, count, chunk = weights.shape
        weights *= _by_chunk(self.values.norms(tile.pages, head), chunk, tile.unread)
        values = self.values.tile(tile.pages, head)
        if len(values) == 1:
            _clear(values, tile.unread, self.values)
            values = values.reshape(chunks, chunk, self.head_dim)
            return np.asarray(np.matmul(weights, values).sum(axis=0))
        # Interleaved pairs come as all even tokens, then all odd ones; so must the weights.
        halves = work_array("halves", (2, chunks, count, chunk // 2), self.dtype)
        np.copyto(halves, weights.reshape(chunks, count, chunk // 2, 2).transpose(3, 0, 1, 2))
        values = values.reshape(2, chunks, chunk // 2, self.head_dim)
        return np.asarray(np.matmul(halves, values).sum(axis=(0, 1)))

    def _parts(self, num_pages: int, num_rows: int) -> Iterator[slice]:
        """Cut a page list into tiles that divide into chunks of a good size.

        What is left over at the end of a list of small pages becomes a chunk of its own.
        """
        per_chunk = max(1, _CHUNK_TOKENS // self.page_size)
        tokens = min(_TILE_TOKENS, _SCORE_ELEMENTS // num_rows)
        per_tile = max(1, tokens // self.page_size // per_chunk) * per_chunk
        for begin in range(0, num_pages, per_tile):
            end = min(begin + per_tile, num_pages)
            even = begin + (end - begin) // per_chunk * per_chunk
            if even in (begin, end) or self.page_size * 2 >= _CHUNK_TOKENS:
                yield slice(begin, end)
            else:
                yield slice(begin, even)
                yield slice(even, end)

    def _chunk(self, num_pages: int) -> int:
        per_chunk = max(1, _CHUNK_TOKENS // self.page_size)
        if num_pages % per_chunk == 0:
            return per_chunk * self.page_size
        return self.page_size * (1 if self.page_size * 2 >= _CHUNK_TOKENS else num_pages)

    def _unread(self, span: Span, blocks: Array, whole: Array) -> Array:
        """Return the tokens of a tile that lie outside the read ranges."""
        cut = np.flatnonzero(~whole)
        inside = cut[:, None] * self.page_size + np.arange(self.page_size)
        positions = blocks[cut, None] * self.page_size + np.arange(self.page_size)
        return np.asarray(inside[~span.allows(positions)])

    def _mask(self, scores: Array, blocks: Array, rows: Rows) -> None:
        """Set what a row reads neither causally nor within its sliding window to -inf."""
        low, high = int(blocks[0]) * self.page_size, (int(blocks[-1]) + 1) * self.page_size
        if high - 1 <= rows.last.min() and low >= rows.floor.max():
            return
        positions = blocks[:, None] * self.page_size + np.arange(self.page_size)
        positions = positions.reshape(-1, 1, scores.shape[2])
        hidden = (positions > rows.last[:, None]) | (positions < rows.floor[:, None])
        np.copyto(scores, -np.inf, where=hidden)


def _by_chunk(norms: Array | None, chunk: int, unread: Array) -> Array | float:
    """Lay norms out like scores; 0 where nothing reads, since 0 * NaN would reach a sum."""
    if norms is None:
        return 1.0
    norms[unread] = 0
    return norms.reshape(-1, 1, chunk)


def _clear(tile: Array, unread: Array, reader: StreamReader) -> None:
    """Zero unread rows of plain values, for the same reason; codes always decode to numbers."""
    if unread.size and reader.plain:
        tile.reshape(-1, tile.shape[-1])[unread] = 0
