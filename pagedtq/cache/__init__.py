"""The cache: page tables and page bytes joined."""

from .kv_cache import PagedKVCache
from .moving import move_sequences
from .page_rankings import AttentionMass, NormRatio, QueryBounds
from .reports import CacheCounters, CacheStats, MemoryReport

__all__ = [
    "AttentionMass",
    "CacheCounters",
    "CacheStats",
    "MemoryReport",
    "NormRatio",
    "PagedKVCache",
    "QueryBounds",
    "move_sequences",
]
