"""How two pools of pages differ: codes by their order, norms by their last bit.

What a page holds is compared where a token was written: slots whose norm is zero in both pools hold
nothing, and would dilute a share.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedtq.codec.bitpack import PackedCodes, unpack_codes
from pagedtq.config import TurboQuant
from pagedtq.paging.layout import PageLayout

Array = npt.NDArray[Any]

#: Shares that may differ: codes, then to a neighbour; norms and bounds, then by one unit in the
#: last place.
CODES, NORMS = 1e-5, 1e-3


class Differences(NamedTuple):
    """What differs between the pages of two pools.

    Attributes
    ----------
    codes, norms : int
        How many were compared; norms include residual norms and key bounds, codes the signs of a
        sketch.
    codes_differ, norms_differ : int
        How many are not equal.
    codes_apart, norms_apart : int
        How many are neither equal nor neighbours.
    exact_bytes : int
        Bytes of exact planes that differ.
    """

    codes: int = 0
    codes_differ: int = 0
    codes_apart: int = 0
    norms: int = 0
    norms_differ: int = 0
    norms_apart: int = 0
    exact_bytes: int = 0

    @property
    def within_bounds(self) -> bool:
        """Whether no more differs than `CODES` and `NORMS` allow, and then by one step."""
        return (
            self.codes_apart == self.norms_apart == self.exact_bytes == 0
            and self.codes_differ <= CODES * self.codes
            and self.norms_differ <= NORMS * self.norms
        )


def compare_pages(layout: PageLayout, ours: Array, theirs: Array) -> Differences:
    """Compare two pools of one layout, all layers.

    Parameters
    ----------
    layout : PageLayout
        Of both; TurboQuant and exact streams.
    ours, theirs : ndarray of uint8
        The pools.
    """
    total = np.zeros(len(Differences._fields), np.int64)
    for layer, extent in enumerate(layout.extents):
        for stream, codec in zip(("key", "value"), layout.config.layer_codecs(layer), strict=True):
            if not isinstance(codec, TurboQuant):
                planes = (layout.plane_view(pool, layer, stream + "s") for pool in (ours, theirs))
                a, b = (np.ascontiguousarray(plane).view(np.uint8) for plane in planes)
                total += Differences(exact_bytes=int((a != b).sum()))
                continue
            norms = [layout.plane_view(pool, layer, stream + "_norms") for pool in (ours, theirs)]
            written = (norms[0] != 0) | (norms[1] != 0)
            total += _norms(*norms, written)
            ranks = (_ranks(layout, pool, layer, stream, codec) for pool in (ours, theirs))
            total += _codes(*ranks, written)
            for name in extent.planes:
                if not name.startswith(stream) or name.endswith(("_codes", "_code_signs")):
                    continue
                views = [layout.plane_view(pool, layer, name) for pool in (ours, theirs)]
                if name == "key_qjl_signs":
                    bits = (np.unpackbits(view, axis=-1) for view in views)
                    total += _codes(*bits, written)
                elif name in ("key_residual_norms", "key_bounds"):
                    total += _norms(*views, (views[0] != 0) | (views[1] != 0))
    return Differences(*map(int, total))


def _ranks(layout: PageLayout, pool: Array, layer: int, stream: str, codec: TurboQuant) -> Array:
    """Return every code's place among its codebook's values: ``[pages, heads, tokens, d]``."""
    planes = layout.extents[layer].planes

    def rows(name: str) -> Array | None:
        if stream + name not in planes:
            return None
        view = layout.plane_view(pool, layer, stream + name)
        if planes[stream + name].interleaved:
            # Two tokens of a pair lie byte by byte side by side.
            view = view.swapaxes(3, 4).reshape(*view.shape[:2], -1, view.shape[3])
        return np.ascontiguousarray(view)

    codes = rows("_codes")
    assert codes is not None
    packed = PackedCodes(codes, rows("_code_signs"))
    width = codec.code_bits
    code = unpack_codes(packed, width, layout.config.head_dim, stream).astype(np.int16)
    half = 1 << width - 1
    return np.where(code < half, code, half - 1 - code)


def _codes(ours: Array, theirs: Array, written: Array) -> Differences:
    apart = np.abs(ours[written].astype(np.int16) - theirs[written].astype(np.int16))
    return Differences(
        codes=apart.size, codes_differ=int((apart > 0).sum()), codes_apart=int((apart > 1).sum())
    )


def _norms(ours: Array, theirs: Array, written: Array) -> Differences:
    places = []
    for view in (ours, theirs):
        bits = np.ascontiguousarray(view).view(np.int16)[written].astype(np.int32)
        # By value: negative numbers count down from zero.
        places.append(np.where(bits < 0, -(bits & 0x7FFF), bits))
    apart = np.abs(places[0] - places[1])
    return Differences(
        norms=apart.size, norms_differ=int((apart > 0).sum()), norms_apart=int((apart > 1).sum())
    )
