"""The compile-time half of a layer's geometry, as the kernels' ``-D`` macros."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..config import Codec, Exact, Polar
from ..errors import UnsupportedError

if TYPE_CHECKING:
    from .layout import ExtentLayout, PageLayout

#: Numbers that stand for names in ``kernels/page.cuh``.
DTYPE_NUMBERS = {"f16": 1, "bf16": 2, "f32": 3}
SCALE_NUMBERS = {"none": 0, "norm_corrected": 1, "unbiased": 2, "searched": 3}
QJL_NUMBERS = {"none": 0, "gaussian": 1, "orthogonal": 2}

_STREAM_MACROS = (
    "EXACT",
    "BITS",
    "SCALE",
    "QJL",
    "DENSE",
    "ROW",
    "SIGN_ROW",
    "CODES_AT",
    "SIGNS_AT",
    "NORMS_AT",
    "QJL_AT",
    "RESIDUAL_NORMS_AT",
)


def kernel_macros(layout: PageLayout, layer: int) -> dict[str, int]:
    """Return the macros of a layer; see `PageLayout.kernel_macros`."""
    config, extent = layout.config, layout.extents[layer]
    head_dim = config.head_dim
    root = math.sqrt(head_dim)
    macros = {
        "HEAD_DIM": head_dim,
        "KV_DTYPE": DTYPE_NUMBERS[config.kv_dtype],
        "ROOT_BITS": _float_bits(root),
        "INVERSE_ROOT_BITS": _float_bits(1.0 / root),
    }
    bounds = extent.planes.get("key_bounds")
    macros["KEY_BOUNDS_AT"] = 0 if bounds is None else bounds.offset // config.page_size
    for stream, codec in zip(("key", "value"), config.layer_codecs(layer)):
        macros |= _stream_macros(extent, stream, codec, config.page_size)
    return macros


def _float_bits(value: float) -> int:
    """Return the bits of a number rounded to float32, as the host rounds it."""
    return int(np.float32(value).view(np.uint32))


def _stream_macros(
    extent: ExtentLayout, stream: str, codec: Codec, page_size: int
) -> dict[str, int]:
    def at(plane: str) -> int:
        """Bytes per token before a plane: its offset for a page of one token."""
        offset = extent.planes[plane].offset
        assert offset % page_size == 0, "planes of multiples of 16 tokens need no padding"
        return offset // page_size

    def row(plane: str) -> int:
        return extent.planes[plane].nbytes // page_size if plane in extent.planes else 0

    prefix = stream.upper()
    values = dict.fromkeys(_STREAM_MACROS, 0)
    if isinstance(codec, Exact):
        values |= {
            "EXACT": DTYPE_NUMBERS[codec.dtype],
            "CODES_AT": at(stream + "s"),
            "ROW": row(stream + "s"),
        }
    elif isinstance(codec, Polar):
        raise UnsupportedError(
            f"the kernels read TurboQuant and exact streams, got {codec} for {stream}s"
        )
    else:
        prod = codec.estimator == "prod"
        values |= {
            "BITS": codec.code_bits,
            "SCALE": SCALE_NUMBERS["none" if prod else codec.scale],
            "DENSE": int(codec.rotation == "dense"),
            "CODES_AT": at(stream + "_codes"),
            "ROW": row(stream + "_codes"),
            "SIGN_ROW": row(stream + "_code_signs"),
            "NORMS_AT": at(stream + "_norms"),
        }
        if values["SIGN_ROW"]:
            values["SIGNS_AT"] = at(stream + "_code_signs")
        if prod:
            values["QJL"] = QJL_NUMBERS[codec.projection]
            values["QJL_AT"] = at("key_qjl_signs")
            values["RESIDUAL_NORMS_AT"] = at("key_residual_norms")
    return {f"{prefix}_{name}": value for name, value in values.items()}
