"""Vectors as planes: the memory order in which the codec's arithmetic is fast and fixed.

``n`` vectors of dimension ``d`` become ``d / lanes`` contiguous planes of ``n * lanes`` elements;
``lanes`` is 2 for even ``d`` (elements ``2 i`` and ``2 i + 1`` side by side), else 1. Every
operation then works on whole planes, element by element, so that the result for a vector cannot
depend on its neighbours, its position or the size of the batch. No BLAS, no reduction whose order
NumPy chooses.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

#: Bytes of one work array: small enough for the outer caches, large enough that two threads do not
#: spend their time handing over the interpreter lock (at an eighth of it they gain nothing).
TILE_BYTES = 1 << 21

# Two elements as one number, by the bytes of an element.
_PAIR: dict[int, np.dtype[Any]] = {
    1: np.dtype(np.uint16),
    4: np.dtype(np.uint64),
    8: np.dtype(np.complex128),
}
_local = threading.local()


def lanes(head_dim: int) -> int:
    """Return how many neighbouring elements of a vector lie side by side in a plane."""
    return 2 if head_dim % 2 == 0 else 1


def tile_vectors(head_dim: int, itemsize: int = 4) -> int:
    """Return the number of vectors to work on at a time."""
    return max(1, TILE_BYTES // (head_dim * itemsize))


def scratch(name: str, size: int, dtype: npt.DTypeLike) -> Array:
    """Return this thread's one-dimensional work array of a name; its content is arbitrary."""
    arrays: dict[str, Array] = _local.__dict__.setdefault("arrays", {})
    kind: np.dtype[Any] = np.dtype(dtype)
    nbytes = size * kind.itemsize
    array = arrays.get(name)
    if array is None or array.nbytes < nbytes:
        array = arrays[name] = np.empty(nbytes, np.uint8)
    return array[:nbytes].view(kind)


def to_planes(rows: Array, planes: Array) -> None:
    """Transpose contiguous ``rows[n, d]`` into ``planes[d/lanes, n*lanes]`` of the same type."""
    if lanes(rows.shape[1]) == 2:
        # Pairs move as one number of twice the size: half the strided copies.
        pair = _PAIR[rows.itemsize]
        planes.view(pair)[...] = rows.view(pair).T
    else:
        planes[...] = rows.T


def to_rows(planes: Array, rows: Array) -> None:
    """Invert `to_planes`."""
    if lanes(rows.shape[1]) == 2:
        pair = _PAIR[rows.itemsize]
        rows.view(pair)[...] = planes.view(pair).T
    else:
        rows[...] = planes.T


def fold(planes: Array, count: int) -> Array:
    """Sum the elements of each vector in the fixed order of the page format.

    While the number ``m`` of terms is even, term ``i`` becomes ``s[i] + s[i + m/2]``; the odd
    remainder is added left to right. Terms are numbered by element.

    Parameters
    ----------
    planes : float[d/lanes, count*lanes]
        Terms; overwritten.
    count : int
        Number of vectors.

    Returns
    -------
    float[count]
    """
    width = planes.shape[1] // count
    terms = planes
    while terms.shape[0] % 2 == 0:
        half = terms.shape[0] // 2
        np.add(terms[:half], terms[half:], out=terms[:half])
        terms = terms[:half]
    if width == 2:
        # An odd number of pairs: halves now cut through a pair, so give each element its plane.
        terms = terms.reshape(-1, count, 2).transpose(0, 2, 1).reshape(-1, count)
        half = terms.shape[0] // 2
        terms = terms[:half] + terms[half:]
    total: Array = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def fixed_order_product(matrix: Array, columns: Array) -> Array:
    """Multiply ``matrix[m, d]`` with ``columns[d, n]``, summing ``j = 0 .. d-1`` in that order.

    Each product is rounded before it is added (no fused multiply-add), in the type of ``matrix``.
    """
    total = matrix[:, :1] * columns[:1]
    term = np.empty_like(total)
    for j in range(1, matrix.shape[1]):
        np.multiply(matrix[:, j : j + 1], columns[j : j + 1], out=term)
        np.add(total, term, out=total)
    return total
