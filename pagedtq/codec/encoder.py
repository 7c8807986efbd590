"""The encoder's arithmetic: rotate, quantise, fold the scale into the stored norm.

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
   - ``searched``: as ``norm_corrected``, with the codes of that ``u * s`` for which
     ``fold(|table| * |u|) / |table[codes]|`` is largest, the first of those that are equal; ``s``
     runs over `STRETCHES`. It is the cosine of the angle between the vector and its decoded self,
     up to the rotation's rounding, so the error is the least of those tried;
   - ``unbiased``: ``(norm * sqrt(d)) / fold(|table| * |u|)``, so that ``<x, decoded x> = |x|**2``
     (the scale of EDEN, arXiv 2108.08842).
5. Prod, whose MSE stage is unscaled: ``r = raw * (1 / sqrt(d)) - table[code] * n`` with the stored
   ``n``; ``gamma = sqrt(fold(r_i**2))`` in fp16; signs ``S r >= 0`` (`qjl`).

The limit in 4 is for vectors near the largest norm whose rotated energy sits in a few coordinates;
random signs make them as good as impossible.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from . import bitpack
from .codebook import Codebook
from .planar import Array, fold, lanes, scratch, tile_vectors, to_planes, to_rows
from .qjl import Projection
from .quantize import MagnitudeQuantizer
from .rotation import Rotation

#: Vectors with a smaller norm are stored as zero.
ZERO_NORM = np.float32(1e-12)

#: What ``scale="searched"`` tries; sixteenths, so that kernels make the same factors.
STRETCHES = tuple(np.float32(sixteenths / 16) for sixteenths in range(13, 21))

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


class Encoder:
    """Encodes the vectors of all local heads, tile by tile.

    Parameters
    ----------
    stream : {"key", "value"}
        Decides the row format.
    scale : {"none", "norm_corrected", "searched", "unbiased"}
        Decides the stored norm; ``"none"`` with a projection.
    book : Codebook
        The codes' codebook.
    rotation : Rotation
        The heads' rotations.
    projection : Projection or None
        The QJL matrices of Prod.
    mean : float32[H, d] or None
        Subtracted first.
    """

    def __init__(
        self,
        stream: str,
        scale: str,
        book: Codebook,
        rotation: Rotation,
        projection: Projection | None,
        mean: npt.NDArray[np.float32] | None,
    ) -> None:
        self.stream = stream
        self.scale = scale
        self.book = book
        self.rotation = rotation
        self.projection = projection
        self.mean = mean
        self.num_heads = rotation.num_heads
        self.head_dim = rotation.head_dim
        self.lanes = lanes(rotation.head_dim)
        self.quantizer = MagnitudeQuantizer(book)

    def encode(self, vectors: Array) -> EncodedVectors:
        """Encode ``float32[T, H, d]``, finite and within range."""
        tokens, heads, d = vectors.shape
        result = self._empty(tokens)
        step = max(1, tile_vectors(d) // heads)
        for start in range(0, tokens, step):
            at = slice(start, min(start + step, tokens))
            self._encode_tile(vectors[at], at, result)
        return result

    def _empty(self, tokens: int) -> EncodedVectors:
        heads, d = self.num_heads, self.head_dim
        code_row, sign_row = bitpack.row_bytes(self.book.width, d, self.stream)
        prod = self.projection is not None
        return EncodedVectors(
            codes=np.empty((tokens, heads, code_row), np.uint8),
            code_signs=np.empty((tokens, heads, sign_row), np.uint8) if sign_row else None,
            norms=np.empty((tokens, heads), np.float16),
            qjl_signs=np.empty((tokens, heads, -(-d // 8)), np.uint8) if prod else None,
            residual_norms=np.empty((tokens, heads), np.float16) if prod else None,
        )

    def _encode_tile(self, tile: Array, at: slice, result: EncodedVectors) -> None:
        planes, spare, norm = self._planes(tile)
        raw, u = self.rotation.transform(planes, spare)
        inverse = np.zeros_like(norm)
        np.divide(np.float32(1), norm, out=inverse, where=norm > 0)
        np.multiply(raw, np.repeat(inverse, self.lanes), out=u)
        if self.scale == "searched":
            codes, stored = self._search(u, raw, norm)
        else:
            codes, energy = self._codes(u)
            stored = self._stored_norms(norm, u, codes, energy)
        result.norms[at] = stored.reshape(-1, self.num_heads)
        code_rows = scratch("code_rows", tile.size, np.uint8).reshape(-1, self.head_dim)
        to_rows(codes, code_rows)
        packed = bitpack.pack_codes(code_rows.reshape(tile.shape), self.book.width, self.stream)
        result.codes[at] = packed.codes
        if result.code_signs is not None and packed.signs is not None:
            result.code_signs[at] = packed.signs
        if result.qjl_signs is not None and result.residual_norms is not None:
            gamma, positive = self._residual(raw, u, codes, stored)
            result.residual_norms[at] = gamma.reshape(-1, self.num_heads)
            result.qjl_signs[at] = bitpack.pack(positive.reshape(tile.shape), 1)

    def _planes(self, tile: Array) -> tuple[Array, Array, Array]:
        """Centre and transpose a tile: planes with entry signs, a work array, and norms."""
        count = tile.shape[0] * self.num_heads
        shape = (self.head_dim // self.lanes, count * self.lanes)
        rows = scratch("rows", tile.size, np.float32).reshape(tile.shape)
        planes = scratch("planes", tile.size, np.float32).reshape(shape)
        if self.mean is None:
            np.multiply(tile, self.rotation.entry_signs, out=rows)
        else:
            np.subtract(tile, self.mean, out=rows)
            np.multiply(rows, self.rotation.entry_signs, out=rows)
        to_planes(rows.reshape(count, self.head_dim), planes)
        # The rows are not needed any more. Squares do not see the signs.
        spare = rows.reshape(shape)
        np.multiply(planes, planes, out=spare)
        norm = np.sqrt(fold(spare, count))
        norm[norm < ZERO_NORM] = 0
        return planes, spare, norm

    def _codes(self, u: Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64] | None]:
        """Quantise planes; ``u`` becomes ``|u|``. Energy only where the scale needs it."""
        negative = scratch("negative", u.size, np.bool_).reshape(u.shape)
        codes = scratch("codes", u.size, np.uint8).reshape(u.shape)
        # A comparison, not the sign bit: -0.0 is code 0.
        np.less(u, 0, out=negative)
        np.abs(u, out=u)
        energy = None
        if self.scale == "norm_corrected" and self.book.odd_steps is not None:
            energy = self.quantizer.indices_and_energy(u, codes)
        else:
            self.quantizer.indices(u, codes)
        self._add_signs(codes, negative)
        return codes, energy

    def _search(
        self, u: Array, spare: Array, norm: Array
    ) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16]]:
        """Quantise planes at every stretch and keep what is nearest in direction, vector by vector.

        ``u`` becomes ``|u|``; ``spare`` is work space of its shape.
        """
        negative = scratch("negative", u.size, np.bool_).reshape(u.shape)
        tried = scratch("tried", u.size, np.uint8).reshape(u.shape)
        codes = scratch("codes", u.size, np.uint8).reshape(u.shape)
        np.less(u, 0, out=negative)
        np.abs(u, out=u)
        best = np.full_like(norm, -1)
        lengths = np.ones_like(norm)
        for stretch in STRETCHES:
            np.multiply(u, stretch, out=spare)
            if self.book.odd_steps is not None:
                energy = self.quantizer.indices_and_energy(spare, tried)
                length = self._length(norm, energy)
                terms = self._look_up(np.abs(self.book.table), tried)
            else:
                self.quantizer.indices(spare, tried)
                terms = self._look_up(np.abs(self.book.table), tried)
                np.multiply(terms, terms, out=spare)
                length = np.sqrt(fold(spare, norm.size))
            np.multiply(terms, u, out=terms)
            cosine = fold(terms, norm.size) / length
            better = cosine > best
            np.copyto(best, cosine, where=better)
            np.copyto(lengths, length, where=better)
            np.copyto(codes, tried, where=np.repeat(better, self.lanes))
        self._add_signs(codes, negative)
        return codes, np.minimum(norm / lengths, _F16_MAX).astype(np.float16)

    def _length(self, norm: Array, energy: npt.NDArray[np.int64]) -> Array:
        """Return ``|table[codes]|`` from sums of squared odd steps, for widths 1 to 4."""
        total = energy.reshape(norm.size, self.lanes).sum(axis=1).astype(np.float32)
        length: Array = np.sqrt(total) * np.float32(2.0 ** -(self.book.exponent + 1))
        return length

    def _add_signs(self, codes: npt.NDArray[np.uint8], negative: npt.NDArray[np.bool_]) -> None:
        """Put the signs above magnitude indices; ``negative`` is used up."""
        signs = negative.view(np.uint8)
        np.multiply(signs, np.uint8(1 << (self.book.width - 1)), out=signs)
        np.add(codes, signs, out=codes)

    def _stored_norms(
        self,
        norm: Array,
        magnitudes: Array,
        codes: npt.NDArray[np.uint8],
        energy: npt.NDArray[np.int64] | None,
    ) -> npt.NDArray[np.float16]:
        stored: Array
        if self.scale == "none":
            stored = norm * self.book.factor
        elif energy is not None:
            stored = norm / self._length(norm, energy)
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
        self,
        raw: Array,
        spare: Array,
        codes: npt.NDArray[np.uint8],
        stored: npt.NDArray[np.float16],
    ) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
        assert self.projection is not None
        decoded = self._look_up(self.book.table, codes)
        np.multiply(decoded, np.repeat(stored.astype(np.float32), self.lanes), out=decoded)
        np.multiply(raw, np.float32(1.0 / math.sqrt(self.head_dim)), out=raw)
        np.subtract(raw, decoded, out=raw)
        np.multiply(raw, raw, out=decoded)
        gamma = np.sqrt(fold(decoded, stored.size)).astype(np.float16)
        return gamma, self.projection.positive(raw, spare)

    def _look_up(self, table: Array, codes: npt.NDArray[np.uint8]) -> Array:
        index = scratch("cell", codes.size, np.intp).reshape(codes.shape)
        terms = scratch("terms", codes.size, np.float32).reshape(codes.shape)
        np.copyto(index, codes)
        np.take(table, index, out=terms, mode="clip")
        return terms
