"""What a launch of the attention kernels is told about pages and queries: ``struct AttendShape``.

The NumPy dtype below is the C struct of ``kernels/tiles.cuh`` byte for byte, so that CuPy and the
CPU harness pass it by value alike.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..codec.codebook import codebook
from ..config import Codec, Exact
from ..paging.layout import PageLayout
from .stream_formats import coded, is_prod, stream_format, takes_int8

Array = npt.NDArray[Any]

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
