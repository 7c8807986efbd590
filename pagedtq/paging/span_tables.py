"""Geometry of whole pages as integer tables: what the kernels that move pages read."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .layout import PageLayout

#: Planes that must never hold a stale NaN; `PageLayout` names them.
NORM_SUFFIX, BOUNDS = "_norms", "key_bounds"


def layer_spans(layout: PageLayout) -> npt.NDArray[np.int64]:
    """Return ``int64[num_layers, 4]``: ``LayerSpan`` of ``kernels/move.cuh``.

    Columns: offset of page 0 in the pool, page stride, offset in a slab, bytes of one page.
    """
    columns = (
        layout.layer_offsets,
        layout.page_strides,
        layout.slab_offsets,
        layout.layer_page_bytes,
    )
    return np.array(columns, np.int64).T.copy()


def norm_spans(layout: PageLayout) -> npt.NDArray[np.int64]:
    """Return ``int64[planes, 4]``: ``NormSpan`` of ``kernels/clear_norms.cu``.

    One row per norm plane (and key bounds) of each layer: its offset in page 0 and head 0, page
    stride, head stride, bytes in one extent.
    """
    rows = [
        (
            layout.layer_offsets[layer] + plane.offset,
            layout.page_strides[layer],
            extent.nbytes,
            plane.nbytes,
        )
        for layer, extent in enumerate(layout.extents)
        for name, plane in extent.planes.items()
        if name.endswith(NORM_SUFFIX) or name == BOUNDS
    ]
    return np.array(rows, np.int64).reshape(-1, 4)
