"""Moving whole pages in NumPy: copies, clearing, and slabs."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ArgumentTypeError
from ..paging.layout import PageLayout
from .dtypes import check_shape

Array = npt.NDArray[Any]


class SlabRules:
    """What holds for whole pages wherever their pool lies.

    Parameters
    ----------
    layout : PageLayout
        Where everything lies.
    """

    def __init__(self, layout: PageLayout) -> None:
        self._layout = layout

    def check(self, pages: Array) -> None:
        """Refuse page ids that are not integers inside the pool (the null page included)."""
        total = self._layout.config.num_pages
        if not isinstance(pages, np.ndarray) or pages.dtype.kind not in "iu" or pages.ndim != 1:
            raise ArgumentError("page ids must be a one-dimensional integer array")
        if pages.size and not (pages.min() > 0 and pages.max() < total):
            bad = pages[(pages <= 0) | (pages >= total)][0]
            raise ArgumentError(f"page ids must be in [1, {total - 1}], got {bad}")

    def clear_slots(self, slab: Array, layer: int, first: int) -> None:
        """Zero everything a slab holds of a layer's tokens from slot ``first`` on.

        Bounds are of the page, not of a token, and stay.
        """
        heads, extent = self._layout.config.num_kv_heads, self._layout.extents[layer]
        for name, plane in extent.planes.items():
            if name == "key_bounds":
                continue
            offset = self._layout.slab_offsets[layer] + plane.offset
            strides = (extent.nbytes, *np.empty(plane.shape, plane.dtype).strides)
            shape = (heads, *plane.shape)
            view: Array = np.ndarray(shape, plane.dtype, slab, offset, strides)
            if plane.interleaved:
                view[:, first // 2, :, first % 2 :] = 0
                view[:, first // 2 + 1 :] = 0
            else:
                view[:, first:] = 0


class PageBytes(SlabRules):
    """Whole-page operations on a pool: all layers and heads at once.

    Parameters
    ----------
    layout : PageLayout
        Where everything lies.
    pool : ndarray of uint8
        The pool.
    """

    def __init__(self, layout: PageLayout, pool: Array) -> None:
        super().__init__(layout)
        self._layers = [layout.layer_view(pool, i) for i in range(len(layout.extents))]
        self._norms = [
            layout.plane_view(pool, layer, name)
            for layer, extent in enumerate(layout.extents)
            for name in extent.planes
            if name.endswith(("_norms", "_radii")) or name == "key_bounds"
        ]

    def copy(self, src: Array, dst: Array) -> None:
        """Copy pages: ``dst[i]`` becomes ``src[i]``; no page is both source and destination."""
        self.check(src)
        self.check(dst)
        if len(src) != len(dst):
            raise ArgumentError(f"src and dst must pair up, got {len(src)} and {len(dst)} pages")
        for view in self._layers:
            view[dst] = view[src]

    def clear_norms(self, pages: Array) -> None:
        """Zero norms, radii and key bounds, so that no stale norm is ever NaN."""
        self.check(pages)
        for plane in self._norms:
            plane[pages] = 0

    def fill(self, pages: Array, byte: int) -> None:
        """Fill pages with one byte (poison, in debug mode)."""
        self.check(pages)
        for view in self._layers:
            view[pages] = byte

    def gather(self, pages: Array, out: Array | None = None) -> Array:
        """Copy pages into slabs ``uint8[len(pages), page_bytes]``, into ``out`` where given."""
        self.check(pages)
        shape = (len(pages), self._layout.page_bytes)
        slabs = np.empty(shape, np.uint8) if out is None else out
        check_shape(slabs, "out", shape, "pages, page bytes")
        # Neighbours need no index array, and so no copy in between.
        chosen = _as_slice(pages)
        for part, view in self._slab_parts(slabs):
            part[:] = view[chosen].reshape(part.shape)
        return slabs

    def scatter(self, slabs: Array, pages: Array) -> None:
        """Copy slabs ``uint8[len(pages), page_bytes]`` into pages."""
        self.check(pages)
        check_shape(slabs, "slabs", (len(pages), self._layout.page_bytes), "pages, page bytes")
        if slabs.dtype != np.uint8:
            raise ArgumentTypeError(f"slabs must be uint8, got {slabs.dtype}")
        chosen = _as_slice(pages)
        for part, view in self._slab_parts(slabs):
            view[chosen] = part.reshape(len(pages), *view.shape[1:])

    def _slab_parts(self, slabs: Array) -> list[tuple[Array, Array]]:
        sizes = self._layout.layer_page_bytes
        starts = self._layout.slab_offsets
        return [
            (slabs[:, start : start + size], view)
            for start, size, view in zip(starts, sizes, self._layers)
        ]


def _as_slice(pages: Array) -> Array | slice:
    """Return a slice where the page ids are consecutive, else the ids."""
    if len(pages) and (np.diff(pages) == 1).all():
        return slice(int(pages[0]), int(pages[-1]) + 1)
    return pages
