"""The cache: page tables and page bytes joined."""

from .kv_cache import PagedKVCache
from .reports import CacheCounters, CacheStats, MemoryReport

__all__ = ["CacheCounters", "CacheStats", "MemoryReport", "PagedKVCache"]
