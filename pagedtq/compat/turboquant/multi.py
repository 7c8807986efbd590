"""The multi-head cache of `compat.turboquant`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..growing import Float64, check_type, vector
from .errors import DimensionMismatch, InvalidDimension, LengthMismatch
from .single import QuantizedKVCache, Vectors, count
from .types import MultiHeadCacheStats, MultiHeadConfig

_MASK = (1 << 64) - 1
_HEAD_SEED = 1000


class MultiHeadKVCache:
    """Keys and values of several heads that grow together.

    Parameters
    ----------
    config : MultiHeadConfig
        Number of heads and what each holds.

    Raises
    ------
    InvalidDimension, InvalidBitWidth, ArgumentError
    """

    def __init__(self, config: MultiHeadConfig) -> None:
        check_type("config", config, MultiHeadConfig)
        if type(config.num_heads) is not int or config.num_heads < 1:
            raise InvalidDimension(config.num_heads, "at least one head")
        self._config = config
        one = config.head_config
        # The first head refuses a seed out of range before any wraps round.
        self._heads = [QuantizedKVCache(one)]
        for index in range(1, config.num_heads):
            seed = (one.seed + _HEAD_SEED * index) & _MASK
            self._heads.append(QuantizedKVCache(one.with_seed(seed)))
        for head in self._heads:
            head._is_head = True

    def __repr__(self) -> str:
        return f"MultiHeadKVCache({self.num_tokens} tokens, {self._config})"

    @property
    def num_heads(self) -> int:
        """Number of heads."""
        return self._config.num_heads

    @property
    def head_dim(self) -> int:
        """Length of keys and values."""
        return self._config.head_config.dim

    @property
    def num_tokens(self) -> int:
        """Tokens of each head."""
        return self._heads[0].num_tokens

    def head(self, index: int) -> QuantizedKVCache | None:
        """Return one head, to read; None if there is no such head."""
        return self._heads[index] if 0 <= index < self.num_heads else None

    def append_all(self, keys: Sequence[Vectors], values: Sequence[Vectors]) -> None:
        """Append tokens to all heads, or to none.

        Parameters
        ----------
        keys, values : array_like ``[num_heads, n, dim]``, or sequences of such parts
            Of norm 1; ``n`` is the same for all heads.

        Raises
        ------
        LengthMismatch, DimensionMismatch, InvalidValue, NotUnitVector
            Counts of all heads first, then head by head; nothing has changed.
        """
        streams = (("key", keys), ("value", values))
        for name, parts in streams:
            if count(parts) != self.num_heads:
                context = f"multi-head {name} head count"
                raise LengthMismatch(context, self.num_heads, count(parts))
        expected = count(keys[0])
        for name, parts in streams:
            for index, part in enumerate(parts):
                if count(part) != expected:
                    context = f"multi-head {name} token count for head {index}"
                    raise LengthMismatch(context, expected, count(part))
        checked = [head._checked(k, v) for head, k, v in zip(self._heads, keys, values)]
        # All allocation before the first write: running out of memory leaves the heads level.
        for head in self._heads:
            head._make_room(expected)
        for head, rows in zip(self._heads, checked):
            head._write(*rows)

    def attention_scores_all(self, queries: Sequence[npt.ArrayLike]) -> list[Float64]:
        """Score one query per head; see `QuantizedKVCache.attention_scores`."""
        self._check_queries(queries)
        return [head.attention_scores(query) for head, query in zip(self._heads, queries)]

    def attention_output_all(
        self, queries: Sequence[npt.ArrayLike], temperature: float
    ) -> list[Float64]:
        """Attend with one query per head; see `QuantizedKVCache.attention_output`."""
        self._check_queries(queries)
        return [
            head.attention_output(query, temperature) for head, query in zip(self._heads, queries)
        ]

    def concat_outputs(self, outputs: Sequence[npt.ArrayLike]) -> Float64:
        """Join the outputs of all heads, ``float64[num_heads * dim]``.

        Raises
        ------
        LengthMismatch
            If heads are missing or an output has another length.
        """
        if count(outputs) != self.num_heads:
            raise LengthMismatch("multi-head output count", self.num_heads, count(outputs))
        parts = [vector(output, "output") for output in outputs]
        for index, part in enumerate(parts):
            if len(part) != self.head_dim:
                raise LengthMismatch(f"output dimension for head {index}", self.head_dim, len(part))
        return np.concatenate(parts)

    def reconstruct_keys_all(self) -> list[Float64]:
        """Decode the keys of all heads."""
        return [head.reconstruct_keys() for head in self._heads]

    def reconstruct_values_all(self) -> list[Float64]:
        """Decode the values of all heads."""
        return [head.reconstruct_values() for head in self._heads]

    def stats(self) -> MultiHeadCacheStats:
        """Count tokens and bytes."""
        heads = [head.stats() for head in self._heads]
        total = sum(stats.total_bytes for stats in heads)
        uncompressed = sum(stats.uncompressed_bytes for stats in heads)
        return MultiHeadCacheStats(
            num_heads=self.num_heads,
            num_tokens=self.num_tokens,
            head_dim=self.head_dim,
            total_bytes=total,
            uncompressed_bytes=uncompressed,
            compression_ratio=uncompressed / total if total else 0.0,
            page_bytes=sum(stats.page_bytes for stats in heads),
            pool_bytes=sum(stats.pool_bytes for stats in heads),
            head_stats=heads,
        )

    def clear(self) -> None:
        """Drop all tokens of all heads."""
        for head in self._heads:
            head._tokens.clear()

    def _check_queries(self, queries: Sequence[npt.ArrayLike]) -> None:
        if count(queries) != self.num_heads:
            raise DimensionMismatch(self.num_heads, count(queries))
