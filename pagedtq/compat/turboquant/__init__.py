"""The caches of the Rust crate `turboquant`: unit vectors of one head, or of several.

Contract: keys and values have norm 1; scores are raw inner products; a full cache drops its oldest
tokens; an append checks everything before it changes anything.
"""

from .errors import (
    DimensionMismatch,
    InvalidBitWidth,
    InvalidDimension,
    InvalidValue,
    LengthMismatch,
    NotUnitVector,
    TurboQuantError,
)
from .multi import MultiHeadKVCache
from .single import QuantizedKVCache
from .types import CacheStats, KVCacheConfig, MultiHeadCacheStats, MultiHeadConfig, QuantStrategy

__all__ = [
    "CacheStats",
    "DimensionMismatch",
    "InvalidBitWidth",
    "InvalidDimension",
    "InvalidValue",
    "KVCacheConfig",
    "LengthMismatch",
    "MultiHeadCacheStats",
    "MultiHeadConfig",
    "MultiHeadKVCache",
    "NotUnitVector",
    "QuantStrategy",
    "QuantizedKVCache",
    "TurboQuantError",
]
