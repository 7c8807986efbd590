"""Polar codes: rotate, then store neighbouring coordinates as radius and angle.

After the rotation, coordinates ``2 j`` and ``2 j + 1`` become ``r = sqrt(a**2 + b**2)`` and
``theta = atan2(b, a)``. The radius is kept as a float; the angle as the index of one of ``2**b``
equal bins of ``[-pi, pi]``, decoded at the bin's **centre** (a left edge would turn every pair by
half a bin). Uniform bins are optimal, as the angle of a rotated pair is uniform: the squared error
of a pair is ``2 r**2 (1 - sin(h) / h)`` with half bin ``h = pi / 2**b``.

With a sketch, the residual ``e`` of the rotated vector after this stage, with the *stored* radii,
is kept as ``sign(G e)``, G Gaussian with m rows, and ``gamma = |e|``:
``<q, x> ~ <R q, decoded> + gamma sqrt(pi/2) / m <G R q, sign>`` (see `qjl`).

All arithmetic is float64, elementwise or in a fixed order, so a code does not depend on what is
encoded beside it. Angles within an ulp of a bin's edge may differ between platforms, whose
``atan2`` does. This is the arrangement of the crate `turbo-quant`, not of PolarQuant
(arXiv 2502.02617), whose tree has one radius per vector.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import Polar
from ..errors import ConfigError
from . import bitpack
from .planar import Array, fold
from .qjl import Projection
from .rotation import Rotation, has_fast_transform
from .validation import MAX_NORM, check_vectors, checked_mean

#: Largest norm with radii in f32: well below where one overflows.
MAX_NORM_F32 = 1e38

_RADIUS_TYPES: dict[str, Any] = {"f16": np.float16, "f32": np.float32}


@dataclass(frozen=True, slots=True)
class EncodedPolar:
    """Encoded vectors of one layer and stream, rows as they lie in pages.

    Attributes
    ----------
    angles : uint8[T, H, row]
        Plain rows (`bitpack.pack`) of ``head_dim / 2`` bin indices.
    radii : float16 or float32 [T, H, head_dim / 2]
        Radii of the pairs.
    qjl_signs : uint8[T, H, ceil(m / 8)] or None
        Bit ``i`` is 1 iff ``(G e)_i >= 0``.
    residual_norms : float16 or float32 [T, H] or None
        ``|e|``.
    """

    angles: npt.NDArray[np.uint8]
    radii: Array
    qjl_signs: npt.NDArray[np.uint8] | None = None
    residual_norms: Array | None = None


class PolarCodec:
    """Polar encoder and decoder of one layer and stream, all local KV heads.

    Parameters
    ----------
    config : Polar
        Bits, mode, rotation, type of the radii.
    head_dim, num_heads : int
        Shape of the vectors ``[T, num_heads, head_dim]``; ``head_dim`` is even.
    seed, layer, stream, first_kv_head, mean
        As for `TurboQuantCodec`.

    Raises
    ------
    ConfigError
        If the dimension is odd, has no fast transform although one is asked for, or the stream
        cannot use the mode.
    """

    def __init__(
        self,
        config: Polar,
        head_dim: int,
        num_heads: int,
        *,
        seed: int = 0,
        layer: int = 0,
        stream: str = "key",
        first_kv_head: int = 0,
        mean: npt.ArrayLike | None = None,
    ) -> None:
        if stream not in ("key", "value"):
            raise ConfigError(f'stream must be "key" or "value", got {stream!r}')
        if head_dim % 2:
            raise ConfigError(f"Polar needs an even head_dim, got {head_dim}")
        if config.mode == "polar_qjl" and stream == "value":
            raise ConfigError('values cannot use mode "polar_qjl": it is for inner products')
        seed = (seed + config.seed_offset) % 2**64
        self.config = config
        self.head_dim, self.num_heads = head_dim, num_heads
        self.stream = stream
        self.mean = checked_mean(mean, (num_heads, head_dim))
        kind = rotation_kind(config.rotation, head_dim)
        self.rotation = Rotation(head_dim, num_heads, seed, layer, stream, first_kv_head, kind)
        self.projection: Projection | None = None
        if config.mode == "polar_qjl":
            self.projection = Projection(
                head_dim,
                num_heads,
                seed,
                layer,
                first_kv_head,
                rows=config.sketch_dim(head_dim),
            )

    def validate(self, vectors: Array) -> None:
        """Check vectors before they are encoded; see `validation.check_vectors`."""
        limit = MAX_NORM if self.config.radii == "f16" else MAX_NORM_F32
        shape = (self.num_heads, self.head_dim)
        check_vectors(vectors, shape, self.stream, self.mean, False, limit)

    def encode(self, vectors: Array) -> EncodedPolar:
        """Encode ``float32[T, num_heads, head_dim]``, finite and within range."""
        centred = vectors.astype(np.float64)
        if self.mean is not None:
            centred -= self.mean
        rotated = self.rotation.forward(centred)
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        radii = np.sqrt(first * first + second * second)
        width = self.config.angle_bits
        # Radians to bins; pi itself, and what rounds up to it, belongs to the last bin.
        bins = (np.arctan2(second, first) + np.pi) * (2**width / (2 * np.pi))
        index = np.minimum(bins, 2**width - 1).astype(np.uint8 if width <= 8 else np.uint16)
        stored = radii.astype(_RADIUS_TYPES[self.config.radii])
        angles = bitpack.pack(index, width)
        if self.projection is None:
            return EncodedPolar(angles, stored)
        residual = rotated - decode_pairs(index, stored, width, np.float64)
        squares = (residual * residual).reshape(-1, self.head_dim).T
        count = squares.shape[1]
        norms = np.sqrt(fold(np.ascontiguousarray(squares), count)) if count else np.zeros(0)
        signs = self.projection.project(residual) >= 0
        return EncodedPolar(
            angles,
            stored,
            bitpack.pack(signs.astype(np.uint8), 1),
            norms.reshape(vectors.shape[:2]).astype(stored.dtype),
        )

    def decode_rotated(self, encoded: EncodedPolar, dtype: npt.DTypeLike = np.float32) -> Array:
        """Decode without undoing the rotation and without the sketch: float ``[T, H, d]``."""
        width = self.config.angle_bits
        index = bitpack.unpack(encoded.angles, width, self.head_dim // 2)
        return decode_pairs(index, encoded.radii, width, dtype)

    def decode(self, encoded: EncodedPolar, dtype: npt.DTypeLike = np.float32) -> Array:
        """Decode vectors.

        With a sketch this adds ``gamma * factor * G^T sign``: inner products with the result are
        the unbiased estimates, its error as a vector is larger.

        Returns
        -------
        float32 or float64 [T, H, d]
        """
        rotated = self.decode_rotated(encoded, dtype)
        if self.projection is not None:
            rotated += self.projection.decode(*self._sketch(encoded, rotated.dtype))
        return self.rotation.inverse(rotated, self.mean)

    def inner_products(self, queries: Array, encoded: EncodedPolar) -> Array:
        """Estimate inner products of queries with encoded vectors, without decoding them.

        Parameters
        ----------
        queries : float32 or float64 [B, num_heads, head_dim]
            One per head.
        encoded : EncodedPolar
            T tokens.

        Returns
        -------
        array of the queries' type, [B, num_heads, T]
        """
        dtype = queries.dtype
        rotated = self.rotation.forward(queries)
        products: Array = np.einsum("bhd,thd->bht", rotated, self.decode_rotated(encoded, dtype))
        if self.projection is not None:
            signs, gamma = self._sketch(encoded, dtype)
            part = np.einsum("bhm,thm->bht", self.projection.project(rotated), signs)
            products += part * (gamma.T * dtype.type(self.projection.factor))
        if self.mean is not None:
            products += np.einsum("bhd,hd->bh", queries, self.mean.astype(dtype))[..., None]
        return products

    def _sketch(self, encoded: EncodedPolar, dtype: np.dtype[Any]) -> tuple[Array, Array]:
        """Unpack signs as +-1 ``[T, H, m]`` and residual norms ``[T, H]``."""
        assert self.projection is not None
        assert encoded.qjl_signs is not None and encoded.residual_norms is not None
        bits = bitpack.unpack(encoded.qjl_signs, 1, self.projection.rows)
        return 2 * bits.astype(dtype) - 1, encoded.residual_norms.astype(dtype)


def rotation_kind(rotation: str, head_dim: int) -> str:
    """Resolve ``"auto"``, and refuse a Hadamard rotation where there is none.

    Raises
    ------
    ConfigError
        If ``"hadamard"`` is asked for and the dimension has no fast transform.
    """
    if rotation == "auto":
        return "hadamard" if head_dim & (head_dim - 1) == 0 else "dense"
    if rotation == "hadamard" and not has_fast_transform(head_dim):
        raise ConfigError(f'head_dim {head_dim} has no Hadamard rotation; use "auto" or "dense"')
    return rotation


def decode_pairs(index: npt.NDArray[Any], radii: Array, width: int, dtype: npt.DTypeLike) -> Array:
    """Turn bins and radii ``[..., d / 2]`` into coordinates ``dtype[..., d]``."""
    pairs: Array = bin_centres(width, np.dtype(dtype).name)[index]
    pairs *= radii.astype(dtype)[..., None]
    return pairs.reshape(*index.shape[:-1], 2 * index.shape[-1])


@functools.lru_cache
def bin_centres(width: int, dtype: str) -> Array:
    """Return cosine and sine of the bins' centres, ``dtype[2**width, 2]``, read-only."""
    angle = (np.arange(1 << width) + 0.5) * (2 * np.pi / (1 << width)) - np.pi
    table: Array = np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(dtype)
    table.setflags(write=False)
    return table
