"""The single-head cache of `compat.turboquant`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ...codec.validation import UNIT_TOLERANCE
from ...config import TurboQuant
from ...errors import ArgumentTypeError, ConfigError, UnsupportedError
from ..growing import Float64, GrowingSequence, check_type, number, rotation_for, vector
from .errors import (
    DimensionMismatch,
    InvalidBitWidth,
    InvalidDimension,
    InvalidValue,
    LengthMismatch,
    NotUnitVector,
)
from .types import CacheStats, KVCacheConfig, QuantStrategy

#: One vector per token: ``[n, dim]``, or a sequence of vectors.
Vectors = npt.ArrayLike | Sequence[npt.ArrayLike]

_VALUE_SEED = 2


class QuantizedKVCache:
    """Keys and values of one head, quantised.

    Parameters
    ----------
    config : KVCacheConfig
        What to hold.

    Raises
    ------
    InvalidDimension, InvalidBitWidth
        If the configuration cannot be met.
    ConfigError, ArgumentTypeError
        If seed or limit are not whole numbers in range, or the strategy is no `QuantStrategy`.
    """

    def __init__(self, config: KVCacheConfig) -> None:
        check_type("config", config, KVCacheConfig)
        if not (type(config.dim) is int and 3 <= config.dim <= 4096):
            raise InvalidDimension(config.dim, "a dimension from 3 to 4096")
        self._config = config
        check_type("key_strategy", config.key_strategy, QuantStrategy)
        prod = config.key_strategy is QuantStrategy.PROD
        for name, bits, low in (
            ("value_bits", config.value_bits, 1),
            ("key_bits", config.key_bits, 2 if prod else 1),
        ):
            if not (type(bits) is int and low <= bits <= 8):
                raise InvalidBitWidth(bits, name, low)
        if type(config.max_tokens) is not int or config.max_tokens < 0:
            raise ConfigError(f"max_tokens must be an int of at least 0, got {config.max_tokens}")
        rotation = rotation_for(config.dim)
        keys = TurboQuant(
            bits=config.key_bits,
            estimator="prod" if prod else "mse",
            scale="none",
            rotation=rotation,
        )
        values = TurboQuant(
            bits=config.value_bits, scale="none", rotation=rotation, seed_offset=_VALUE_SEED
        )
        self._tokens = GrowingSequence(config.dim, [(keys, values)], config.seed)
        self._is_head = False

    def __repr__(self) -> str:
        return f"QuantizedKVCache({self.num_tokens} tokens, {self._config})"

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self._tokens.num_tokens

    @property
    def dim(self) -> int:
        """Length of keys and values."""
        return self._config.dim

    @property
    def max_tokens(self) -> int:
        """How many tokens are kept at most; 0 for all."""
        return self._config.max_tokens

    def append(self, keys: Vectors, values: Vectors) -> None:
        """Append tokens; with no keys at all this does nothing, whatever the values.

        Parameters
        ----------
        keys, values : array_like ``[n, dim]``, or a sequence of n vectors
            Of norm 1 within 1e-5.

        Raises
        ------
        LengthMismatch, DimensionMismatch, InvalidValue, NotUnitVector
            In that order, all keys before all values; nothing has changed.
        """
        self._refuse_on_head("append")
        if count(keys):
            self._write(*self._checked(keys, values))

    def push_token(self, key: npt.ArrayLike, value: npt.ArrayLike) -> None:
        """Append one token; raises as `append`, both lengths first."""
        self._refuse_on_head("push_token")
        key, value = vector(key, "key"), vector(value, "value")
        for part in (key, value):
            self._check_length(part)
        self.append(key[None], value[None])

    def attention_scores(self, query: npt.ArrayLike) -> Float64:
        """Estimate the inner products of a query with all keys, unscaled.

        Parameters
        ----------
        query : array_like ``[dim]``
            Of any norm; rounded to float32 relative to its largest element.

        Returns
        -------
        float64 ``[num_tokens]``

        Raises
        ------
        DimensionMismatch, InvalidValue
        """
        checked = self._query(query)
        return self._tokens.scores(checked) if self.num_tokens else np.zeros(0)

    def attention_output(self, query: npt.ArrayLike, temperature: float) -> Float64:
        """Attend: softmax over ``temperature * scores``, summing decoded values.

        Parameters
        ----------
        query : array_like ``[dim]``
            The query.
        temperature : float
            Multiplies the scores; ``1 / sqrt(dim)`` if it is not positive.

        Returns
        -------
        float64 ``[dim]``
            Zeros, and no check of anything, while the cache is empty.

        Raises
        ------
        InvalidValue, DimensionMismatch
        """
        if not self.num_tokens:
            return np.zeros(self.dim)
        factor = number("temperature", temperature)
        if not math.isfinite(factor):
            raise InvalidValue("attention temperature", factor)
        scale = factor if factor > 0 else 1 / math.sqrt(self.dim)
        return self._tokens.attend(self._query(query), scale)

    def reconstruct_keys(self) -> Float64:
        """Decode all keys, ``float64[num_tokens, dim]`` (with Prod, the QJL part included)."""
        return self._tokens.load()[0]

    def reconstruct_values(self) -> Float64:
        """Decode all values, ``float64[num_tokens, dim]``."""
        return self._tokens.load()[1]

    def stats(self) -> CacheStats:
        """Count tokens and bytes."""
        config, n = self._config, self.num_tokens
        key_bytes = n * _row_bytes(config.dim, config.key_bits, config.key_strategy)
        value_bytes = n * _row_bytes(config.dim, config.value_bits, QuantStrategy.MSE)
        total, uncompressed = key_bytes + value_bytes, n * config.dim * 4 * 2
        return CacheStats(
            num_tokens=n,
            dim=config.dim,
            key_bits=config.key_bits,
            value_bits=config.value_bits,
            key_strategy=config.key_strategy,
            key_bytes=key_bytes,
            value_bytes=value_bytes,
            total_bytes=total,
            uncompressed_bytes=uncompressed,
            compression_ratio=uncompressed / total if total else 0.0,
            page_bytes=self._tokens.page_bytes,
            pool_bytes=self._tokens.pool_bytes,
        )

    def clear(self) -> None:
        """Drop all tokens."""
        self._refuse_on_head("clear")
        self._tokens.clear()

    # -- parts that the multi-head cache uses ------------------------------------------------

    def _checked(self, keys: Vectors, values: Vectors) -> tuple[Float64, Float64]:
        """Check an append and return its keys and values."""
        counts = count(keys), count(values)
        if counts[0] != counts[1]:
            raise LengthMismatch("KV cache append key/value count", *counts)
        return self._unit_rows(keys, "KV cache key"), self._unit_rows(values, "KV cache value")

    def _make_room(self, num_new_tokens: int) -> None:
        self._tokens.make_room(self._surviving(num_new_tokens))

    def _write(self, keys: Float64, values: Float64) -> None:
        # Codes of a token do not depend on its neighbours: what would be dropped is never stored.
        kept = self._surviving(len(keys))
        if not kept:
            return
        parts = (rows[len(rows) - kept :].astype(np.float32) for rows in (keys, values))
        self._tokens.append(*(part[None, :, None] for part in parts))
        if self.max_tokens:
            self._tokens.keep_last(self.max_tokens)

    def _surviving(self, count: int) -> int:
        return min(count, self.max_tokens) if self.max_tokens else count

    def _query(self, query: npt.ArrayLike) -> Float64:
        checked = vector(query, "query")
        self._check_length(checked)
        _check_finite(checked, "KV cache query")
        return checked

    def _check_length(self, row: Float64) -> None:
        if len(row) != self.dim:
            raise DimensionMismatch(self.dim, len(row))

    def _unit_rows(self, vectors: Vectors, context: str) -> Float64:
        """Check vectors one by one, each its length before its norm; return ``[n, dim]``."""
        if not (isinstance(vectors, np.ndarray) and vectors.ndim == 2):
            rows = [vector(row, context) for row in vectors]  # type: ignore[union-attr]
            good = next((i for i, row in enumerate(rows) if len(row) != self.dim), len(rows))
            table = np.array(rows[:good], np.float64).reshape(good, self.dim)
            _check_unit(table, context)
            if good < len(rows):
                self._check_length(rows[good])
            return table
        if len(vectors):
            self._check_length(vector(vectors[0], context))
        table = vectors.astype(np.float64)
        _check_unit(table, context)
        return table

    def _refuse_on_head(self, verb: str) -> None:
        if self._is_head:
            raise UnsupportedError(
                f"{verb} on a head of a MultiHeadKVCache is not supported: heads change together"
            )


def count(parts: Any) -> int:
    """Return the length of a sequence; refuse what has none by type."""
    try:
        return len(parts)
    except TypeError as error:
        raise ArgumentTypeError(f"expected a sequence, got {type(parts).__name__}") from error


def _row_bytes(dim: int, bits: int, strategy: QuantStrategy) -> int:
    """Return the crate's bytes of one vector: codes, and for Prod signs and a float32 norm."""
    if strategy is QuantStrategy.MSE:
        return -(-dim * bits // 8)
    return -(-((bits - 1) * dim + dim + 32) // 8)


def _check_finite(row: Float64, context: str) -> None:
    finite = np.isfinite(row)
    if not finite.all():
        raise InvalidValue(context, float(row[~finite][0]))


def _check_unit(rows: Float64, context: str) -> None:
    """Refuse the first vector that is not finite or has not norm 1."""
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.sqrt(np.sum(np.square(rows), axis=1))
        # NaN fails the comparison, so one test finds both faults.
        bad = np.flatnonzero(~(np.abs(norms - 1) <= UNIT_TOLERANCE))
    if bad.size:
        _check_finite(rows[bad[0]], context)
        raise NotUnitVector(float(norms[bad[0]]), context)
