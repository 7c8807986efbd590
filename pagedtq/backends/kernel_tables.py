"""What the kernels' codec needs in memory: codebooks, rotations, projections, as flat arrays.

The arrays are NumPy; a device backend uploads them once. ``kernels/codec.cuh`` reads them.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..codec.codebook import Codebook
from ..codec.rotation import Rotation
from ..codec.turboquant import TurboQuantCodec

Array = npt.NDArray[Any]


class StreamTables(NamedTuple):
    """Tables of one layer and stream; None where there is nothing to read.

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
    inverse_rotation, inverse_projection : ndarray or None
        What decoding reads instead: the same, but for dense rotations the orthogonal matrices.
    """

    book: Array | None
    rotation: Array | None
    mean: Array | None
    projection: Array | None
    inverse_rotation: Array | None
    inverse_projection: Array | None


def stream_tables(codec: TurboQuantCodec) -> StreamTables:
    """Return the tables of a codec."""
    rotation, projection = codec.rotation, codec.projection
    forward = backward = None
    if projection is not None:
        if projection.rotation is None:
            forward = backward = projection.matrices
        else:
            forward = rotation_table(projection.rotation)
            backward = inverse_table(projection.rotation)
    return StreamTables(
        book_table(codec.book),
        rotation_table(rotation),
        codec.mean,
        forward,
        inverse_table(rotation),
        backward,
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


def inverse_table(rotation: Rotation) -> Array:
    """Return what the kernels' ``unrotate`` reads: sign bits, or the orthogonal matrices."""
    return rotation_table(rotation) if rotation.matrices is None else rotation.matrices
