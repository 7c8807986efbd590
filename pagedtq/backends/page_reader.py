"""Reading coded pages as float tiles: the decode half of the host backend.

A tile is the codes of one stream and one KV head in a handful of pages, as table values (norms are
separate, they scale scores and weights). Decoding is a gather: a byte selects the two or four
floats it stands for. Everything is written into per-thread scratch, because fresh arrays of this
size cost more in page faults than in arithmetic.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from ..codec.bitpack import PackedCodes, unpack_codes
from ..config import Codec, Exact, TurboQuant
from ..paging.layout import PageLayout
from .dtypes import widen
from .work_arrays import work_array

Array = npt.NDArray[Any]

_PAGES_AT_ONCE = 64


class StreamReader:
    """Decode one stream (``"key"`` or ``"value"``) of one layer, page by page.

    Parameters
    ----------
    layout : PageLayout
        Where the planes lie.
    pool : ndarray of uint8
        The pool.
    layer : int
        The layer.
    stream : {"key", "value"}
        The stream.
    codec : Codec
        Its codec.
    table : ndarray of float32 ``[2**code_bits]`` or None
        Decoded value of each code, in table units; None for exact streams.
    dtype : dtype
        float32, or float64 for reference-grade accumulation.
    """

    def __init__(
        self,
        layout: PageLayout,
        pool: Array,
        layer: int,
        stream: str,
        codec: Codec,
        table: Array | None,
        dtype: npt.DTypeLike,
    ) -> None:
        self.head_dim = layout.config.head_dim
        self.page_size = layout.config.page_size
        self.stream = stream
        self.codec = codec
        self.is_exact = isinstance(codec, Exact)
        self.dtype = np.dtype(dtype)
        planes = layout.extents[layer].planes

        def view(name: str) -> Array:
            plane: Array = layout.plane_view(pool, layer, name)
            return plane

        if isinstance(codec, Exact):
            self._exact = view(stream + "s")
            self._pairs = False
            return
        assert table is not None
        self._pairs = stream == "value"
        self._codes = view(stream + "_codes")
        self._norms = view(stream + "_norms")
        self._signs = view(stream + "_code_signs") if stream + "_code_signs" in planes else None
        self._table = table
        self._packed = _packed_table(
            codec.code_bits, self.head_dim, stream, table.tobytes(), self.dtype
        )
        if stream == "key" and codec.estimator == "prod":
            self._qjl_signs = view("key_qjl_signs")
            self._residual_norms = view("key_residual_norms")
            self._sign_table = _sign_table(self.dtype)

    def norms(self, pages: Array, head: int) -> Array | None:
        """Return the stored norms ``[len(pages) * page_size]``, None for exact streams."""
        if isinstance(self.codec, Exact):
            return None
        norms: Array = self._norms[pages, head].astype(self.dtype).reshape(-1)
        return norms

    def residual_norms(self, pages: Array, head: int) -> Array:
        """Return the stored QJL residual norms ``[len(pages) * page_size]`` (Prod keys)."""
        norms: Array = self._residual_norms[pages, head].astype(self.dtype).reshape(-1)
        return norms

    def tile(self, pages: Array, head: int) -> Array:
        """Decode pages of one head.

        Returns
        -------
        ndarray
            ``[1, tokens, head_dim]``; for interleaved values ``[2, tokens / 2, head_dim]``: the
            even tokens, then the odd ones. Table units for TurboQuant, plain values for exact.
        """
        tokens = len(pages) * self.page_size
        if isinstance(self.codec, Exact):
            rows = widen(self._exact[pages, head], self.codec.dtype)
            return rows.astype(self.dtype, copy=False).reshape(1, tokens, self.head_dim)
        codes = self._codes[pages, head]
        signs = None if self._signs is None else self._signs[pages, head]
        if self._packed is None:
            return self._tile_by_code(codes, signs, tokens)
        index = self._index(codes, signs, tokens)
        return _gather(self._packed, index).reshape(*index.shape[:2], self.head_dim)

    def rows(self, slots: Array, head: int) -> Array:
        """Decode single slots ``[n]`` of one head, norms applied: ``[n, head_dim]``."""
        pages, inverse = np.unique(slots // self.page_size, return_inverse=True)
        place = inverse * self.page_size + slots % self.page_size
        out = np.empty((len(slots), self.head_dim), self.dtype)
        # Tile by tile, so that many pages never stand decoded side by side.
        for begin in range(0, len(pages), _PAGES_AT_ONCE):
            part = pages[begin : begin + _PAGES_AT_ONCE]
            local = place - begin * self.page_size
            chosen = np.flatnonzero((local >= 0) & (local < len(part) * self.page_size))
            tile = self._in_order(self.tile(part, head))
            values = tile[local[chosen]]
            norms = self.norms(part, head)
            out[chosen] = values if norms is None else values * norms[local[chosen], None]
        return out

    def qjl_rows(self, slots: Array, head: int) -> Array:
        """Decode the QJL part of single slots: signs times residual norms, ``[n, head_dim]``."""
        page, offset = np.divmod(slots, self.page_size)
        index = self._qjl_signs[page, head, offset].astype(np.intp)
        signs = self._sign_table[index].reshape(len(slots), 8 * index.shape[1])[:, : self.head_dim]
        return np.asarray(signs * self._residual_norms[page, head, offset, None].astype(self.dtype))

    @staticmethod
    def _in_order(tile: Array) -> Array:
        """Bring a tile to token order ``[tokens, head_dim]``."""
        return tile.transpose(1, 0, 2).reshape(-1, tile.shape[2])

    def qjl_tile(self, pages: Array, head: int) -> Array:
        """Decode the QJL signs of pages as -1 and +1: ``[tokens, head_dim]`` (Prod keys)."""
        rows = self._qjl_signs[pages, head]
        tokens = len(pages) * self.page_size
        index = work_array("sign_index", (1, tokens, rows.shape[-1]), np.intp)
        np.copyto(index, rows.reshape(index.shape))
        return _gather(self._sign_table, index, "sign_tile").reshape(tokens, -1)[:, : self.head_dim]

    def _index(self, codes: Array, signs: Array | None, tokens: int) -> Array:
        """Return table indices ``[1 or 2, tokens, code bytes]`` from raw code rows."""
        split = 2 if self._pairs else 1
        row = codes.shape[2]
        index = work_array("index", (split, tokens // split, row), np.intp)
        if signs is not None:
            codes = _join_signs(codes, signs)
        elif self.codec.code_bits == 4 and not self._pairs and self.head_dim % 16 == 0:  # type: ignore[union-attr]
            _gather_signs(codes)
        if not self._pairs:
            np.copyto(index, codes.reshape(index.shape))
            return index
        # Two tokens' bytes (or 16-bit indices) in one word: low half the even token.
        wide = codes.view({1: np.uint16, 2: np.uint32}[codes.itemsize]).reshape(index.shape[1:])
        half = work_array("half", wide.shape, wide.dtype)
        np.bitwise_and(wide, (1 << 8 * codes.itemsize) - 1, out=half)
        np.copyto(index[0], half)
        np.right_shift(wide, 8 * codes.itemsize, out=half)
        np.copyto(index[1], half)
        return index

    def _tile_by_code(self, codes: Array, signs: Array | None, tokens: int) -> Array:
        """Decode widths without a byte table, code by code (no speed claim)."""
        assert isinstance(self.codec, TurboQuant)
        if self._pairs:
            codes = codes.transpose(3, 0, 1, 2)
            signs = None if signs is None else signs.transpose(3, 0, 1, 2)
            lead = 2
        else:
            lead = 1
        rows = np.ascontiguousarray(codes).reshape(tokens, -1)
        sign_rows = None if signs is None else np.ascontiguousarray(signs).reshape(tokens, -1)
        packed = PackedCodes(rows, sign_rows)
        indices = unpack_codes(packed, self.codec.code_bits, self.head_dim, self.stream)
        values = self._table.astype(self.dtype)[indices]
        return values.reshape(lead, tokens // lead, self.head_dim)


@functools.lru_cache
def _packed_table(
    bits: int, head_dim: int, stream: str, table: bytes, dtype: np.dtype[Any]
) -> Array | None:
    """Build ``[entries, floats]``: the values behind one byte (width 3: byte and sign bits).

    Shared by all layers, so that it stays in the cache from one to the next.
    """
    values: Array = np.frombuffer(table, np.float32).astype(dtype)
    byte = np.arange(256)
    words = head_dim % 16 == 0
    if bits == 8:
        return values[:, None]
    if bits == 4 and words and stream == "key":
        # After `_gather_signs`: bit 7 is the sign of the low nibble, bit 3 of the high one.
        low = (byte & 7) | (byte >> 7) << 3
        high = (byte >> 4 & 7) | (byte >> 3 & 1) << 3
        return values[np.stack([low, high], 1)]
    if bits == 3 and words:
        # Bits 0-7: four magnitudes; bits 8, 9, 12, 13: their signs (see `_join_signs`).
        entry = np.arange(1 << 14)
        codes = [(entry >> 2 * i & 3) | (entry >> s & 1) << 2 for i, s in enumerate((8, 9, 12, 13))]
        return values[np.stack(codes, 1)]
    if bits in (1, 2, 4) and head_dim * bits % 8 == 0:
        codes_in_byte = byte[:, None] >> np.arange(0, 8, bits) & (1 << bits) - 1
        return np.asarray(values[codes_in_byte])
    return None


def _sign_table(dtype: np.dtype[Any]) -> Array:
    """Build ``[256, 8]``: bit 1 is +1, bit 0 is -1."""
    bits = np.arange(256)[:, None] >> np.arange(8) & 1
    return (2 * bits - 1).astype(dtype)


def _gather(table: Array, index: Array, name: str = "tile") -> Array:
    """Return ``table[index]``, as one gather of whole entries."""
    entry = table.shape[1] * table.itemsize
    unit = {4: np.uint32, 8: np.uint64, 16: np.complex128}.get(entry)
    if unit is None:
        out = work_array(name, (*index.shape, table.shape[1]), table.dtype)
        np.take(table, index, axis=0, out=out, mode="clip")
        return out
    tile = work_array(name, index.shape, unit)
    np.take(np.ascontiguousarray(table).view(unit).reshape(-1), index, out=tile, mode="clip")
    return tile.view(table.dtype)


def _gather_signs(codes: Array) -> None:
    """Move key signs (width 4), in place, so that each byte holds the signs of its own nibbles.

    Two delta swaps: bits 3, 11 with 23, 31 give each half word its own signs, then bits 3, 19 with
    15, 31 give each byte its own.
    """
    words = codes.reshape(-1).view(np.uint32)
    swap = work_array("swap", words.shape, np.uint32)
    for distance, mask in ((20, 0x00000808), (12, 0x00080008)):
        np.right_shift(words, distance, out=swap)
        np.bitwise_xor(swap, words, out=swap)
        np.bitwise_and(swap, mask, out=swap)
        np.bitwise_xor(words, swap, out=words)
        np.left_shift(swap, distance, out=swap)
        np.bitwise_xor(words, swap, out=words)


def _join_signs(codes: Array, signs: Array) -> Array:
    """Return 14-bit indices of width-3 code bytes: magnitudes below, sign bits above.

    In memory (pair interleave included) sign byte ``p`` of 32-bit sign word ``i`` serves byte
    ``p`` of code words ``2 i`` (bits 0, 1, 4, 5) and ``2 i + 1`` (bits 2, 3, 6, 7).
    """
    rows = codes.shape[0] * codes.shape[1]
    sign_words = signs.reshape(rows, -1).view(np.uint32)
    high = work_array("high", (rows, sign_words.shape[1], 2), np.uint32)
    np.bitwise_and(sign_words, 0x33333333, out=high[:, :, 0])
    np.right_shift(sign_words, 2, out=high[:, :, 1])
    np.bitwise_and(high[:, :, 1], 0x33333333, out=high[:, :, 1])
    # A row with an odd number of code words leaves the last sign word half used.
    code_bytes = codes.reshape(rows, -1)
    high_bytes = high.view(np.uint8).reshape(rows, -1)[:, : code_bytes.shape[1]]
    joined = work_array("joined", code_bytes.shape, np.uint16)
    np.left_shift(high_bytes, 8, out=joined, dtype=np.uint16)
    np.bitwise_or(joined, code_bytes, out=joined)
    return joined.reshape(codes.shape)
