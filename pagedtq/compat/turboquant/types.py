"""Configurations and statistics of `compat.turboquant`, as plain structs."""

from __future__ import annotations

import enum

import msgspec


class QuantStrategy(enum.Enum):
    """How keys are coded: least error, or unbiased inner products."""

    MSE = "MSE"
    PROD = "Prod"


class KVCacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Configuration of one head's cache; checked when a cache is made of it.

    Parameters
    ----------
    dim : int
        Length of keys and values.
    key_bits, value_bits : int
        Bits per coordinate, 1 to 8. Values are always coded for least error, keys with
        ``QuantStrategy.PROD`` take at least 2.
    key_strategy : QuantStrategy
        How keys are coded.
    seed : int
        Of the keys; values use ``seed + 2``, modulo 2**64.
    max_tokens : int
        How many tokens are kept; 0 keeps all.
    """

    dim: int
    key_bits: int = 4
    value_bits: int = 4
    key_strategy: QuantStrategy = QuantStrategy.PROD
    seed: int = 42
    max_tokens: int = 0

    def with_key_bits(self, bits: int) -> KVCacheConfig:
        """Return a copy with other key bits."""
        return msgspec.structs.replace(self, key_bits=bits)

    def with_value_bits(self, bits: int) -> KVCacheConfig:
        """Return a copy with other value bits."""
        return msgspec.structs.replace(self, value_bits=bits)

    def with_key_strategy(self, strategy: QuantStrategy) -> KVCacheConfig:
        """Return a copy with another key strategy."""
        return msgspec.structs.replace(self, key_strategy=strategy)

    def with_seed(self, seed: int) -> KVCacheConfig:
        """Return a copy with another seed."""
        return msgspec.structs.replace(self, seed=seed)

    def with_max_tokens(self, max_tokens: int) -> KVCacheConfig:
        """Return a copy with another limit."""
        return msgspec.structs.replace(self, max_tokens=max_tokens)


class CacheStats(msgspec.Struct, frozen=True):
    """What one head's cache holds.

    ``key_bytes``, ``value_bytes``, ``total_bytes`` and the ratio are the crate's figures: packed
    codes (with Prod also signs and a 4-byte residual norm) against float32. What the process
    really holds is in ``page_bytes``, the pages of these tokens, and ``pool_bytes``, everything
    allocated for pages.
    """

    num_tokens: int
    dim: int
    key_bits: int
    value_bits: int
    key_strategy: QuantStrategy
    key_bytes: int
    value_bytes: int
    total_bytes: int
    uncompressed_bytes: int
    compression_ratio: float
    page_bytes: int
    pool_bytes: int


class MultiHeadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Configuration of several heads; head ``h`` has the seed ``seed + 1000 h``, modulo 2**64."""

    num_heads: int
    head_config: KVCacheConfig


class MultiHeadCacheStats(msgspec.Struct, frozen=True):
    """The sum over heads, and each head's own figures."""

    num_heads: int
    num_tokens: int
    head_dim: int
    total_bytes: int
    uncompressed_bytes: int
    compression_ratio: float
    page_bytes: int
    pool_bytes: int
    head_stats: list[CacheStats]
