"""Reading polar pages as float tiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..codec.bitpack import unpack
from ..codec.polar import decode_pairs
from ..config import Polar
from ..paging.layout import PageLayout
from .page_reader import StreamReader, sign_table

Array = npt.NDArray[Any]


class PolarReader(StreamReader):
    """Decode one polar stream of one layer, page by page.

    Tiles are plain rotated values, like those of exact streams: there is no norm apart.

    Parameters
    ----------
    layout, pool, layer, stream, dtype
        As for `StreamReader`.
    codec : Polar
        The stream's codec.
    """

    def __init__(
        self,
        layout: PageLayout,
        pool: Array,
        layer: int,
        stream: str,
        codec: Polar,
        dtype: npt.DTypeLike,
    ) -> None:
        self.head_dim = layout.config.head_dim
        self.page_size = layout.config.page_size
        self.stream = stream
        self.codec = codec
        self.dtype = np.dtype(dtype)
        self.plain = True
        self.sketch_dim = codec.sketch_dim(self.head_dim)
        self._pairs = False
        self._width = codec.angle_bits
        self._angles = layout.plane_view(pool, layer, stream + "_angles")
        self._radii = layout.plane_view(pool, layer, stream + "_radii")
        if self.sketch_dim:
            self._qjl_signs = layout.plane_view(pool, layer, "key_qjl_signs")
            self._residual_norms = layout.plane_view(pool, layer, "key_residual_norms")
            self._sign_table = sign_table(self.dtype)

    def norms(self, pages: Array, head: int) -> Array | None:
        """Return None: radii are in the tile."""
        return None

    def tile(self, pages: Array, head: int) -> Array:
        """Decode pages of one head: ``[1, tokens, head_dim]``, rotated."""
        index = unpack(self._angles[pages, head], self._width, self.head_dim // 2)
        values = decode_pairs(index, self._radii[pages, head], self._width, self.dtype)
        return values.reshape(1, -1, self.head_dim)
