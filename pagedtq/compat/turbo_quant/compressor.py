"""The compressor of `compat.turbo_quant`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...config import Codec, TurboQuant
from ...errors import ArgumentError
from ..growing import GrowingSequence, check_type, number, rotation_for, vector
from .errors import DimensionMismatch, MalformedCode, NonFiniteInput
from .policies import EXACT, check_dimension, page_codec
from .types import (
    AttentionScale,
    AttentionScoreOptions,
    CustomScale,
    Exact,
    KvCacheConfig,
    KvMemoryReportV1,
    KvRuntimeConfig,
    KvShadowScore,
    Quantized,
)

Float32 = npt.NDArray[np.float32]

# Layers of the paged cache.
_CODES, _SHADOWS = 0, 1

#: What every memory report says.
SHADOW_WARNING = (
    "Exact shadows that are kept count as resident; the size of the codes alone says nothing about "
    "memory saved while they are held."
)


class KvCacheCompressor:
    """Compressed keys and values of one attention head, with optional exact shadows.

    Parameters
    ----------
    config : KvRuntimeConfig or KvCacheConfig
        What to keep.
    radii : {"f16", "f32"}
        How pages hold radii. The crate keeps f32; f16 refuses norms above 32752.

    Raises
    ------
    ZeroDimension, OddDimension, UnsupportedDimension, InvalidBitWidth, ZeroProjectionCount
    RotationFailed, ConfigError, ArgumentTypeError
        If the configuration cannot be met.
    """

    def __init__(
        self, config: KvRuntimeConfig | KvCacheConfig, *, radii: Literal["f16", "f32"] = "f16"
    ) -> None:
        if isinstance(config, KvCacheConfig):
            config = config.runtime()
        check_type("config", config, KvRuntimeConfig)
        check_type("keep_exact_shadow", config.keep_exact_shadow, bool)
        self._config = config
        streams = (config.key_policy, config.value_policy)
        check_dimension(config.head_dim, any(isinstance(p, Quantized) for p in streams))
        key = page_codec(config.key_policy, config.head_dim, radii, "key")
        value = page_codec(config.value_policy, config.head_dim, radii, "value")
        layers: list[tuple[Codec, Codec]] = [(key, value)]
        # What a policy keeps exactly is its own shadow and is not held twice; every layer has two
        # streams, so one that nobody reads takes a bit per coordinate.
        if config.keep_exact_shadow and not key == value == EXACT:
            unread = TurboQuant(bits=1, rotation=rotation_for(config.head_dim))
            pair = [unread if codec == EXACT else EXACT for codec in (key, value)]
            layers.append((pair[0], pair[1]))
        self._layers = layers
        self._tokens = GrowingSequence(config.head_dim, layers, config.seed)

    def __repr__(self) -> str:
        return f"KvCacheCompressor({len(self)} tokens, {self._config})"

    def __len__(self) -> int:
        return self._tokens.num_tokens

    @property
    def config(self) -> KvRuntimeConfig:
        """What is kept."""
        return self._config

    def is_empty(self) -> bool:
        """Whether there is no token."""
        return len(self) == 0

    def compress_token(self, key: npt.ArrayLike, value: npt.ArrayLike) -> None:
        """Append one token.

        Parameters
        ----------
        key, value : array_like ``[head_dim]``
            Of any norm; rounded to float32.

        Raises
        ------
        DimensionMismatch, NonFiniteInput, OverflowingError
            Both lengths first, then key before value; nothing has changed.
        """
        rows = [vector(key, "key"), vector(value, "value")]
        for row in rows:
            self._check_length(row)
        streams = []
        for index, (name, row) in enumerate(zip(("key", "value"), rows)):
            exact = _finite(row, name)
            copies = np.zeros((len(self._layers), 1, 1, len(exact)), np.float32)
            for layer, codecs in enumerate(self._layers):
                if layer == _CODES or codecs[index] == EXACT:
                    copies[layer] = exact
            streams.append(copies)
        self._tokens.append(*streams)

    def attention_scores(self, query: npt.ArrayLike) -> Float32:
        """Score a query against all keys as their policy keeps them, unscaled.

        Returns
        -------
        float32 ``[len(self)]``

        Raises
        ------
        DimensionMismatch, MalformedCode, NonFiniteInput
            ``MalformedCode`` for an exact policy without shadows.
        """
        return self.attention_scores_with_options(query)

    def attention_scores_with_options(
        self, query: npt.ArrayLike, options: AttentionScoreOptions | None = None
    ) -> Float32:
        """Score as `attention_scores`, times a scale.

        Raises
        ------
        DimensionMismatch, MalformedCode, NonFiniteInput
            Besides, ``MalformedCode`` if the scale is not finite.
        """
        options = AttentionScoreOptions() if options is None else options
        check_type("options", options, AttentionScoreOptions)
        row = vector(query, "query")
        self._check_length(row)
        if isinstance(self._config.key_policy, Exact):
            scores = self.exact_attention_scores(row)
        else:
            scores = self._scores(row, _CODES)
        factor = self._factor(options.scale)
        if not math.isfinite(factor):
            raise MalformedCode(f"the attention scale must be finite, got {factor}")
        with np.errstate(over="ignore"):
            return scores * np.float32(factor)

    def exact_attention_scores(self, query: npt.ArrayLike) -> Float32:
        """Score a query against the exact keys, unscaled.

        Raises
        ------
        DimensionMismatch, MalformedCode, NonFiniteInput
            ``MalformedCode`` if there are tokens and no shadows are kept.
        """
        row = vector(query, "query")
        self._check_length(row)
        if len(self) and not self._config.keep_exact_shadow:
            raise MalformedCode("exact keys cannot be read: keep_exact_shadow is off")
        return self._scores(row, _CODES if self._layers[_CODES][0] == EXACT else _SHADOWS)

    def shadow_attention_scores(self, query: npt.ArrayLike) -> list[KvShadowScore]:
        """Score a query against exact keys and against codes (the same for an exact policy).

        Raises
        ------
        DimensionMismatch, MalformedCode, NonFiniteInput
        """
        exact = self.exact_attention_scores(query)
        codes = isinstance(self._config.key_policy, Quantized)
        compressed = self.attention_scores(query) if codes else exact
        with np.errstate(over="ignore", invalid="ignore"):
            errors = np.abs(exact - compressed)
        rows = zip(exact.tolist(), compressed.tolist(), errors.tolist())
        return [KvShadowScore(*row) for row in rows]

    def attend(self, query: npt.ArrayLike) -> Float32:
        """Attend: softmax over unscaled scores, summing decoded values.

        Returns
        -------
        float32 ``[head_dim]``
            Zeros, and no check of the query, while there is no token.

        Raises
        ------
        DimensionMismatch, MalformedCode, NonFiniteInput
            Keys that cannot be read are reported before values.
        """
        if self.is_empty():
            return np.zeros(self._config.head_dim, np.float32)
        row = vector(query, "query")
        self._check_length(row)
        if isinstance(self._config.key_policy, Exact) and not self._config.keep_exact_shadow:
            raise MalformedCode("exact keys cannot be read: keep_exact_shadow is off")
        _finite(row, "query")
        self._check_values()
        return self._tokens.attend(row, 1.0).astype(np.float32)

    def decode_values(self, indices: Sequence[int] | npt.NDArray[Any]) -> Float32:
        """Decode the values of some tokens, without any sketch.

        Parameters
        ----------
        indices : sequence of int
            Tokens in order of arrival, from 0; repeats are allowed.

        Returns
        -------
        float32 ``[len(indices), head_dim]``

        Raises
        ------
        DimensionMismatch
            An index behind the last token.
        MalformedCode
            An exact policy without shadows.
        """
        chosen = np.asarray(indices)
        if chosen.size == 0:
            return np.zeros((0, self._config.head_dim), np.float32)
        if chosen.ndim != 1 or chosen.dtype.kind not in "iu" or (chosen < 0).any():
            raise ArgumentError(f"indices must be whole numbers from 0 on, got {indices!r}")
        # One index after the other, as the crate reads them.
        if int(chosen[0]) < len(self):
            self._check_values()
        beyond = chosen[chosen >= len(self)]
        if beyond.size:
            raise DimensionMismatch(len(self), int(beyond[0]) + 1)
        return self._tokens.load_at(chosen.astype(np.int64), _CODES)[1].astype(np.float32)

    def compressed_bytes(self) -> int:
        """Return the crate's bytes of all codes (see `KvMemoryReportV1`)."""
        return sum(self._code_bytes())

    def uncompressed_bytes(self) -> int:
        """Return the bytes of all keys and values in float32."""
        return len(self) * 2 * self._config.head_dim * 4

    def compression_ratio(self) -> float:
        """Return `uncompressed_bytes` over `compressed_bytes`; 0.0 without codes."""
        compressed = self.compressed_bytes()
        return self.uncompressed_bytes() / compressed if compressed else 0.0

    def memory_report(self) -> KvMemoryReportV1:
        """Account for codes and shadows, and for the pages they are in."""
        config, count = self._config, len(self)
        keys, values = self._code_bytes()
        shadows = [
            count * config.head_dim * 4
            if config.keep_exact_shadow or isinstance(policy, Exact)
            else 0
            for policy in (config.key_policy, config.value_policy)
        ]
        return KvMemoryReportV1(
            schema="KvMemoryReportV1",
            token_count=count,
            head_dim=config.head_dim,
            compressed_key_bytes=keys,
            compressed_value_bytes=values,
            exact_shadow_key_bytes=shadows[0],
            exact_shadow_value_bytes=shadows[1],
            raw_fp32_baseline_bytes=self.uncompressed_bytes(),
            fp16_baseline_bytes=self.uncompressed_bytes() // 2,
            resident_bytes=keys + values + sum(shadows),
            sidecar_only_bytes=keys + values,
            warnings=[SHADOW_WARNING],
            page_bytes=self._tokens.page_bytes,
            pool_bytes=self._tokens.pool_bytes,
        )

    def _scores(self, row: npt.NDArray[np.float64], layer: int) -> Float32:
        if self.is_empty():
            return np.zeros(0, np.float32)
        _finite(row, "query")
        with np.errstate(over="ignore"):
            return self._tokens.scores(row, layer).astype(np.float32)

    def _code_bytes(self) -> tuple[int, int]:
        config = self._config
        keys, values = (
            len(self) * policy.encoded_bytes(config.head_dim)
            if isinstance(policy, Quantized)
            else 0
            for policy in (config.key_policy, config.value_policy)
        )
        return keys, values

    def _factor(self, scale: AttentionScale | CustomScale) -> float:
        if isinstance(scale, CustomScale):
            with np.errstate(over="ignore"):
                return float(np.float32(number("scale", scale.value)))
        check_type("scale", scale, AttentionScale)
        return 1.0 if scale is AttentionScale.NONE else 1.0 / math.sqrt(self._config.head_dim)

    def _check_length(self, row: npt.NDArray[np.float64]) -> None:
        if len(row) != self._config.head_dim:
            raise DimensionMismatch(self._config.head_dim, len(row))

    def _check_values(self) -> None:
        if isinstance(self._config.value_policy, Exact) and not self._config.keep_exact_shadow:
            raise MalformedCode("exact values cannot be read: keep_exact_shadow is off")


def _finite(row: npt.NDArray[np.float64], name: str) -> Float32:
    """Round to float32; refuse what is not finite then."""
    with np.errstate(over="ignore"):
        rounded = row.astype(np.float32)
    bad = np.flatnonzero(~np.isfinite(rounded))
    if bad.size:
        raise NonFiniteInput(int(bad[0]), name)
    return rounded
