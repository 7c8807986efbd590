"""The formats other systems store KV caches in, for comparison: vectors in, vectors out.

They are written from their published definitions and take part at their true byte counts. None of
them is a page codec; nothing here is used by a cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import ArgumentError
from .formats import CodedSpans, Float32, Int64, nothing_coded

Vectors = Callable[[Float32], Float32]


class VectorFormat:
    """A format that codes each key and each value vector on its own.

    Parameters
    ----------
    name : str
        How tables and plots call it.
    keys, values : callable
        ``float32[n, num_kv_heads, head_dim]`` to what is read back.
    bytes_per_token_head : float
        Of one key and one value, everything counted.
    shape : (num_layers, num_kv_heads, head_dim)
        The model's.
    exact_layers : collection of int
        Layers that stay in 16 bits, as vLLM's boundary layers.
    """

    def __init__(
        self,
        name: str,
        keys: Vectors,
        values: Vectors,
        bytes_per_token_head: float,
        shape: tuple[int, int, int],
        exact_layers: Collection[int] = (),
    ) -> None:
        self.name = name
        self._keys, self._values = keys, values
        self._bytes = bytes_per_token_head
        self._num_layers, self._num_heads, self._head_dim = shape
        self._exact = frozenset(exact_layers)

    def roundtrip(self, layer: int, keys: Float32, values: Float32) -> tuple[Float32, Float32]:
        """Code and decode."""
        if layer in self._exact:
            return keys, values
        return self._keys(keys), self._values(values)

    def spans(self, layer: int, lengths: Int64) -> CodedSpans:
        """Everything is coded, the query's own token included."""
        if layer in self._exact:
            return nothing_coded(lengths)
        return CodedSpans(np.zeros_like(lengths), lengths, lengths)

    def exact_dtype(self, layer: int) -> np.dtype[Any] | None:
        """Keep what comes."""
        return None

    def sequence_bytes(self, tokens: int) -> int:
        """Count codes, scales and 16-bit layers."""
        coded = (self._num_layers - len(self._exact)) * self._bytes
        exact = len(self._exact) * self._head_dim * 4
        return math.ceil(tokens * self._num_heads * (coded + exact))


class Kivi:
    """KIVI (arXiv 2402.02750, section 3.3): keys by channel, values by token, asymmetric uniform.

    Keys are coded in groups of ``group`` tokens, once a whole residual of ``residual`` tokens is
    full; values token by token in groups of ``group`` channels, the last ``residual`` tokens
    staying exact. Scale and zero point are float16.
    """

    def __init__(
        self,
        bits: int,
        shape: tuple[int, int, int],
        group: int = 32,
        residual: int = 128,
    ) -> None:
        if residual % group or shape[2] % group:
            raise ArgumentError(f"groups of {group} must divide {residual} tokens, {shape[2]} dims")
        self.name = f"kivi{bits}-r{residual}"
        self._bits, self._shape, self._group, self._residual = bits, shape, group, residual

    def roundtrip(self, layer: int, keys: Float32, values: Float32) -> tuple[Float32, Float32]:
        """Code and decode; keys after the last whole group stay (`spans` never reads them)."""
        group, whole = self._group, len(keys) // self._group * self._group
        by_channel = keys[:whole].reshape(-1, group, *keys.shape[1:])
        coded = keys.copy()
        coded[:whole] = uniform(by_channel, self._bits, axis=1).reshape(keys[:whole].shape)
        by_token = values.reshape(*values.shape[:2], -1, group)
        return coded, uniform(by_token, self._bits, axis=-1).reshape(values.shape)

    def spans(self, layer: int, lengths: Int64) -> CodedSpans:
        """Keys are coded a residual at a time, values as they leave it."""
        keys = lengths // self._residual * self._residual
        return CodedSpans(np.zeros_like(lengths), keys, np.maximum(lengths - self._residual, 0))

    def exact_dtype(self, layer: int) -> np.dtype[Any] | None:
        """Keep what comes."""
        return None

    def sequence_bytes(self, tokens: int) -> int:
        """Count codes, float16 scales and zero points, and the residuals in 16 bits."""
        layers, heads, dim = self._shape
        lengths = np.array([tokens])
        spans = self.spans(0, lengths)
        total = 0.0
        for stop in (spans.key_stop, spans.value_stop):
            coded = int(stop[0])
            # One pair of 16-bit numbers for every `group` codes, in either direction.
            total += coded * dim * (self._bits / 8 + 4 / self._group)
            total += (tokens - coded) * dim * 2
        return math.ceil(layers * heads * total)


def vllm_preset(preset: str, shape: tuple[int, int, int], boundary_layers: int = 0) -> VectorFormat:
    """Return one of vLLM's TurboQuant presets (its ``--kv-cache-dtype turboquant_*``).

    Keys: unsigned Sylvester Hadamard, Lloyd-Max codes of a Gaussian, the float16 norm of the
    vector, decoded to exactly that norm (``nc``); or float8 e4m3 (``k8v4``). Values: uniform
    codes between the vector's minimum and maximum, with float16 scale and minimum, not rotated.
    A slot is rounded up to an even number of bytes.

    Parameters
    ----------
    preset : {"k8v4", "4bit_nc", "k3v4_nc", "3bit_nc"}
        Which.
    shape : (num_layers, num_kv_heads, head_dim)
        The model's; ``head_dim`` a power of two except for ``"k8v4"``.
    boundary_layers : int
        Exact layers at either end; vLLM's default is 2.
    """
    key_bits, value_bits = {
        "k8v4": (8, 4),
        "4bit_nc": (4, 4),
        "k3v4_nc": (3, 4),
        "3bit_nc": (3, 3),
    }[preset]
    num_layers, _, dim = shape
    if key_bits == 8:
        keys: Vectors = float8_e4m3
        key_bytes = dim
    else:
        keys = _rotated(key_bits, dim)
        key_bytes = math.ceil(dim * key_bits / 8) + 2
    slot = key_bytes + math.ceil(dim * value_bits / 8) + 4
    ends = {*range(boundary_layers), *range(num_layers - boundary_layers, num_layers)}
    name = f"vllm-{preset}" + (f"+{boundary_layers}x2 exact" if boundary_layers else "")
    return VectorFormat(
        name, keys, lambda x: uniform(x, value_bits, axis=-1), slot + slot % 2, shape, ends
    )


