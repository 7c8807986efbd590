"""What a cache says about itself: counts and bytes, as plain structs."""

from __future__ import annotations

import msgspec

from ..config import DTYPE_BYTES, CacheConfig
from ..paging.layout import PageLayout
from ..paging.page_tables import PageTables


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of pages, window slots, sequences and tokens.

    ``pages_cached`` of the free pages hold a block that a new sequence can begin with.
    ``resident_tokens`` are positions whose page is held, per sequence (shared pages count for
    each); ``logical_tokens`` include evicted ones. ``page_utilisation`` is resident tokens over
    the token capacity of the pages the sequences hold, again per sequence.
    """

    num_pages: int
    pages_used: int
    pages_free: int
    pages_shared: int
    pages_cached: int
    window_slots_used: int
    window_slots_free: int
    num_sequences: int
    logical_tokens: int
    resident_tokens: int
    page_utilisation: float


class CacheCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What happened since the tables were made; all of it only ever grows.

    Attributes
    ----------
    prefix_queries, prefix_hits : int
        Tokens that sequences were opened with, and those of them that pages held already.
    blocks_published, blocks_forgotten : int
        Pages that began to hold a block others can find, and that lost it (taken again, written on,
        or told to).
    blocks_evicted : int
        Blocks dropped from live sequences.
    """

    prefix_queries: int
    prefix_hits: int
    blocks_published: int
    blocks_forgotten: int
    blocks_evicted: int


class MemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes held, and what the same tokens would take uncompressed.

    Attributes
    ----------
    pool_bytes, window_bytes, table_bytes : int
        What is allocated: the page pool, the exact window's slots, the page tables.
    pages_used_bytes, window_used_bytes : int
        The part of it that sequences hold.
    payload_bytes_per_token, page_bytes_per_token : float
        Codes and norms of a token over all layers and heads, without and with page alignment.
    fp16_bytes, fp32_bytes : int
        The resident tokens of all sequences, uncompressed, without any pages.
    compression_vs_fp16 : float
        ``fp16_bytes`` over the bytes used, shadows included; 0.0 when nothing is held.
    shadow_bytes, shadow_used_bytes : int
        Exact copies that are kept beside the cache for comparison: allocated, and held.
    """

    pool_bytes: int
    window_bytes: int
    table_bytes: int
    pages_used_bytes: int
    window_used_bytes: int
    payload_bytes_per_token: float
    page_bytes_per_token: float
    fp16_bytes: int
    fp32_bytes: int
    compression_vs_fp16: float
    shadow_bytes: int = 0
    shadow_used_bytes: int = 0


def cache_stats(tables: PageTables) -> CacheStats:
    """Count what the tables hold."""
    pool, windows = tables.pool, tables.windows
    held = tables.num_resident_blocks * tables.page_size
    return CacheStats(
        num_pages=pool.num_used + pool.num_free + 1,
        pages_used=pool.num_used,
        pages_free=pool.num_free,
        pages_shared=pool.num_shared,
        pages_cached=tables.num_cached_pages,
        window_slots_used=windows.num_used,
        window_slots_free=windows.num_free,
        num_sequences=tables.num_sequences,
        logical_tokens=tables.logical_tokens,
        resident_tokens=tables.resident_tokens,
        page_utilisation=tables.resident_tokens / held if held else 0.0,
    )


def cache_counters(tables: PageTables) -> CacheCounters:
    """Count what happened to the tables."""
    prefix = tables.prefix
    forgotten = 0 if prefix is None else prefix.num_forgotten
    return CacheCounters(
        prefix_queries=tables.prefix_queries,
        prefix_hits=tables.prefix_hits,
        blocks_published=forgotten + (0 if prefix is None else prefix.num_pages_held),
        blocks_forgotten=forgotten,
        blocks_evicted=tables.num_blocks_evicted,
    )


def memory_report(config: CacheConfig, layout: PageLayout, tables: PageTables) -> MemoryReport:
    """Account for the bytes of a cache."""
    heads, dim, layers = config.num_kv_heads, config.head_dim, config.num_layers
    fp32 = tables.resident_tokens * layers * heads * 2 * dim * DTYPE_BYTES["f32"]
    used = tables.pool.num_used * layout.page_bytes
    slots = config.num_window_slots if config.window_tokens else 0
    window_used = tables.windows.num_used * layout.window_slot_bytes
    payload = heads * sum(extent.payload_bytes for extent in layout.extents)
    held = used + window_used
    return MemoryReport(
        pool_bytes=layout.pool_bytes,
        window_bytes=slots * layout.window_slot_bytes,
        table_bytes=tables.nbytes,
        pages_used_bytes=used,
        window_used_bytes=window_used,
        payload_bytes_per_token=payload / config.page_size,
        page_bytes_per_token=layout.token_bytes,
        fp16_bytes=fp32 // 2,
        fp32_bytes=fp32,
        compression_vs_fp16=fp32 / 2 / held if held else 0.0,
    )
