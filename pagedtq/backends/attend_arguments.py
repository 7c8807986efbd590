"""What the attention kernels are compiled for and launched with, from a page layout.

A specialisation fixes what a page holds and how many query rows share a pass over it; everything
else is an argument. The NumPy dtype below is the C struct of ``kernels/attend.cu`` byte for byte,
so that CuPy and the CPU harness pass it by value alike.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..codec.codebook import codebook
from ..config import Codec, Exact
from ..errors import UnsupportedError
from ..paging.layout import PageLayout
from ..paging.table_views import Reads
from .score_places import block_counts
from .stream_formats import (
    coded,
    column_tiles_of,
    is_prod,
    prefers_int8,
    prefers_int8_values,
    stream_format,
    takes_int8,
    takes_int8_values,
    tile_tokens,
)

Array = npt.NDArray[Any]

#: Largest head dim whose partial outputs, of 16 query rows, fit a block's static shared memory.
MAX_HEAD_DIM = 512

_PLANES = np.dtype([("codes", "<u4"), ("signs", "<u4"), ("norms", "<u4")])
_TABLE = np.dtype([("high", "<u4", 2), ("low", "<u4", 2)])

#: ``struct AttendShape``.
ATTEND_SHAPE = np.dtype(
    [
        ("page_stride", "<i8"),
        ("head_stride", "<i8"),
        ("keys", _PLANES),
        ("values", _PLANES),
        ("key_table", _TABLE),
        ("value_table", _TABLE),
        ("key_bytes", "<u4", 2),
        ("qjl_signs", "<u4"),
        ("residual_norms", "<u4"),
        ("page_shift", "<i4"),
        ("table_stride", "<i4"),
        ("batch", "<i4"),
        ("num_kv_heads", "<i4"),
        ("group", "<i4"),
        ("window_left", "<i4"),
        ("soft_cap", "<f4"),
        ("key_unit", "<f4"),
        ("value_unit", "<f4"),
        ("has_offsets", "<i4"),
    ],
    align=True,
)


class AttendKernel(NamedTuple):
    """A specialisation of the attention kernel.

    Attributes
    ----------
    head_dim : int
        Dimension of keys and values.
    key_format, value_format : int
        What a page holds: 1 to 8, width of codes; 16, 17, 32: exact f16, bf16, f32.
    prod : bool
        Keys carry QJL signs.
    column_tiles : int
        Query rows of one pass, in eights.
    soft_cap : bool
        Logits are capped.
    tile_tokens : int
        Tokens of one step of a warp; at most the page size.
    int8_keys : bool
        Keys are multiplied as bytes, with query rows in two 8-bit terms, instead of as halves.
    cuda_cores : bool
        Products without matrix instructions.
    int8_values : bool
        Values are multiplied as bytes, with weights in two 8-bit terms, instead of as halves.
    """

    head_dim: int
    key_format: int
    value_format: int
    prod: bool
    column_tiles: int
    soft_cap: bool
    tile_tokens: int
    int8_keys: bool
    cuda_cores: bool = False
    int8_values: bool = False

    @property
    def columns(self) -> int:
        """Query rows of one unit of work."""
        return 8 * self.column_tiles

    def macros(self) -> dict[str, int]:
        """Return the definitions the kernel is compiled with."""
        return {
            "HEAD_DIM": self.head_dim,
            "KEY_FORMAT": self.key_format,
            "VALUE_FORMAT": self.value_format,
            "KEY_PROD": int(self.prod),
            "COLUMN_TILES": self.column_tiles,
            "SOFT_CAP": int(self.soft_cap),
            "TILE_TOKENS": self.tile_tokens,
            "KEY_INT8": int(self.int8_keys),
            "VALUE_INT8": int(self.int8_values),
            "CUDA_CORES": int(self.cuda_cores),
        }


def attend_kernel(
    layout: PageLayout,
    layer: int,
    rows: int,
    soft_cap: bool,
    int8_keys: bool | None = None,
    arch: int = 80,
    int8_values: bool | None = None,
) -> AttendKernel:
    """Choose the specialisation for a layer.

    Parameters
    ----------
    layout : PageLayout
        The pages.
    layer : int
        The layer.
    rows : int
        Most query rows of a KV head in one sequence: query tokens times group.
    soft_cap : bool
        Whether logits are capped.
    int8_keys : bool, optional
        Multiply keys as bytes; by default where `prefers_int8`, from sm_80 on.
    arch : int
        The device's compute capability without the dot, or what it can run: 80 and more have all
        matrix instructions, 75 those on halves, less none.
    int8_values : bool, optional
        Multiply values as bytes, 8 query rows at a time; by default where `prefers_int8_values`,
        from sm_90 on.

    Raises
    ------
    UnsupportedError
        If keys or values that `takes_int8` refuses are to be multiplied as bytes; for a head dim
        above `MAX_HEAD_DIM`.
    """
    config = layout.config
    if config.head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"attention kernels take head dims up to {MAX_HEAD_DIM}, got {config.head_dim}"
        )
    keys, values = (stream_format(codec) for codec in config.layer_codecs(layer))
    prod = is_prod(config.layer_codecs(layer)[0])
    column_tiles = column_tiles_of(config.head_dim, rows, keys, values, prod)
    if int8_keys is None:
        int8_keys = arch >= 80 and prefers_int8(config.head_dim, keys, prod)
    elif int8_keys:
        _require_int8("keys", config.layer_codecs(layer)[0], config.head_dim, arch)
    if int8_values is None:
        int8_values = (arch >= 90 and int8_keys) and prefers_int8_values(
            config.head_dim, keys, values, column_tiles, config.page_size
        )
    elif int8_values:
        _require_int8("values", config.layer_codecs(layer)[1], config.head_dim, arch)
        column_tiles = 1
    cuda_cores = arch < 75
    tile = tile_tokens(config.head_dim, keys, values, column_tiles, int8_keys, prod, int8_values)
    return AttendKernel(
        config.head_dim,
        keys,
        values,
        prod,
        column_tiles,
        soft_cap,
        16 if cuda_cores else min(tile, config.page_size),
        int8_keys,
        cuda_cores,
        int8_values,
    )


def _require_int8(stream: str, codec: Codec, head_dim: int, arch: int) -> None:
    """Refuse to multiply a stream as bytes where the kernels cannot."""
    if arch < 80:
        raise UnsupportedError(f"{stream} are multiplied as bytes from sm_80 on, got sm_{arch}")
    form = stream_format(codec)
    values = stream == "values"
    able = takes_int8_values(head_dim, form) if values else takes_int8(head_dim, form)
    if not able or is_prod(codec):
        raise UnsupportedError(
            f"{stream} are multiplied as bytes for the MSE estimator of 2 to 4 bits in head dims "
            f"that are multiples of 32 (below 4 bits from 64 on) up to 256"
            f"{' (3 and 4 bits: 192)' if values else ''}; got {codec} with head_dim {head_dim}"
        )


def table_entries(codec: Codec, head_dim: int) -> Array:
    """Return the decoded values of a codec's codes as f16 bits ``uint16[2**width]``.

    They are exact: shipped tables are representable in f16. Exact streams have a single zero.
    """
    if isinstance(codec, Exact):
        return np.zeros(1, np.uint16)
    table = codebook(head_dim, coded(codec).code_bits).table
    return table.astype(np.float16).view(np.uint16)


def _byte_table(codec: Codec, head_dim: int) -> npt.NDArray[np.uint8]:
    """Return ``128 + j`` of magnitudes ``j + 1/2``, then (below width 4) their complements."""
    book = codebook(head_dim, coded(codec).code_bits)
    assert book.odd_steps is not None, "tables of widths 2 to 4 are half-integers"
    positive = (128 + book.odd_steps // 2).astype(np.uint8)
    table = np.zeros(8, np.uint8)
    both = np.concatenate([positive, ~positive])[:8]
    table[: len(both)] = both
    return table


def attend_shape(
    layout: PageLayout,
    layer: int,
    *,
    table_stride: int,
    batch: int,
    group: int,
    window_left: int | None = None,
    soft_cap: float | None = None,
    has_offsets: bool = False,
    int8_values: bool = False,
) -> np.void:
    """Fill the kernel's struct for a launch.

    Parameters
    ----------
    layout, layer
        The pages, and which of their layers.
    table_stride : int
        Entries of a row of the page table.
    batch : int
        Sequences.
    group : int
        Query heads per KV head.
    window_left : int, optional
        Sliding window of the layer.
    soft_cap : float, optional
        Cap of the logits.
    has_offsets : bool
        Whether key means were subtracted.
    int8_values : bool
        Whether the kernel multiplies values as bytes.
    """
    config, extent = layout.config, layout.extents[layer]
    keys, values = config.layer_codecs(layer)
    shape = np.zeros((), ATTEND_SHAPE)

    def offset(name: str) -> int:
        return extent.planes[name].offset if name in extent.planes else 0

    for stream, codec in (("key", keys), ("value", values)):
        planes = shape[stream + "s"]
        if isinstance(codec, Exact):
            planes["codes"] = offset(stream + "s")
            continue
        planes["codes"] = offset(stream + "_codes")
        planes["signs"] = offset(stream + "_code_signs")
        planes["norms"] = offset(stream + "_norms")
        entries = np.zeros(8, np.uint16)
        known = table_entries(codec, config.head_dim)[:8]
        entries[: len(known)] = known
        shape[stream + "_table"]["high"] = (entries >> 8).astype(np.uint8).view("<u4")
        shape[stream + "_table"]["low"] = entries.astype(np.uint8).view("<u4")
        if takes_int8(config.head_dim, stream_format(codec), is_prod(codec)):
            unit = 2.0 ** -codebook(config.head_dim, coded(codec).code_bits).exponent
            shape[stream + "_unit"] = unit
            table = _byte_table(codec, config.head_dim)
            if stream == "key":
                shape["key_bytes"] = table.view("<u4")
            elif int8_values:
                # Signed bytes, 128 less.
                shape["value_table"]["low"] = (table ^ 128).view("<u4")
    shape["page_stride"] = layout.page_strides[layer]
    shape["head_stride"] = extent.nbytes
    shape["qjl_signs"] = offset("key_qjl_signs")
    shape["residual_norms"] = offset("key_residual_norms")
    shape["page_shift"] = config.page_size.bit_length() - 1
    shape["table_stride"] = table_stride
    shape["batch"] = batch
    shape["num_kv_heads"] = config.num_kv_heads
    shape["group"] = group
    shape["window_left"] = -1 if window_left is None else window_left
    shape["soft_cap"] = 0.0 if soft_cap is None else soft_cap
    shape["has_offsets"] = has_offsets
    filled: Any = shape[()]
    assert isinstance(filled, np.void)
    return filled


def score_starts(table: Array, reads: Reads, page_size: int) -> tuple[Array, Array]:
    """Say where the scores of every sequence and block go in a ragged row.

    Parameters
    ----------
    table : ndarray of int32 ``[batch, max_blocks]``
        Page of each block; 0 where evicted.
    reads : Reads
        Which positions are read.
    page_size : int
        Tokens per page.

    Returns
    -------
    sequence_starts : ndarray of int64 ``[batch + 1]``
    block_starts : ndarray of int64 ``[batch, max_blocks]``
        From the start of the sequence.
    """
    counts = block_counts(table, reads, page_size)
    ends = counts.cumsum(axis=1)
    totals = np.concatenate([[0], counts.sum(axis=1).cumsum()])
    return totals.astype(np.int64), ends - counts
