"""Random rotations: seeded signs, then a Hadamard transform, one per KV head.

The transform is computed unnormalised, ``raw = sqrt(d) R x``, in a fixed order:

1. multiply by the head's signs;
2. butterfly stages of stride 1, 2, 4, ... on the power-of-two part: elements ``i`` and
   ``i + stride`` become their sum and their difference;
3. for ``d = m 2**k`` in `MIXED_RADIX` (m = 3, 5 or 7), the discrete Hartley matrix
   ``cas(2 pi a b / m)``, ``cas = cos + sin``, across the m contiguous parts of ``2**k`` elements:
   part ``a`` becomes ``sum over b`` of ``cas * part b``, b ascending, each product rounded before
   it is added.

Signs are mandatory: a Hadamard transform alone maps a constant vector to one coordinate. Other
dimensions get a dense orthogonal matrix (Gram-Schmidt on Gaussians: a Haar-distributed rotation),
applied in float64 with a fixed order of summation and rounded to the input's type once.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from .planar import (
    Array,
    fixed_order_product,
    lanes,
    scratch,
    tile_vectors,
    to_planes,
    to_rows,
)
from .random_streams import random_gaussians, random_signs, stream_key

#: Head dimensions with an odd factor that have a fast transform.
MIXED_RADIX = (80, 96, 112, 160, 192)

_warned: set[int] = set()
_warned_lock = threading.Lock()


class DenseRotationWarning(UserWarning):
    """A head dimension has no fast transform; its rotation is a dense matrix (slow)."""


def has_fast_transform(head_dim: int) -> bool:
    """Tell whether ``kind="hadamard"`` rotates this dimension without a dense matrix."""
    return _factor(head_dim)[0] == 1 or head_dim in MIXED_RADIX


class Rotation:
    """The rotations of all local KV heads of one layer and stream.

    Parameters
    ----------
    head_dim : int
        At least 3. Powers of two and `MIXED_RADIX` have a fast transform; any other uses a dense
        matrix and warns once per dimension.
    num_heads : int
        Local KV heads.
    seed, layer : int
        Select the random streams.
    stream : {"key", "value", "key_qjl"}
        Likewise.
    first_head : int
        Global index of the first local head.
    kind : {"hadamard", "dense"}
        ``"dense"`` asks for the dense matrix.

    Attributes
    ----------
    dense : bool
        Whether a dense matrix is used.
    signs : float32[num_heads, head_dim]
        First step of the transform; all ones when dense.
    matrices : float64[num_heads, head_dim, head_dim] or None
        The orthogonal matrices, when dense.
    entry_signs : float32[num_heads, head_dim]
        What `transform` expects its input multiplied by: ``signs``, with odd elements negated
        where the first butterfly is a complex product (see `transform`).
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        seed: int,
        layer: int,
        stream: str,
        first_head: int = 0,
        kind: str = "hadamard",
    ) -> None:
        if head_dim < 3:
            raise ArgumentError(f"head_dim must be at least 3, got {head_dim}")
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.odd, self.power = _factor(head_dim)
        self.dense = kind == "dense" or not has_fast_transform(head_dim)
        if self.dense and kind != "dense":
            _warn_dense(head_dim)
        keys = [stream_key(seed, layer, stream, first_head + head) for head in range(num_heads)]
        self.matrices: npt.NDArray[np.float64] | None = None
        if self.dense:
            self.matrices = _dense_matrices(head_dim, keys)
            self.signs = np.ones((num_heads, head_dim), np.float32)
        else:
            self.signs = np.stack([random_signs(key, head_dim) for key in keys])
        self.entry_signs = self.signs * self._alternating()
        self._hartley = None if self.dense or self.odd == 1 else _hartley(self.odd)

    def forward(self, vectors: Array) -> Array:
        """Rotate vectors: ``R x``.

        Parameters
        ----------
        vectors : float32 or float64 [..., num_heads * group, head_dim]
            Vector ``h * group + g`` of the second last axis is rotated as KV head ``h``.

        Returns
        -------
        array
            Same shape and type.
        """
        return self._apply(vectors, inverse=False)

    def inverse(self, vectors: Array, mean: Array | None = None) -> Array:
        """Undo `forward`; same shapes. Add a mean ``[num_heads, head_dim]`` where one is given."""
        turned = self._apply(vectors, inverse=True)
        if mean is not None:
            turned += mean.astype(turned.dtype)
        return turned

    def transform(self, planes: Array, spare: Array) -> tuple[Array, Array]:
        """Compute ``sqrt(d) R x`` of planes whose elements carry ``entry_signs``.

        Parameters
        ----------
        planes, spare : float[d/lanes, n*lanes]
            Input and a work array; both are overwritten. Vector ``i`` belongs to head
            ``i % num_heads``.

        Returns
        -------
        tuple of array
            The one that holds the result, and the other.
        """
        if self.matrices is not None:
            return self._transform_dense(planes, spare)
        if self.power > 1:
            # The first butterfly in one pass: (a - ib)(1 + i) = (a + b) + i(a - b). Products by 1
            # are exact, so both parts are rounded once. The minus is in `entry_signs`.
            pairs = np.complex64 if planes.dtype == np.float32 else np.complex128
            np.multiply(planes.view(pairs), pairs(1 + 1j), out=spare.view(pairs))
            planes, spare = spare, planes
        stride = 2
        while stride < self.power:
            source = planes.reshape(-1, 2, stride // 2 * planes.shape[1])
            target = spare.reshape(source.shape)
            np.add(source[:, 0], source[:, 1], out=target[:, 0])
            np.subtract(source[:, 0], source[:, 1], out=target[:, 1])
            planes, spare = spare, planes
            stride *= 2
        if self._hartley is not None:
            _transform_odd(self._hartley.astype(planes.dtype), planes, spare)
            planes, spare = spare, planes
        return planes, spare

    def _apply(self, vectors: Array, inverse: bool) -> Array:
        heads, d = self.num_heads, self.head_dim
        if vectors.ndim < 2 or vectors.shape[-1] != d or vectors.shape[-2] % heads:
            raise ArgumentError(
                f"rotation expects [..., a multiple of {heads} heads, {d}], got {vectors.shape}"
            )
        if vectors.dtype not in (np.float32, np.float64):
            raise ArgumentError(f"rotation expects float32 or float64, got {vectors.dtype}")
        if self.matrices is not None:
            return self._apply_dense(vectors, inverse)
        dtype = vectors.dtype
        batch = vectors.reshape(-1, heads, vectors.shape[-2] // heads, d)
        result = np.empty_like(batch, order="C")
        scale = dtype.type(1.0 / math.sqrt(d))
        # H is symmetric and H H = d, so the inverse is the same transform with the signs last.
        first = self._alternating() if inverse else self.entry_signs[:, None]
        first = first.astype(dtype) * scale
        step = max(1, tile_vectors(d, dtype.itemsize) // (heads * batch.shape[2]))
        for start in range(0, batch.shape[0], step):
            tile = batch[start : start + step]
            count = tile.size // d
            a = scratch("rows", tile.size, dtype)
            b = scratch("planes", tile.size, dtype)
            np.multiply(tile, first, out=a.reshape(tile.shape))
            shape = (d // lanes(d), count * lanes(d))
            to_planes(a.reshape(count, d), b.reshape(shape))
            raw, _ = self.transform(b.reshape(shape), a.reshape(shape))
            to_rows(raw, result[start : start + step].reshape(count, d))
        if inverse:
            result *= self.signs[:, None].astype(dtype)
        return result.reshape(vectors.shape)

    def _apply_dense(self, vectors: Array, inverse: bool) -> Array:
        assert self.matrices is not None
        heads, d = self.num_heads, self.head_dim
        batch = vectors.reshape(-1, heads, vectors.shape[-2] // heads, d)
        result = np.empty_like(batch, order="C")
        for head, matrix in enumerate(self.matrices):
            columns = batch[:, head].reshape(-1, d).T.astype(np.float64)
            product = fixed_order_product(matrix.T if inverse else matrix, columns)
            result[:, head] = product.T.reshape(batch[:, head].shape)
        return result.reshape(vectors.shape)

    def _transform_dense(self, planes: Array, spare: Array) -> tuple[Array, Array]:
        assert self.matrices is not None
        heads, d, width = self.num_heads, self.head_dim, lanes(self.head_dim)
        shape = (d // width, -1, heads, width)
        source, target = planes.reshape(shape), spare.reshape(shape)
        root = math.sqrt(d)
        for head, matrix in enumerate(self.matrices):
            columns = source[:, :, head].transpose(0, 2, 1).reshape(d, -1).astype(np.float64)
            raw = fixed_order_product(matrix * root, columns)
            target[:, :, head] = raw.reshape(d // width, width, -1).transpose(0, 2, 1)
        return spare, planes

    def _alternating(self) -> npt.NDArray[np.float32]:
        signs = np.ones(self.head_dim, np.float32)
        if not self.dense and self.power > 1:
            signs[1::2] = -1
        return signs


def _factor(head_dim: int) -> tuple[int, int]:
    """Split into the odd part and the power of two."""
    power = head_dim & -head_dim
    return head_dim // power, power


def _warn_dense(head_dim: int) -> None:
    with _warned_lock:
        if head_dim in _warned:
            return
        _warned.add(head_dim)
    warnings.warn(
        f"head_dim {head_dim} has no fast rotation (powers of two, 80, 96, 112, 160, 192 have); "
        "using a dense one, which is slow",
        DenseRotationWarning,
        stacklevel=4,
    )


def _hartley(odd: int) -> npt.NDArray[np.float64]:
    """Return the Hartley matrix, entries rounded to float32 values."""
    angle = 2.0 * np.pi / odd * (np.outer(np.arange(odd), np.arange(odd)) % odd)
    matrix: npt.NDArray[np.float64] = np.cos(angle) + np.sin(angle)
    return matrix.astype(np.float32).astype(np.float64)


def _transform_odd(matrix: Array, planes: Array, spare: Array) -> None:
    parts = planes.reshape(matrix.shape[0], -1)
    sums = spare.reshape(parts.shape)
    term = scratch("term", parts.shape[1], planes.dtype)
    for a, row in enumerate(matrix):
        np.add(parts[0], _scaled(row[1], parts[1], term), out=sums[a])
        for b in range(2, matrix.shape[0]):
            np.add(sums[a], _scaled(row[b], parts[b], term), out=sums[a])


def _scaled(coefficient: Array, part: Array, term: Array) -> Array:
    # The first row and column are ones, and a product by 1 changes nothing.
    return part if coefficient == 1 else np.multiply(part, coefficient, out=term)


#: Matrices that some rotation holds. Equal ones are made once, however many caches have them: a
#: cache that is replaced by a larger one of the same seed would otherwise pay for them again.
_matrices_in_use: weakref.WeakValueDictionary[tuple[int, ...], npt.NDArray[np.float64]]
_matrices_in_use = weakref.WeakValueDictionary()


def _dense_matrices(head_dim: int, keys: list[int]) -> npt.NDArray[np.float64]:
    """Return the orthogonal matrix of each random stream, ``float64[n, d, d]``, read-only."""
    found = _matrices_in_use.get((head_dim, *keys))
    if found is None:
        gaussians = [random_gaussians(key, head_dim * head_dim) for key in keys]
        found = _orthonormal_rows(np.stack(gaussians).reshape(-1, head_dim, head_dim))
        found.setflags(write=False)
        _matrices_in_use[(head_dim, *keys)] = found
    return found


def _orthonormal_rows(matrices: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Orthonormalise the rows of each matrix by Gram-Schmidt, element by element.

    Done twice, which makes the rows orthogonal to working precision (Giraud et al., 2005), and
    without LAPACK, so that every platform gets the same bits.
    """
    for _ in range(2):
        for row in range(matrices.shape[1]):
            vector = matrices[:, row]
            vector /= np.sqrt(_row_sum(vector * vector))[:, None]
            rest = matrices[:, row + 1 :]
            overlap = _row_sum(rest * vector[:, None])
            rest -= overlap[..., None] * vector[:, None]
    return matrices


def _row_sum(terms: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Sum the last axis by halving, an odd last term joining the first."""
    while terms.shape[-1] > 1:
        half = terms.shape[-1] // 2
        folded = terms[..., :half] + terms[..., half : 2 * half]
        if terms.shape[-1] % 2:
            folded[..., 0] += terms[..., -1]
        terms = folded
    total: npt.NDArray[np.float64] = terms[..., 0]
    return total
