"""Where every byte of a page lies: the only source of offsets and strides.

A *page* holds ``page_size`` tokens of one sequence for all layers and KV heads. The share of one
(layer, KV head) is an *extent*; an extent is a row of *planes*::

    extent (k4v4, head_dim 128, page_size 64: 8448 bytes)
    +-----------------+-----------------+-----------+-------------+
    | key_codes       | value_codes     | key_norms | value_norms |
    | [64][64] bytes  | [32][64][2]     | [64] f16  | [64] f16    |
    +-----------------+-----------------+-----------+-------------+
    0                 4096              8192        8320          8448

Planes start on 16 bytes, extents on 128. Key planes are token-major rows. Value code planes
interleave the bytes of a token pair: byte ``j`` of token ``t`` lies at
``(t // 2) * 2 * row + 2 * j + t % 2``, so that a warp finds two tokens of one channel in one word.
Writing a token never touches a bit of another token. No ownership is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..config import DTYPE_BYTES, CacheConfig, Codec, Exact, Polar, TurboQuant
from .kernel_macros import kernel_macros

PLANE_ALIGN = 16
EXTENT_ALIGN = 128


class CodeRows(NamedTuple):
    """Bytes of one token's codes: the main row, and the sign row that only width 3 has."""

    codes: int
    signs: int


