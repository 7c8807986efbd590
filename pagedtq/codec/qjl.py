"""QJL: the sign sketch of a residual, for unbiased inner products (arXiv 2406.03482, 2504.19874).

A residual ``r`` in the rotated space is kept as ``sign(S r)`` and its norm ``gamma``. For Gaussian
``S`` (``d x d``, standard normal entries) ``E[<S q, sign(S r)>] = d sqrt(2/pi) <q, r> / |r|``, so

    <q, r>  ~  gamma * sqrt(pi/2) / d * <S q, sign(S r)>,

and for a random orthogonal ``S`` the factor is ``sqrt(pi / (2 d))``. ``sign(0)`` is +1.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from .planar import Array, fixed_order_product, lanes, scratch, to_planes, to_rows
from .random_streams import random_gaussians, stream_key
from .rotation import Rotation

#: Name of the random stream of the projections of keys.
STREAM = "key_qjl"


class Projection:
    """The matrices ``S`` of all local KV heads of one layer.

    Parameters
    ----------
    head_dim, num_heads, seed, layer, first_head
        As for `Rotation`.
    kind : {"gaussian", "orthogonal"}
        Independent normal entries, drawn row by row; or a second random rotation.
    rotation : {"hadamard", "dense"}
        Kind of that rotation.
    rows : int, optional
        Rows of a Gaussian ``S``, and signs of its sketch; ``head_dim`` by default. The factor is
        then ``sqrt(pi/2) / rows``.

    Attributes
    ----------
    factor : float
        What ``gamma * <S q, sign(S r)>`` is multiplied with.
    matrices : float32[num_heads, rows, head_dim] or None
        The Gaussian matrices.
    rotation : Rotation or None
        The orthogonal ones.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        seed: int,
        layer: int,
        first_head: int = 0,
        kind: str = "gaussian",
        rotation: str = "hadamard",
        rows: int | None = None,
    ) -> None:
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.rows = head_dim if rows is None else rows
        self.matrices: npt.NDArray[np.float32] | None = None
        self.rotation: Rotation | None = None
        if kind == "orthogonal":
            self.factor = math.sqrt(math.pi / (2 * head_dim))
            self.rotation = Rotation(head_dim, num_heads, seed, layer, STREAM, first_head, rotation)
            return
        self.factor = math.sqrt(math.pi / 2) / self.rows
        keys = [stream_key(seed, layer, STREAM, first_head + h) for h in range(num_heads)]
        normals = [random_gaussians(key, self.rows * head_dim) for key in keys]
        shape = (num_heads, self.rows, head_dim)
        self.matrices = np.stack(normals).reshape(shape).astype(np.float32)

    def project(self, rotated: Array) -> Array:
        """Return ``S y`` for rotated queries ``[..., num_heads * group, head_dim]``."""
        return self._multiply(rotated, transposed=False)

    def project_back(self, signs: Array) -> Array:
        """Return ``S^T y`` of vectors ``[..., num_heads * group, rows]``."""
        return self._multiply(signs, transposed=True)

    def decode(self, signs: Array, gamma: Array) -> Array:
        """Return what a sketch adds to a decoded vector: ``gamma * factor * S^T signs``.

        Parameters
        ----------
        signs : float ``[..., num_heads * group, rows]``
            The sketch, as 1 and -1.
        gamma : float ``[..., num_heads * group]``
            Norms of the residuals.
        """
        scale: Array = (gamma * gamma.dtype.type(self.factor))[..., None]
        return self.project_back(signs) * scale

    def positive(self, residual: Array, spare: Array) -> npt.NDArray[np.bool_]:
        """Tell where ``S r >= 0``, in a fixed order of float32 operations.

        Gaussian: each output sums ``S[i, j] * r[j]`` for ascending j, products rounded first.
        Orthogonal: `Rotation.transform` (the positive scale ``sqrt(d)`` does not matter).

        Parameters
        ----------
        residual, spare : float32[d/lanes, n*lanes]
            Residuals in planes, vector ``i`` of head ``i % num_heads``; both are overwritten.

        Returns
        -------
        bool[n, d]
        """
        d, heads = self.head_dim, self.num_heads
        count = residual.size // d
        rows = scratch("qjl_rows", residual.size, np.float32).reshape(count, d)
        if self.rotation is not None:
            to_rows(residual, rows)
            by_head = rows.reshape(-1, heads, d)
            np.multiply(by_head, self.rotation.entry_signs, out=by_head)
            to_planes(rows, residual)
            projected, _ = self.rotation.transform(residual, spare)
            to_rows(projected, rows)
            return rows >= 0
        assert self.matrices is not None
        width = lanes(d)
        planes = residual.reshape(d // width, -1, heads, width)
        positive = np.empty((count // heads, heads, d), np.bool_)
        for head, matrix in enumerate(self.matrices):
            columns = planes[:, :, head].transpose(0, 2, 1).reshape(d, -1)
            positive[:, head] = (fixed_order_product(matrix, columns) >= 0).T
        return positive.reshape(count, d)

    def _multiply(self, vectors: Array, transposed: bool) -> Array:
        if self.rotation is not None:
            turn = self.rotation.inverse if transposed else self.rotation.forward
            return turn(vectors)
        assert self.matrices is not None
        heads, d, out = self.num_heads, self.head_dim, self.rows
        if transposed:
            d, out = out, d
        if vectors.ndim < 2 or vectors.shape[-1] != d or vectors.shape[-2] % heads:
            raise ArgumentError(
                f"projection expects [..., a multiple of {heads} heads, {d}], got {vectors.shape}"
            )
        batch = vectors.reshape(-1, heads, vectors.shape[-2] // heads, d)
        result = np.empty((*batch.shape[:3], out), vectors.dtype)
        for head, matrix in enumerate(self.matrices.astype(vectors.dtype)):
            columns = np.ascontiguousarray(batch[:, head].reshape(-1, d).T)
            product = fixed_order_product(matrix.T if transposed else matrix, columns)
            result[:, head] = product.T.reshape(result[:, head].shape)
        return result.reshape(*vectors.shape[:-1], out)
