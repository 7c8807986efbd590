"""Encoding tokens into pages: the store half of the host backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..codec import EncodedPolar, EncodedVectors, VectorCodec
from ..config import Exact
from ..paging.layout import PageLayout
from .dtypes import Float32, round_to, to_storage

Array = npt.NDArray[Any]


class PageWriter:
    """Write the tokens of one layer into their slots.

    Parameters
    ----------
    layout : PageLayout
        Where the planes lie.
    pool : ndarray of uint8
        The pool.
    layer : int
        The layer.
    codecs : tuple of VectorCodec or None
        Encoders of keys and values; None for an exact stream.
    """

    def __init__(
        self,
        layout: PageLayout,
        pool: Array,
        layer: int,
        codecs: tuple[VectorCodec | None, VectorCodec | None],
    ) -> None:
        config = layout.config
        self.page_size = config.page_size
        self.heads = np.arange(config.num_kv_heads)
        self.codecs = dict(zip(("key", "value"), codecs))
        self.exact = dict(zip(("key", "value"), config.layer_codecs(layer)))
        self._planes = {
            name: layout.plane_view(pool, layer, name) for name in layout.extents[layer].planes
        }

    def write(self, stream: str, vectors: Float32, slots: Array) -> None:
        """Encode and write ``float32[n, num_kv_heads, head_dim]`` to page slots ``int64[n]``.

        The vectors are valid and rounded to ``kv_dtype``; slots are distinct and in range.
        """
        codec = self.codecs[stream]
        if codec is None:
            exact = self.exact[stream]
            assert isinstance(exact, Exact)
            rows = to_storage(round_to(vectors, exact.dtype), exact.dtype)
            self._scatter(stream + "s", rows, slots)
            return
        self._write_encoded(stream, codec.encode(vectors), slots)

    def _write_encoded(
        self, stream: str, encoded: EncodedVectors | EncodedPolar, slots: Array
    ) -> None:
        if isinstance(encoded, EncodedPolar):
            self._scatter(stream + "_angles", encoded.angles, slots)
            self._scatter(stream + "_radii", encoded.radii, slots)
        else:
            self._write_codes(stream, encoded, slots)
        if encoded.qjl_signs is not None:
            self._scatter("key_qjl_signs", encoded.qjl_signs, slots)
            self._scatter("key_residual_norms", encoded.residual_norms, slots)

    def _write_codes(self, stream: str, encoded: EncodedVectors, slots: Array) -> None:
        place = self._scatter if stream == "key" else self._scatter_pairs
        place(stream + "_codes", encoded.codes, slots)
        if encoded.code_signs is not None:
            place(stream + "_code_signs", encoded.code_signs, slots)
        self._scatter(stream + "_norms", encoded.norms, slots)

    def _scatter(self, name: str, rows: Array | None, slots: Array) -> None:
        page, offset = np.divmod(slots, self.page_size)
        self._planes[name][page[:, None], self.heads, offset[:, None]] = rows

    def _scatter_pairs(self, name: str, rows: Array, slots: Array) -> None:
        """Write byte rows ``[n, heads, row]`` into a plane that interleaves token pairs."""
        plane = self._planes[name]
        # Two tokens of one pair that stand next to each other are written as 16-bit words.
        paired = np.zeros(len(slots), bool)
        paired[:-1] = (slots[:-1] % 2 == 0) & (slots[1:] == slots[:-1] + 1)
        even = np.flatnonzero(paired)
        if even.size:
            words = np.left_shift(rows[even + 1], 8, dtype=np.uint16)
            np.bitwise_or(words, rows[even], out=words)
            page, offset = np.divmod(slots[even], self.page_size)
            # The plane's last axis is the pair: two bytes that view as one word.
            wide = plane.view(np.uint16)[..., 0]
            wide[page[:, None], self.heads, offset[:, None] // 2] = words
            paired[even + 1] = True
        alone = np.flatnonzero(~paired)
        if alone.size:
            page, offset = np.divmod(slots[alone], self.page_size)
            plane[page[:, None], self.heads, offset[:, None] // 2, :, offset[:, None] % 2] = rows[
                alone
            ]
