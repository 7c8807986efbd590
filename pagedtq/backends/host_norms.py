"""What the norm planes of pages say about their tokens, without a look at the codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import Polar, TurboQuant
from ..paging.layout import PageLayout

Array = npt.NDArray[Any]

#: Key norms below it count as this much: the smallest positive float16.
_SMALLEST = 2.0**-24


class NormPlanes:
    """The norms of keys and values of one layer.

    Norms of keys are those of the centred keys. A TurboQuant norm has its scale correction folded
    in, a factor that is the same for all tokens of a stream but for a fraction of a per cent.

    Parameters
    ----------
    layout : PageLayout
        Where the planes lie.
    pool : ndarray of uint8
        The pool.
    layer : int
        The layer.
    """

    def __init__(self, layout: PageLayout, pool: Array, layer: int) -> None:
        planes = layout.extents[layer].planes
        self._streams: list[tuple[Array, bool]] = []
        for stream, codec in zip(("key", "value"), layout.config.layer_codecs(layer)):
            if isinstance(codec, TurboQuant | Polar):
                radii = isinstance(codec, Polar)
                name = stream + ("_radii" if radii else "_norms")
                assert name in planes
                self._streams.append((layout.plane_view(pool, layer, name), radii))

    @property
    def complete(self) -> bool:
        """Whether both streams keep norms apart (exact ones do not)."""
        return len(self._streams) == 2

    def ratios(self, pages: Array) -> Array:
        """Return the mean over tokens of value norm by key norm, float64 ``[n, num_kv_heads]``."""
        keys, values = (self._norms(*stream, pages) for stream in self._streams)
        return np.asarray((values / np.maximum(keys, _SMALLEST)).mean(axis=2))

    @staticmethod
    def _norms(plane: Array, radii: bool, pages: Array) -> Array:
        wide = plane[pages].astype(np.float64)
        return np.sqrt((wide * wide).sum(axis=-1)) if radii else wide
