"""What a cache says about itself: counts and bytes, as plain structs."""

from __future__ import annotations

import msgspec

from ..config import DTYPE_BYTES, CacheConfig
from ..paging.layout import PageLayout
from ..paging.page_tables import PageTables
from .host_tier import HostTier

#: Version of `MemoryReport`: 2 names slack, padding, metadata and what is held.
REPORT_SCHEMA = 2

#: Said wherever shadows are counted.
SHADOW_WARNING = (
    "held_bytes and compression_vs_fp16 include exact shadows; "
    "do not report the pages alone as what was saved while shadows are kept"
)


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counts of pages, window slots, sequences and tokens; all of them integers.

    Attributes
    ----------
    num_pages : int
        Pages of the pool: used, free and parked ones, and the null page.
    pages_used, pages_free, pages_parked : int
        Pages with an owner, without one, and without one behind a fence.
    pages_shared, pages_cached : int
        Pages with several owners; free ones that hold a block a new sequence can begin with.
    window_slots_used, window_slots_free : int
        Exact windows.
    num_sequences, num_swapped : int
        Open sequences, and those of them that are on the host.
    logical_tokens, resident_tokens, resident_slots : int
        Tokens of all sequences; those of them whose page is held (shared pages count for each
        owner); the slots of these pages.
    host_pages, host_pages_used : int
        The pool of the host, and what sequences hold of it.
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
    resident_slots: int
    pages_parked: int = 0
    num_swapped: int = 0
    host_pages: int = 0
    host_pages_used: int = 0

    @property
    def page_utilisation(self) -> float:
        """How full the pages of the sequences are, 0 to 1; 0 without pages."""
        return self.resident_tokens / self.resident_slots if self.resident_slots else 0.0


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

    Three sums hold: ``pages_used_bytes = payload_bytes + page_slack_bytes + page_padding_bytes``;
    ``metadata_bytes`` is the sum of tables, page state, window state, prefix and codecs;
    ``held_bytes = pages_used_bytes + window_used_bytes + shadow_used_bytes``.

    Attributes
    ----------
    schema : int
        Version of this report.
    pool_bytes, window_bytes : int
        Allocated: the page pool, and the rows of the exact window.
    pages_used_bytes, window_used_bytes : int
        The part of it that sequences hold.
    payload_bytes : int
        Codes and norms of the tokens in held pages; a token that sequences share counts once.
    page_slack_bytes : int
        Slots of held pages that belong to no token.
    page_padding_bytes : int
        Bytes of held pages that only align others.
    table_bytes, page_state_bytes, window_state_bytes, prefix_bytes, codec_bytes : int
        Metadata: page tables and the state of sequences; reference counts and free queue of the
        pages; the same of window slots and sink records; index, keys and token ids of shared
        prefixes; codebooks, rotations, projections and means.
    metadata_bytes : int
        The five together.
    payload_bytes_per_token, page_bytes_per_token : float
        Codes and norms of a token over all layers and heads, without and with page alignment.
    fp16_bytes, fp32_bytes : int
        The resident tokens of all sequences, uncompressed, without any pages.
    shadow_bytes, shadow_used_bytes : int
        Exact copies that are kept beside the cache for comparison: allocated, their metadata
        included, and held.
    held_bytes : int
        What sequences and shadows hold.
    compression_vs_fp16 : float
        ``fp16_bytes`` over ``held_bytes``; 0.0 when nothing is held.
    warnings : list of str
        What must be known to quote these figures.
    host_bytes, host_used_bytes : int
        The host tier: allocated, and held by sequences that are swapped out. No part of the ratio,
        as the resident tokens are none of theirs.
    """

    schema: int = REPORT_SCHEMA
    pool_bytes: int
    window_bytes: int
    pages_used_bytes: int
    window_used_bytes: int
    payload_bytes: int
    page_slack_bytes: int
    page_padding_bytes: int
    table_bytes: int
    page_state_bytes: int
    window_state_bytes: int
    prefix_bytes: int
    codec_bytes: int
    metadata_bytes: int
    payload_bytes_per_token: float
    page_bytes_per_token: float
    fp16_bytes: int
    fp32_bytes: int
    shadow_bytes: int = 0
    shadow_used_bytes: int = 0
    held_bytes: int
    compression_vs_fp16: float
    host_bytes: int = 0
    host_used_bytes: int = 0
    warnings: list[str] = []

    def with_shadows(self, shadows: MemoryReport) -> MemoryReport:
        """Return this report with a second cache counted as shadows of this one."""
        held = self.held_bytes + shadows.held_bytes
        return msgspec.structs.replace(
            self,
            shadow_bytes=shadows.pool_bytes + shadows.window_bytes + shadows.metadata_bytes,
            shadow_used_bytes=shadows.held_bytes,
            held_bytes=held,
            compression_vs_fp16=self.fp16_bytes / held if held else 0.0,
            warnings=[*self.warnings, SHADOW_WARNING],
        )


def cache_stats(tables: PageTables) -> CacheStats:
    """Count what the tables hold."""
    pool, windows = tables.pool, tables.windows
    return CacheStats(
        num_pages=pool.num_pages,
        pages_used=pool.num_used,
        pages_free=pool.num_free,
        pages_shared=pool.num_shared,
        pages_cached=tables.num_cached_pages,
        window_slots_used=windows.num_used,
        window_slots_free=windows.num_free,
        num_sequences=tables.num_sequences,
        logical_tokens=tables.logical_tokens,
        resident_tokens=tables.resident_tokens,
        resident_slots=tables.num_resident_blocks * tables.page_size,
        pages_parked=pool.num_parked,
        num_swapped=tables.num_swapped,
        host_pages=tables.host.num_pages,
        host_pages_used=tables.host.num_used,
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


def memory_report(
    config: CacheConfig, layout: PageLayout, tables: PageTables, host: HostTier, codec_bytes: int
) -> MemoryReport:
    """Account for the bytes of a cache."""
    heads, dim, layers = config.num_kv_heads, config.head_dim, config.num_layers
    fp32 = tables.resident_tokens * layers * heads * 2 * dim * DTYPE_BYTES["f32"]
    used = tables.pool.num_used * layout.page_bytes
    page_payload = heads * sum(extent.payload_bytes for extent in layout.extents)
    payload = page_payload * int(tables.page_fill().sum()) // config.page_size
    slots = config.num_window_slots if config.window_tokens else 0
    window_used = tables.windows.num_used * layout.window_slot_bytes
    held = used + window_used
    page_state, window_state = tables.pool.nbytes, tables.windows.nbytes
    prefix = tables.prefix_bytes
    return MemoryReport(
        pool_bytes=layout.pool_bytes,
        window_bytes=slots * layout.window_slot_bytes,
        pages_used_bytes=used,
        window_used_bytes=window_used,
        payload_bytes=payload,
        page_slack_bytes=tables.pool.num_used * page_payload - payload,
        page_padding_bytes=used - tables.pool.num_used * page_payload,
        table_bytes=tables.nbytes,
        page_state_bytes=page_state,
        window_state_bytes=window_state,
        prefix_bytes=prefix,
        codec_bytes=codec_bytes,
        metadata_bytes=tables.nbytes + page_state + window_state + prefix + codec_bytes,
        payload_bytes_per_token=page_payload / config.page_size,
        page_bytes_per_token=layout.token_bytes,
        fp16_bytes=fp32 // 2,
        fp32_bytes=fp32,
        held_bytes=held,
        compression_vs_fp16=fp32 / 2 / held if held else 0.0,
        host_bytes=host.nbytes,
        host_used_bytes=host.used_bytes,
    )
