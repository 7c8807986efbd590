"""The cache: page tables and page bytes joined."""

from .kv_cache import PagedKVCache
from .moving import move_sequences
from .reports import CacheStats, MemoryReport

__all__ = ["CacheStats", "MemoryReport", "PagedKVCache", "move_sequences"]
