"""TurboQuant (arXiv 2504.19874): rotate, quantise each coordinate, keep the norm apart.

The order of operations is part of the page format; all are float32 and elementwise unless said
otherwise, so that codes and norms of a vector do not depend on what is encoded beside it:

1. ``x - mean`` (if there is a mean); ``norm = sqrt(fold(x_i**2))``, `planar.fold` giving the order.
   A norm below 1e-12 counts as zero: stored norms 0, codes 0.
2. ``raw = sqrt(d) R x`` (`rotation`), ``u = raw * (1 / norm)``.
3. Magnitude index: the number of midpoints ``m`` with ``|u| >= m``; sign 1 iff ``u < 0``.
4. The stored norm ``n``, rounded to fp16 once (to nearest even, at most 65504), such that the
   decoded vector is ``R x ~ n * table[code]``:

   - scale ``none``: ``norm * factor``;
   - ``norm_corrected``: ``norm / |table[codes]|``. For widths 1 to 4 the squared norm is the exact
     integer ``E = sum(odd_steps**2)``, and the divisor ``sqrt(float32(E)) * 2**-(exponent+1)``;
     above it is ``sqrt(fold(table**2))``;
   - ``unbiased``: ``norm * sqrt(d) / fold(|u| * |table|)``, so that ``<x, decoded x> = |x|**2``
     (the scale of EDEN, arXiv 2108.08842).
5. Prod, whose MSE stage is unscaled: ``r = raw * (1 / sqrt(d)) - n * table[code]`` with the stored
   ``n``; ``gamma = sqrt(fold(r_i**2))`` in fp16; signs ``S r >= 0`` (`qjl`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..config import TurboQuant
from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    ConfigError,
    NonFiniteError,
    NotUnitNormError,
    OverflowingError,
)
from . import bitpack
from .codebook import codebook
from .planar import Array, fold, lanes, scratch, tile_vectors, to_planes, to_rows
from .qjl import Projection
from .quantize import MagnitudeQuantizer
from .rotation import Rotation

#: Vectors with a smaller norm are stored as zero.
ZERO_NORM = np.float32(1e-12)
#: Vectors with a larger norm are refused.
MAX_NORM = 32752.0
#: Tolerance of the strict unit-norm mode.
UNIT_TOLERANCE = 1e-5

_F16_MAX = np.float32(65504.0)


@dataclass(frozen=True, slots=True)
class EncodedVectors:
    """Encoded vectors of one layer and stream, rows as they lie in pages.

    Attributes
    ----------
    codes : uint8[T, H, row]
        Packed codes (`bitpack.pack_codes`).
    code_signs : uint8[T, H, row] or None
        Sign rows of width 3.
    norms : float16[T, H]
        Stored norms, scale folded in.
    qjl_signs : uint8[T, H, ceil(d / 8)] or None
        Prod: bit ``i`` is 1 iff ``(S r)_i >= 0``.
    residual_norms : float16[T, H] or None
        Prod: ``|r|``.
    """

    codes: npt.NDArray[np.uint8]
    code_signs: npt.NDArray[np.uint8] | None
    norms: npt.NDArray[np.float16]
    qjl_signs: npt.NDArray[np.uint8] | None = None
    residual_norms: npt.NDArray[np.float16] | None = None

    @property
    def packed(self) -> bitpack.PackedCodes:
        """Code and sign rows together."""
        return bitpack.PackedCodes(self.codes, self.code_signs)


class TurboQuantCodec:
    """Encoder and decoder of one layer and stream, all local KV heads.

    Parameters
    ----------
    config : TurboQuant
        Bits, estimator, scale, rotation, projection.
    head_dim, num_heads : int
        Shape of the vectors: ``[T, num_heads, head_dim]``.
    seed, layer : int
        Select the random streams.
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
        self.config = config
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.stream = stream
        self.scale = "none" if prod else config.scale
        self.mean = _checked_mean(mean, num_heads, head_dim)
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
        self._quantizer = MagnitudeQuantizer(self.book)
        self._half = 1 << (self.book.width - 1)

    def validate(self, vectors: Array) -> None:
        """Check vectors before they are encoded; `encode` does not check again.

        Parameters
        ----------
        vectors : float32[T, num_heads, head_dim]
            What is to be encoded.

        Raises
        ------
        ArgumentTypeError
            If the type is not float32.
        ArgumentError
            If the shape is wrong.
        NonFiniteError
            If there is NaN or infinity.
        OverflowingError
            If a norm (less the mean) exceeds 32752.
        NotUnitNormError
            In unit-norm mode, if a norm is off by more than 1e-5.
        """
        if not isinstance(vectors, np.ndarray) or vectors.dtype != np.float32:
            got = getattr(vectors, "dtype", type(vectors).__name__)
            raise ArgumentTypeError(f"{self.stream} vectors must be a float32 array, got {got}")
        heads, d = self.num_heads, self.head_dim
        if vectors.ndim != 3 or vectors.shape[1:] != (heads, d):
            raise ArgumentError(
                f"{self.stream} vectors must have shape [T, {heads}, {d}], got {vectors.shape}"
            )
        if vectors.size == 0:
            return
        # NaN survives max and min, so two passes also find what is not finite.
        largest = max(float(vectors.max()), -float(vectors.min()))
        if not math.isfinite(largest):
            token, head, _ = np.argwhere(~np.isfinite(vectors))[0]
            raise NonFiniteError(f"{self.stream} vector of token {token}, head {head} is not finite")
        if self.mean is not None:
            largest += float(np.abs(self.mean).max())
        if largest * math.sqrt(d) > MAX_NORM:
            self._refuse_large(vectors)
        if self.config.unit_norm:
            norms = np.sqrt(np.sum(np.square(vectors, dtype=np.float64), axis=2))
            off = np.abs(norms - 1.0) > UNIT_TOLERANCE
            if off.any():
                token, head = np.argwhere(off)[0]
                norm = float(norms[token, head])
                raise NotUnitNormError(
                    f"expected norm 1 within {UNIT_TOLERANCE}, got {norm:.7g} "
                    f"({self.stream} vector of token {token}, head {head})",
                    norm,
                )

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
        tokens, heads, d = vectors.shape
        code_row, sign_row = bitpack.row_bytes(self.book.width, d, self.stream)
        prod = self.projection is not None
        result = EncodedVectors(
            codes=np.empty((tokens, heads, code_row), np.uint8),
            code_signs=np.empty((tokens, heads, sign_row), np.uint8) if sign_row else None,
            norms=np.empty((tokens, heads), np.float16),
            qjl_signs=np.empty((tokens, heads, -(-d // 8)), np.uint8) if prod else None,
            residual_norms=np.empty((tokens, heads), np.float16) if prod else None,
        )
        step = max(1, tile_vectors(d) // heads)
        for start in range(0, tokens, step):
            self._encode_tile(vectors[start : start + step], slice(start, start + step), result)
        return result

    def unpack(self, encoded: EncodedVectors) -> npt.NDArray[np.uint8]:
        """Return the codes, ``uint8[T, H, d]``."""
        return bitpack.unpack_codes(
            encoded.packed, self.book.width, self.head_dim, self.stream
        )

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
            signs, gamma = self._qjl(encoded, rotated.dtype)
            back = self.projection.project_back(signs)
            rotated += back * (gamma * rotated.dtype.type(self.projection.factor))[..., None]
        decoded = self.rotation.inverse(rotated)
        if self.mean is not None:
            decoded += self.mean.astype(rotated.dtype)
        return decoded

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

    def _encode_tile(self, tile: Array, at: slice, result: EncodedVectors) -> None:
        heads, d, width = self.num_heads, self.head_dim, lanes(self.head_dim)
        count = tile.shape[0] * heads
        shape = (d // width, count * width)
        a = scratch("a", tile.size, np.float32)
        b = scratch("b", tile.size, np.float32)
        rows = a.reshape(tile.shape)
        if self.mean is None:
            np.multiply(tile, self.rotation.entry_signs, out=rows)
        else:
            np.subtract(tile, self.mean, out=rows)
            np.multiply(rows, self.rotation.entry_signs, out=rows)
        a, b = a.reshape(shape), b.reshape(shape)
        to_planes(rows.reshape(count, d), b)
        np.multiply(b, b, out=a)
        norm = np.sqrt(fold(a, count))
        norm[norm < ZERO_NORM] = 0
        inverse = np.zeros_like(norm)
        np.divide(np.float32(1), norm, out=inverse, where=norm > 0)

        raw, u = self.rotation.transform(b, a)
        np.multiply(raw, np.repeat(inverse, width), out=u)
        codes, energy = self._codes(u)
        stored = self._stored_norms(norm, u, codes, energy)
        result.norms[at] = stored.reshape(-1, heads)
        code_rows = scratch("code_rows", tile.size, np.uint8).reshape(count, d)
        to_rows(codes, code_rows)
        packed = bitpack.pack_codes(code_rows.reshape(tile.shape), self.book.width, self.stream)
        result.codes[at] = packed.codes
        if result.code_signs is not None:
            result.code_signs[at] = packed.signs
        if self.projection is not None:
            assert result.qjl_signs is not None and result.residual_norms is not None
            gamma, positive = self._residual(raw, u, codes, stored)
            result.residual_norms[at] = gamma.reshape(-1, heads)
            result.qjl_signs[at] = bitpack.pack(positive.reshape(tile.shape), 1)

    def _codes(self, u: Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]:
        """Quantise planes; ``u`` becomes ``|u|``. Energy only where the scale needs it."""
        negative = scratch("negative", u.size, np.bool_).reshape(u.shape)
        codes = scratch("codes", u.size, np.uint8).reshape(u.shape)
        np.less(u, 0, out=negative)
        np.abs(u, out=u)
        energy = None
        if self.scale == "norm_corrected" and self.book.odd_steps is not None:
            energy = self._quantizer.indices_and_energy(u, codes)
        else:
            self._quantizer.indices(u, codes)
        signs = negative.view(np.uint8)
        np.multiply(signs, np.uint8(self._half), out=signs)
        np.add(codes, signs, out=codes)
        return codes, energy

    def _stored_norms(
        self,
        norm: Array,
        magnitudes: Array,
        codes: npt.NDArray[np.uint8],
        energy: npt.NDArray[np.int64] | None,
    ) -> npt.NDArray[np.float16]:
        if self.scale == "none":
            stored = norm * self.book.factor
        elif energy is not None:
            total = energy.reshape(norm.size, -1).sum(axis=1).astype(np.float32)
            stored = norm / (np.sqrt(total) * np.float32(2.0 ** -(self.book.exponent + 1)))
        else:
            terms = self._look_up(np.abs(self.book.table), codes)
            if self.scale == "norm_corrected":
                np.multiply(terms, terms, out=terms)
                stored = norm / np.sqrt(fold(terms, norm.size))
            else:
                np.multiply(terms, magnitudes, out=terms)
                products = fold(terms, norm.size)
                stored = np.zeros_like(norm)
                root = np.float32(math.sqrt(self.head_dim))
                np.divide(norm * root, products, out=stored, where=products > 0)
        return np.minimum(stored, _F16_MAX).astype(np.float16)

    def _residual(
        self, raw: Array, spare: Array, codes: npt.NDArray[np.uint8], stored: Array
    ) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
        assert self.projection is not None
        width = lanes(self.head_dim)
        decoded = self._look_up(self.book.table, codes)
        np.multiply(decoded, np.repeat(stored.astype(np.float32), width), out=decoded)
        np.multiply(raw, np.float32(1.0 / math.sqrt(self.head_dim)), out=raw)
        np.subtract(raw, decoded, out=raw)
        np.multiply(raw, raw, out=decoded)
        gamma = np.sqrt(fold(decoded, stored.size)).astype(np.float16)
        return gamma, self.projection.positive(raw, spare)

    def _look_up(self, table: Array, codes: npt.NDArray[np.uint8]) -> Array:
        index = scratch("cell", codes.size, np.intp).reshape(codes.shape)
        terms = scratch("terms", codes.size, np.float32).reshape(codes.shape)
        np.copyto(index, codes)
        return np.take(table, index, out=terms, mode="clip")

    def _qjl(self, encoded: EncodedVectors, dtype: np.dtype[np.floating]) -> tuple[Array, Array]:
        """Unpack Prod's signs as +-1 ``[T, H, d]`` and its residual norms ``[T, H]``."""
        assert encoded.qjl_signs is not None and encoded.residual_norms is not None
        bits = bitpack.unpack(encoded.qjl_signs, 1, self.head_dim)
        return 2 * bits.astype(dtype) - 1, encoded.residual_norms.astype(dtype)

    def _refuse_large(self, vectors: Array) -> None:
        centred = vectors.astype(np.float64)
        if self.mean is not None:
            centred -= self.mean
        norms = np.sqrt(np.sum(np.square(centred), axis=2))
        if norms.max() > MAX_NORM:
            token, head = np.argwhere(norms > MAX_NORM)[0]
            raise OverflowingError(
                f"the norm of a {self.stream} vector must be at most {MAX_NORM:.0f}, got "
                f"{norms[token, head]:.6g} (token {token}, head {head})"
            )


def _checked_mean(
    mean: npt.ArrayLike | None, num_heads: int, head_dim: int
) -> npt.NDArray[np.float32] | None:
    if mean is None:
        return None
    array = np.array(mean, np.float32)
    if array.shape != (num_heads, head_dim):
        raise ArgumentError(f"mean must have shape [{num_heads}, {head_dim}], got {array.shape}")
    if not np.isfinite(array).all():
        raise NonFiniteError("mean holds NaN or infinity")
    array.setflags(write=False)
    return array
