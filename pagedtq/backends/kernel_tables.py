"""What the kernels' codec needs in memory: codebooks, rotations, projections, as flat arrays.

The arrays are NumPy; a device backend uploads them once. ``kernels/codec.cuh`` reads them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..codec.codebook import Codebook
from ..codec.qjl import Projection
from ..codec.rotation import Rotation
from ..codec.turboquant import TurboQuantCodec

Array = npt.NDArray[Any]


class StreamTables(NamedTuple):
    """Tables of one layer and stream.

    Attributes
    ----------
    book : float32[1 + 3 * 2**(width-1)]
        Factor, half step, midpoints, magnitudes of the decode table, odd steps (see `book_table`).
    rotation : uint8[H, ceil(d / 8)] or float64[H, d, d]
        See `rotation_table`.
    mean : float32[H, d] or None
        Subtracted before encoding.
    projection : ndarray or None
        Prod: ``float32[H, d, d]`` Gaussian matrices, or a rotation's table.
    """

    book: npt.NDArray[np.float32]
    rotation: Array
    mean: npt.NDArray[np.float32] | None
    projection: Array | None


def stream_tables(codec: TurboQuantCodec) -> StreamTables:
    """Return the tables of a codec."""
    projection = None if codec.projection is None else projection_table(codec.projection)
    return StreamTables(
        book_table(codec.book), rotation_table(codec.rotation), codec.mean, projection
    )


def book_table(book: Codebook) -> npt.NDArray[np.float32]:
    """Flatten a codebook of ``n`` cells.

    Returns
    -------
    float32[1 + 3 n]
        ``factor``; the power of two ``2**-(exponent + 1)`` that odd steps multiply; ``n - 1``
        midpoints; ``n`` magnitudes; ``n`` odd steps (0 above width 4).
    """
    cells = len(book.magnitudes)
    odd_steps: Array = np.zeros(cells) if book.odd_steps is None else book.odd_steps
    head = np.array((book.factor, 2.0 ** -(book.exponent + 1)))
    parts: list[Array] = [head, book.midpoints, book.table[:cells], odd_steps]
    return np.concatenate(parts).astype(np.float32)


def rotation_table(rotation: Rotation) -> Array:
    """Return what the kernels' ``rotate`` reads.

    Returns
    -------
    uint8[H, ceil(d / 8)]
        Bit ``i`` of a head's row is 1 iff element ``i`` is negated first.
    float64[H, d, d]
        Dense rotations: the matrices times ``sqrt(d)``, rounded as the host rounds them.
    """
    if rotation.matrices is not None:
        return rotation.matrices * math.sqrt(rotation.head_dim)
    return np.packbits(rotation.signs < 0, axis=-1, bitorder="little")


def projection_table(projection: Projection) -> Array:
    """Return the Gaussian matrices, or the table of the second rotation."""
    if projection.rotation is not None:
        return rotation_table(projection.rotation)
    assert projection.matrices is not None
    return projection.matrices
