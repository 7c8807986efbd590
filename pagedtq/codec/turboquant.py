"""TurboQuant (arXiv 2504.19874): rotate, quantise each coordinate, keep the norm apart.

`TurboQuantCodec` is the face of this package: it joins rotation, codebook, projection and encoder
of one layer and stream, and decodes. The order of the encoder's operations is in `encoder`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..config import TurboQuant
from ..errors import ConfigError
from . import bitpack
from .codebook import codebook
from .encoder import EncodedVectors, Encoder
from .planar import Array
from .qjl import Projection
from .rotation import Rotation
from .validation import check_vectors, checked_mean


class TurboQuantCodec:
    """Encoder and decoder of one layer and stream, all local KV heads.

    Parameters
    ----------
    config : TurboQuant
        Bits, estimator, scale, rotation, projection.
    head_dim, num_heads : int
        Shape of the vectors: ``[T, num_heads, head_dim]``.
    seed, layer : int
        Select the random streams, together with the config's ``seed_offset``.
    stream : {"key", "value"}
        Which stream; values cannot use the Prod estimator.
    first_kv_head : int
        Global index of the first local head.
    mean : float32[num_heads, head_dim], optional
        Subtracted before encoding and added back by `decode`.

    Attributes
    ----------
    book : Codebook
        The codebook of the stored codes.
    rotation : Rotation
        The rotations of the heads.
    projection : Projection or None
        The QJL matrices of Prod.
    mean : float32[num_heads, head_dim] or None
        A read-only copy.

    Raises
    ------
    ConfigError
        If the stream is unknown or cannot use the estimator.
    ArgumentError, NonFiniteError
        If the mean has the wrong shape or is not finite.
    """

    def __init__(
        self,
        config: TurboQuant,
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
        prod = config.estimator == "prod"
        if prod and stream == "value":
            raise ConfigError('values cannot use estimator "prod": it is for inner products')
        seed = (seed + config.seed_offset) % 2**64
        self.config = config
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.stream = stream
        self.scale = "none" if prod else config.scale
        self.mean = checked_mean(mean, (num_heads, head_dim))
        self.book = codebook(head_dim, config.code_bits)
        self.rotation = Rotation(
            head_dim, num_heads, seed, layer, stream, first_kv_head, config.rotation
        )
        self.projection: Projection | None = None
        if prod:
            self.projection = Projection(
                head_dim,
                num_heads,
                seed,
                layer,
                first_kv_head,
                config.projection,
                config.rotation,
            )
        self._encoder = Encoder(
            stream, self.scale, self.book, self.rotation, self.projection, self.mean
        )

    def validate(self, vectors: Array) -> None:
        """Check vectors before they are encoded; `encode` does not check again.

        See `validation.check_vectors` for what is refused.
        """
        shape = (self.num_heads, self.head_dim)
        check_vectors(vectors, shape, self.stream, self.mean, self.config.unit_norm)

    def encode(self, vectors: Array) -> EncodedVectors:
        """Encode vectors.

        Parameters
        ----------
        vectors : float32[T, num_heads, head_dim]
            Finite and within range (see `validate`).

        Returns
        -------
        EncodedVectors
        """
        return self._encoder.encode(vectors)

    def unpack(self, encoded: EncodedVectors) -> npt.NDArray[np.uint8]:
        """Return the codes, ``uint8[T, H, d]``."""
        return bitpack.unpack_codes(encoded.packed, self.book.width, self.head_dim, self.stream)

    def decode_rotated(self, encoded: EncodedVectors, dtype: npt.DTypeLike = np.float32) -> Array:
        """Decode without undoing the rotation: ``norm * table[code]``, the QJL part left out.

        Returns
        -------
        float32 or float64 [T, H, d]
        """
        decoded: Array = self.book.table.astype(dtype)[self.unpack(encoded)]
        decoded *= encoded.norms[..., None].astype(dtype)
        return decoded

    def decode(self, encoded: EncodedVectors, dtype: npt.DTypeLike = np.float32) -> Array:
        """Decode vectors.

        With Prod this adds the QJL part, ``gamma * factor * S^T sign(S r)``: inner products with
        the result are the unbiased estimates, its error as a vector is larger.

        Parameters
        ----------
        encoded : EncodedVectors
            What `encode` returned.
        dtype : {float32, float64}
            Type to compute in and to return.

        Returns
        -------
        float32 or float64 [T, H, d]
        """
        rotated = self.decode_rotated(encoded, dtype)
        if self.projection is not None:
            rotated += self.projection.decode(*self._qjl(encoded, rotated.dtype))
        return self.rotation.inverse(rotated, self.mean)

    def inner_products(self, queries: Array, encoded: EncodedVectors) -> Array:
        """Estimate the inner products of queries with encoded vectors, without decoding them.

        Parameters
        ----------
        queries : float32 or float64 [B, num_heads * group, head_dim]
            Query head ``h * group + g`` meets KV head ``h``.
        encoded : EncodedVectors
            T tokens.

        Returns
        -------
        array of the queries' type, [B, num_heads * group, T]
            With a mean, the inner product with it is included.
        """
        dtype = queries.dtype
        rotated = self.rotation.forward(queries)
        group = queries.shape[1] // self.num_heads
        shape = (queries.shape[0], self.num_heads, group, self.head_dim)
        keys = self.decode_rotated(encoded, dtype)
        products = np.einsum("bhgd,thd->bhgt", rotated.reshape(shape), keys)
        if self.projection is not None:
            signs, gamma = self._qjl(encoded, dtype)
            sketch = self.projection.project(rotated).reshape(shape)
            part = np.einsum("bhgd,thd->bhgt", sketch, signs)
            products += part * (gamma.T * dtype.type(self.projection.factor))[:, None]
        if self.mean is not None:
            offset = np.einsum("bhgd,hd->bhg", queries.reshape(shape), self.mean.astype(dtype))
            products += offset[..., None]
        result: Array = products.reshape(*queries.shape[:2], keys.shape[0])
        return result

    def _qjl(self, encoded: EncodedVectors, dtype: np.dtype[np.floating]) -> tuple[Array, Array]:
        """Unpack Prod's signs as +-1 ``[T, H, d]`` and its residual norms ``[T, H]``."""
        assert encoded.qjl_signs is not None and encoded.residual_norms is not None
        bits = bitpack.unpack(encoded.qjl_signs, 1, self.head_dim)
        return 2 * bits.astype(dtype) - 1, encoded.residual_norms.astype(dtype)