def integer_format(bits: int, shape: tuple[int, int, int]) -> VectorFormat:
    """Return plain symmetric integers with one float16 scale per vector."""

    def codes(x: Float32) -> Float32:
        top = 2 ** (bits - 1) - 1
        scale = _f16(np.abs(x).max(axis=-1, keepdims=True) / top)
        step = np.where(scale > 0, scale, 1)
        return (np.clip(np.rint(x / step), -top, top) * scale).astype(np.float32)

    return VectorFormat(f"int{bits}", codes, codes, 2 * (shape[2] * bits / 8 + 2), shape)


def fp8_format(shape: tuple[int, int, int]) -> VectorFormat:
    """Return unscaled float8 e4m3, vLLM's ``fp8`` cache."""
    return VectorFormat("fp8-e4m3", float8_e4m3, float8_e4m3, 2 * shape[2], shape)


def peer_formats(shape: tuple[int, int, int]) -> list[VectorFormat | Kivi]:
    """Return all of them for a model's ``(num_layers, num_kv_heads, head_dim)``.

    Those that need a power of two, or a multiple of 32, are left out where ``head_dim`` is not.
    """
    dim = shape[2]
    formats: list[VectorFormat | Kivi] = [fp8_format(shape), vllm_preset("k8v4", shape)]
    if dim & (dim - 1) == 0:
        formats += [vllm_preset(name, shape) for name in ("4bit_nc", "k3v4_nc", "3bit_nc")]
    formats += [integer_format(8, shape), integer_format(4, shape)]
    if dim % 32 == 0:
        formats += [Kivi(4, shape), Kivi(2, shape)]
    return formats


def uniform(x: Float32, bits: int, axis: int) -> Float32:
    """Quantise uniformly between minimum and maximum along an axis, float16 scale and minimum."""
    low, high = x.min(axis=axis, keepdims=True), x.max(axis=axis, keepdims=True)
    scale = np.maximum((high - low) / (2**bits - 1), 1e-8)
    # Codes come from the unrounded scale, as in vLLM's store kernel; decoding uses what is stored.
    codes = np.clip(np.floor((x - low) / scale + 0.5), 0, 2**bits - 1)
    decoded: Float32 = (codes * _f16(scale) + _f16(low)).astype(np.float32)
    return decoded


def float8_e4m3(x: Float32) -> Float32:
    """Round to float8 e4m3 (OCP 8-bit formats, 1.0), saturating at 448, ties to even."""
    size = np.minimum(np.abs(x), 448.0)
    exponent = np.maximum(np.frexp(size)[1] - 1, -6)
    step = np.ldexp(np.float32(1), exponent - 3)
    rounded: Float32 = np.copysign(np.minimum(np.rint(size / step) * step, 448.0), x)
    return rounded.astype(np.float32)


@lru_cache
def gaussian_centroids(bits: int) -> Float32:
    """Return the Lloyd-Max centroids of the standard normal distribution, ascending."""
    points = np.linspace(-2.5, 2.5, 2**bits)
    for _ in range(3000):
        edges = np.concatenate([[-np.inf], (points[1:] + points[:-1]) / 2, [np.inf]])
        density = np.exp(-np.square(edges) / 2) / math.sqrt(2 * math.pi)
        below = np.array([0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges])
        # The mean of a normal variable inside a cell.
        points = (density[:-1] - density[1:]) / (below[1:] - below[:-1])
    return points.astype(np.float32)


@lru_cache
def _hadamard(dim: int) -> Float32:
    if dim & (dim - 1):
        raise ArgumentError(f"an unsigned Hadamard rotation needs a power of two, got {dim}")
    matrix = np.ones((1, 1))
    while len(matrix) < dim:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (matrix / math.sqrt(dim)).astype(np.float32)


def _rotated(bits: int, dim: int) -> Vectors:
    rotation, centroids = _hadamard(dim), gaussian_centroids(bits) / np.float32(math.sqrt(dim))
    middles = (centroids[1:] + centroids[:-1]) / 2

    def codes(x: Float32) -> Float32:
        norm = np.linalg.norm(x, axis=-1, keepdims=True)
        y = (x / (norm + 1e-8)) @ rotation
        decoded = centroids[np.searchsorted(middles, y)]
        decoded /= np.linalg.norm(decoded, axis=-1, keepdims=True)
        back: Float32 = (decoded * _f16(norm)) @ rotation
        return back.astype(np.float32)

    return codes


def _f16(x: Any) -> Float32:
    rounded: Float32 = np.asarray(x).astype(np.float16).astype(np.float32)
    return rounded