def code_rows(bits: int, head_dim: int, stream: str) -> CodeRows:
    """Return the row bytes of one token's codes.

    Width 3 splits into a 2-bit magnitude row and a 1-bit sign row when ``head_dim`` is a multiple
    of 16; every other case is one little-endian bit row. The sign row of keys serves groups of 8
    code bytes with 4 sign bytes, that of values groups of 4 with 2 (the pair interleave doubles
    both in memory), so that one 32-bit sign word always serves two 32-bit code words.

    Parameters
    ----------
    bits : int
        Width of a code.
    head_dim : int
        Codes of a token.
    stream : {"keys", "values"}
        Which stream they are of.
    """
    if bits == 3 and head_dim % 16 == 0:
        period = sign_period(stream)
        codes = head_dim // 4
        return CodeRows(codes, -(-codes // (2 * period)) * period)
    return CodeRows(-(-head_dim * bits // 8), 0)


def sign_period(stream: str) -> int:
    """Return the number of sign bytes in a group of a width-3 sign row."""
    return 4 if stream == "key" else 2


class Plane(NamedTuple):
    """One array inside an extent.

    ``shape`` is per extent, in elements of ``dtype``; the first axis is tokens, or token pairs
    for interleaved planes (``[pairs, row, 2]``).
    """

    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    interleaved: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the plane."""
        return int(np.prod(self.shape)) * self.dtype.itemsize


class ExtentLayout:
    """The planes of one (layer, KV head) inside a page.

    Attributes
    ----------
    planes : mapping of str to Plane
        In byte order: ``key_codes``, ``key_code_signs`` (width 3), ``value_codes``,
        ``value_code_signs`` (width 3), ``key_norms``, ``value_norms``, ``key_qjl_signs`` and
        ``key_residual_norms`` (Prod), ``key_bounds`` (optional, f16 ``[2, head_dim]``: per rotated
        channel minimum and maximum); ``keys`` and ``values`` for exact streams; ``key_angles`` and
        ``value_angles`` in place of codes, ``key_radii`` and ``value_radii`` in place of norms for
        polar ones.
    nbytes : int
        Extent bytes, padded to ``EXTENT_ALIGN``.
    """

    def __init__(
        self, keys: Codec, values: Codec, page_size: int, head_dim: int, key_bounds: bool
    ) -> None:
        self._end = 0
        planes: dict[str, Plane] = {}
        for stream, codec in (("key", keys), ("value", values)):
            if isinstance(codec, Exact):
                dtype = {"f16": "<f2", "bf16": "<u2", "f32": "<f4"}[codec.dtype]
                planes[stream + "s"] = self._plane((page_size, head_dim), dtype)
            elif isinstance(codec, Polar):
                row = -(-(head_dim // 2) * codec.angle_bits // 8)
                planes[stream + "_angles"] = self._plane((page_size, row), "u1")
            else:
                rows = code_rows(codec.code_bits, head_dim, stream)
                planes[stream + "_codes"] = self._code_plane(stream, page_size, rows.codes)
                if rows.signs:
                    planes[stream + "_code_signs"] = self._code_plane(stream, page_size, rows.signs)
        for stream, codec in (("key", keys), ("value", values)):
            if isinstance(codec, TurboQuant):
                planes[stream + "_norms"] = self._plane((page_size,), "<f2")
            elif isinstance(codec, Polar):
                shape = (page_size, head_dim // 2)
                planes[stream + "_radii"] = self._plane(shape, f"<f{DTYPE_BYTES[codec.radii]}")
        if isinstance(keys, TurboQuant) and keys.estimator == "prod":
            planes["key_qjl_signs"] = self._plane((page_size, -(-head_dim // 8)), "u1")
            planes["key_residual_norms"] = self._plane((page_size,), "<f2")
        if isinstance(keys, Polar) and keys.mode == "polar_qjl":
            signs = -(-keys.sketch_dim(head_dim) // 8)
            planes["key_qjl_signs"] = self._plane((page_size, signs), "u1")
            planes["key_residual_norms"] = self._plane((page_size,), f"<f{DTYPE_BYTES[keys.radii]}")
        if key_bounds and isinstance(keys, TurboQuant):
            planes["key_bounds"] = self._plane((2, head_dim), "<f2")
        self.planes: Mapping[str, Plane] = planes
        self.nbytes = _align(self._end, EXTENT_ALIGN)

    @property
    def payload_bytes(self) -> int:
        """Bytes of the planes themselves, alignment left out."""
        return sum(plane.nbytes for plane in self.planes.values())

    def _code_plane(self, stream: str, page_size: int, row: int) -> Plane:
        if stream == "key":
            return self._plane((page_size, row), "u1")
        return self._plane((page_size // 2, row, 2), "u1", interleaved=True)

    def _plane(self, shape: tuple[int, ...], dtype: str, interleaved: bool = False) -> Plane:
        offset = _align(self._end, PLANE_ALIGN)
        plane = Plane(offset, shape, np.dtype(dtype), interleaved)
        self._end = offset + plane.nbytes
        return plane


class PageLayout:
    """Offsets and strides of a pool of pages.

    Parameters
    ----------
    config : CacheConfig
        What the pages hold.

    Attributes
    ----------
    extents : tuple of ExtentLayout
        Per layer.
    layer_page_bytes : tuple of int
        Bytes of one page's share of each layer (all KV heads).
    page_bytes : int
        Bytes of a whole page: all layers and heads. Also the size of a slab.
    pool_bytes : int
        Bytes of the pool, all pages.
    page_strides, layer_offsets : tuple of int
        Per layer: distance between two pages, and offset of page 0 in the pool. The bytes of
        (page, layer, head) start at
        ``layer_offsets[layer] + page * page_strides[layer] + head * extents[layer].nbytes``.
    slab_offsets : tuple of int
        Offset of each layer inside a slab (a page's bytes outside the pool, contiguous).
    window_row_bytes : int
        Bytes of one exact token (keys and values) of one layer and head in the window.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        heads, pages = config.num_kv_heads, config.num_pages
        self.extents = tuple(
            ExtentLayout(
                *config.layer_codecs(layer), config.page_size, config.head_dim, config.key_bounds
            )
            for layer in range(config.num_layers)
        )
        self.layer_page_bytes = tuple(heads * extent.nbytes for extent in self.extents)
        self.page_bytes = sum(self.layer_page_bytes)
        self.pool_bytes = self.page_bytes * pages
        starts = tuple(np.cumsum((0, *self.layer_page_bytes[:-1])).tolist())
        self.slab_offsets: tuple[int, ...] = starts
        if config.pool_order == "layer_major":
            self.layer_offsets: tuple[int, ...] = tuple(start * pages for start in starts)
            self.page_strides: tuple[int, ...] = self.layer_page_bytes
        else:
            self.layer_offsets = starts
            self.page_strides = (self.page_bytes,) * config.num_layers
        self.window_row_bytes = 2 * config.head_dim * DTYPE_BYTES[config.kv_dtype]

    @property
    def window_slot_bytes(self) -> int:
        """Bytes of one sequence's exact window: ring and sinks, all overlay layers and heads."""
        config = self.config
        layers = sum(config.has_overlay(layer) for layer in range(config.num_layers))
        rows = config.window_tokens + config.num_sinks
        return layers * config.num_kv_heads * rows * self.window_row_bytes

    @property
    def token_bytes(self) -> float:
        """Page bytes per token, all layers and heads, alignment included."""
        return self.page_bytes / self.config.page_size

    def layer_view(self, pool: Any, layer: int) -> Any:
        """View a layer of a pool as ``uint8[num_pages, num_kv_heads, extent_bytes]``.

        The view writes through to the pool. NumPy and CuPy pools alike.
        """
        pages, size = self.config.num_pages, self.layer_page_bytes[layer]
        start = self.layer_offsets[layer]
        if self.config.pool_order == "layer_major":
            rows = pool[start : start + pages * size].reshape(pages, size)
        else:
            rows = pool.reshape(pages, self.page_bytes)[:, start : start + size]
        return rows.reshape(pages, self.config.num_kv_heads, self.extents[layer].nbytes)

    def plane_view(self, pool: Any, layer: int, name: str) -> Any:
        """View one plane of a layer as ``[num_pages, num_kv_heads, *plane.shape]``.

        The view writes through to the pool. NumPy and CuPy pools alike.
        """
        plane = self.extents[layer].planes[name]
        inside = slice(plane.offset, plane.offset + plane.nbytes)
        extents = self.layer_view(pool, layer)[:, :, inside].view(plane.dtype)
        return extents.reshape(*extents.shape[:2], *plane.shape)

    def kernel_macros(self, layer: int) -> dict[str, int]:
        """Return the ``-D`` macros that specialise kernels for a layer.

        Dimension, dtypes, widths, row bytes, and per plane its bytes per token before it
        (``*_AT``): a plane's offset in an extent is that times the page size, because pages hold a
        multiple of 16 tokens. Page size, strides and the number of heads stay run-time values.
        """
        return kernel_macros(self, layer)


def _align(size: int, unit: int) -> int:
    return -(-size // unit) * unit
