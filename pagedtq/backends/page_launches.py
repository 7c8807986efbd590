"""What each kernel that writes, reads or moves pages is compiled for and launched with.

A `Launch` is data: the same one runs on a device and in the tests' harness. Arrays may be NumPy or
CuPy arrays; nothing here looks at their content.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..config import Dtype, TurboQuant
from ..errors import UnsupportedError
from ..paging.kernel_macros import DTYPE_NUMBERS
from ..paging.layout import PageLayout
from .kernel_tables import StreamTables

#: Threads of a block, in all of these kernels.
BLOCK = 128

#: Head dimensions with an odd factor whose vectors span a power of two of lanes.
_MIXED_RADIX = (80, 96, 112, 160, 192)

#: Static shared memory of a block.
SHARED_BYTES = 48 * 1024

# Bytes that one block of a page copy moves at least: more blocks than that gain nothing.
_PIECE_BYTES = 16 * 1024


class Launch(NamedTuple):
    """One kernel launch.

    Attributes
    ----------
    file, kernel : str
        Source in ``kernels/`` and entry point.
    macros : mapping of str to int
        The specialisation.
    grid : tuple of int
        Blocks; each has `BLOCK` threads and no dynamic shared memory.
    arguments : tuple
        Arrays (by address), NumPy scalars (by value), None (null).
    """

    file: str
    kernel: str
    macros: Mapping[str, int]
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]


def lanes_of(head_dim: int) -> int:
    """Return the lanes that share a vector: ``kLanes`` of ``kernels/rotation.cuh``."""
    power = head_dim & -head_dim
    if power != head_dim:
        return power // 8 if head_dim in _MIXED_RADIX else 32
    return 32 if head_dim >= 512 else max(1, head_dim // 16)


class LayerLaunches:
    """Launches for one layer.

    Parameters
    ----------
    layout : PageLayout
        Where the planes lie.
    layer : int
        The layer.
    pages : array of uint8
        The pool from the layer's offset on.
    tables : tuple of StreamTables or None
        Of keys and values, where the kernels can read them; None for an exact stream.
    qjl_factor : float
        Prod: the projection's factor.

    Raises
    ------
    UnsupportedError
        For streams that no kernel reads, and vectors whose sums do not fit shared memory.
    """

    def __init__(
        self,
        layout: PageLayout,
        layer: int,
        pages: Any,
        tables: tuple[StreamTables | None, StreamTables | None],
        qjl_factor: float = 0.0,
    ) -> None:
        self.layout, self.layer = layout, layer
        self.macros = layout.kernel_macros(layer)
        _check_shared(layout, layer)
        nothing = StreamTables(*[None] * len(StreamTables._fields))
        self._keys, self._values = (nothing if t is None else t for t in tables)
        self._qjl_factor = np.float32(qjl_factor)
        self._heads = np.int32(layout.config.num_kv_heads)
        self._place = (
            pages,
            np.int64(layout.page_strides[layer]),
            np.int64(layout.extents[layer].nbytes),
            np.int32(layout.config.page_size),
        )
        self._encoder = (*self._keys[:4], *self._values[:2])

    def store(self, keys: Any, values: Any, kind: Dtype, slot_mapping: Any) -> Launch:
        """Encode ``[n, num_kv_heads, head_dim]`` of type ``kind`` into slots ``int64[n]``.

        Tokens may be strided; the heads of a token must lie side by side.
        """
        return Launch(
            "store.cu",
            "store",
            {**self.macros, "INPUT_DTYPE": DTYPE_NUMBERS[kind]},
            self._grid(len(slot_mapping)),
            (
                *_rows_and_strides(keys, values),
                slot_mapping,
                np.int32(len(slot_mapping)),
                self._heads,
                *self._place,
                *self._encoder,
            ),
        )

    def seal(self, ring: Any, ring_rows: Any, slot_mapping: Any) -> Launch:
        """Encode rows ``int64[n]`` of rings ``[slots, heads, 2, rows, head_dim]`` into slots."""
        return Launch(
            "seal.cu",
            "seal",
            self.macros,
            self._grid(len(slot_mapping)),
            (
                ring,
                ring_rows,
                np.int32(ring.shape[3]),
                slot_mapping,
                np.int32(len(slot_mapping)),
                self._heads,
                *self._place,
                *self._encoder,
            ),
        )

    def write_bounds(self, pages: Any) -> Launch:
        """Write the key bounds of full pages ``int64[n]``; the layer's keys must be coded."""
        return Launch(
            "write_bounds.cu",
            "write_bounds",
            self.macros,
            (len(pages), int(self._heads)),
            (pages, *self._place, self._keys.book),
        )

    def load(self, slots: Any, keys: Any, values: Any, kind: Dtype) -> Launch:
        """Decode slots ``int64[n]`` into contiguous ``[n, num_kv_heads, head_dim]`` of ``kind``."""
        return Launch(
            "load.cu",
            "load",
            {**self.macros, "OUTPUT_DTYPE": DTYPE_NUMBERS[kind]},
            self._grid(len(slots)),
            (
                slots,
                np.int32(len(slots)),
                self._heads,
                *self._place,
                keys,
                values,
                self._keys.book,
                self._keys.inverse_rotation,
                self._keys.mean,
                self._keys.inverse_projection,
                self._qjl_factor,
                self._values.book,
                self._values.inverse_rotation,
            ),
        )

    def store_window(
        self,
        keys: Any,
        values: Any,
        kind: Dtype,
        ring_mapping: Any,
        sink_mapping: Any,
        ring: Any,
        sinks: Any,
    ) -> Launch:
        """Write tokens to the rows of rings and sink records they map to, ``int64[n]`` each."""
        return Launch(
            "store_window.cu",
            "store_window",
            {**self.macros, "INPUT_DTYPE": DTYPE_NUMBERS[kind]},
            (len(ring_mapping), 2),
            (
                *_rows_and_strides(keys, values),
                ring_mapping,
                sink_mapping,
                self._heads,
                ring,
                np.int32(ring.shape[3]),
                sinks,
                np.int32(sinks.shape[3]),
            ),
        )

    def _grid(self, tokens: int) -> tuple[int, int]:
        """Cover both tokens of every pair, all heads, and both streams."""
        vectors = -(-tokens // 2) * 2 * int(self._heads)
        return -(-vectors * lanes_of(self.layout.config.head_dim) // BLOCK), 2


def _check_shared(layout: PageLayout, layer: int) -> None:
    """Refuse vectors that share more memory than a block has: `kScratchFloats` of the kernels."""
    head_dim = layout.config.head_dim
    codecs = layout.config.layer_codecs(layer)
    power_of_two = head_dim & (head_dim - 1) == 0
    shares = not power_of_two or any(
        isinstance(codec, TurboQuant)
        and (
            codec.rotation == "dense"
            or (codec.estimator == "prod" and codec.projection == "gaussian")
        )
        for codec in codecs
    )
    largest = SHARED_BYTES // 4 // (BLOCK // lanes_of(head_dim))
    if shares and head_dim > largest:
        raise UnsupportedError(
            f"the kernels take vectors of at most {largest} elements, or of powers of two with "
            f"Hadamard rotations and without Gaussian projections; got head_dim {head_dim} with "
            f"keys {codecs[0]} and values {codecs[1]}"
        )


def copy_pages(pool: Any, spans: Any, src: Any, dst: Any, run_bytes: int) -> Launch:
    """Copy pages ``src`` to ``dst``, ``int64[n]`` each, all layers of ``spans`` (`layer_spans`).

    ``run_bytes`` is the largest layer's bytes of one page; it decides how finely copies are cut.
    """
    grid = (len(src), len(spans), _pieces(run_bytes))
    return Launch("copy_pages.cu", "copy_pages", {}, grid, (pool, spans, src, dst))


def gather_slabs(pool: Any, spans: Any, pages: Any, slabs: Any, run_bytes: int) -> Launch:
    """Copy pages ``int64[n]`` into slabs ``uint8[n, page_bytes]``."""
    return _slab_launch("gather_slabs", pool, spans, pages, slabs, run_bytes)


def scatter_slabs(pool: Any, spans: Any, pages: Any, slabs: Any, run_bytes: int) -> Launch:
    """Copy slabs back into pages."""
    return _slab_launch("scatter_slabs", pool, spans, pages, slabs, run_bytes)


def clear_norms(pool: Any, spans: Any, pages: Any, num_kv_heads: int) -> Launch:
    """Zero the norm planes ``spans`` (`norm_spans`) of pages ``int64[n]``."""
    arguments = (pool, spans, pages, np.int32(num_kv_heads))
    return Launch("clear_norms.cu", "clear_norms", {}, (len(pages), len(spans)), arguments)


def _slab_launch(
    kernel: str, pool: Any, spans: Any, pages: Any, slabs: Any, run_bytes: int
) -> Launch:
    grid = (len(pages), len(spans), _pieces(run_bytes))
    arguments = (pool, spans, pages, slabs, np.int64(slabs.shape[1]))
    return Launch(kernel + ".cu", kernel, {}, grid, arguments)


def _pieces(run_bytes: int) -> int:
    return max(1, -(-run_bytes // _PIECE_BYTES))


def _rows_and_strides(keys: Any, values: Any) -> tuple[Any, ...]:
    return keys, values, np.int64(keys.strides[0]), np.int64(values.strides[0])
