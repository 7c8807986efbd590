"""Memory reports, against bytes counted by hand."""

from __future__ import annotations

import sys

import msgspec
import numpy as np
import pytest

from pagedtq import CacheConfig, Exact, PagedKVCache, SharingOptions, TurboQuant, preset
from pagedtq.cache import MemoryReport
from pagedtq.telemetry import ShadowedCache

LAYERS, HEADS, DIM, SIZE, PAGES, SLOTS = 2, 2, 32, 16, 24, 4

# One extent: codes of 4 bits and an f16 norm, keys and values. It is padded from 576 to 640.
EXTENT = SIZE * 2 * (DIM // 2 + 2)
PAGE_PAYLOAD = LAYERS * HEADS * EXTENT
PAGE = LAYERS * HEADS * 640
# Ring and sinks of one sequence in f16.
SLOT = LAYERS * HEADS * 2 * (SIZE + 4) * DIM * 2


def config(**changes):
    fields = {
        "num_layers": LAYERS,
        "num_kv_heads": HEADS,
        "head_dim": DIM,
        "num_pages": PAGES,
        "page_size": SIZE,
        "window": SIZE,
        "sinks": 4,
        "num_window_slots": SLOTS,
    }
    return preset("k4v4", **{**fields, **changes})


def append(cache, seq_id, count, **options):
    shape = (2, cache.config.num_layers, count, HEADS, cache.config.head_dim)
    cache.append(seq_id, *np.random.default_rng(count).standard_normal(shape, "f4"), **options)


def sums_hold(report):
    parts = report.payload_bytes + report.page_slack_bytes + report.page_padding_bytes
    assert report.pages_used_bytes == parts
    assert report.metadata_bytes == (
        report.table_bytes
        + report.page_state_bytes
        + report.window_state_bytes
        + report.prefix_bytes
        + report.codec_bytes
    )
    assert report.held_bytes == (
        report.pages_used_bytes + report.window_used_bytes + report.shadow_used_bytes
    )


def test_slack_is_what_no_token_fills_and_shared_tokens_count_once():
    cache = PagedKVCache(config())
    seq = cache.open()
    append(cache, seq, 40)
    # It shares two pages, and fills less of the second one than its parent.
    branch = cache.fork(seq)
    cache.truncate(branch, 20)
    report = cache.memory_report()
    assert report.pages_used_bytes == 3 * PAGE
    assert report.payload_bytes == 40 * PAGE_PAYLOAD // SIZE
    assert report.page_slack_bytes == 8 * PAGE_PAYLOAD // SIZE
    assert report.page_padding_bytes == 3 * (PAGE - PAGE_PAYLOAD)
    assert report.window_used_bytes == SLOT
    # Uncompressed they would share nothing.
    assert report.fp16_bytes == 60 * LAYERS * HEADS * 2 * DIM * 2
    assert report.fp32_bytes == 2 * report.fp16_bytes
    assert report.compression_vs_fp16 == report.fp16_bytes / (3 * PAGE + SLOT)
    sums_hold(report)
    # The branch alone holds what it fills.
    cache.close(seq)
    report = cache.memory_report()
    assert report.payload_bytes == 20 * PAGE_PAYLOAD // SIZE
    assert report.page_slack_bytes == 12 * PAGE_PAYLOAD // SIZE
    sums_hold(report)


def test_evicted_blocks_hold_nothing():
    cache = PagedKVCache(config())
    seq = cache.open()
    append(cache, seq, 100)
    before = cache.memory_report()
    cache.evict(seq, [1, 2])
    report = cache.memory_report()
    assert before.payload_bytes - report.payload_bytes == 2 * PAGE_PAYLOAD
    assert before.page_slack_bytes == report.page_slack_bytes == 12 * PAGE_PAYLOAD // SIZE
    sums_hold(report)


def test_an_empty_cache_holds_nothing_and_says_what_is_allocated():
    report = PagedKVCache(config()).memory_report()
    assert report.pool_bytes == PAGES * PAGE
    assert report.window_bytes == SLOTS * SLOT
    assert (report.held_bytes, report.compression_vs_fp16, report.warnings) == (0, 0.0, [])
    sums_hold(report)


def test_metadata_is_counted_to_the_byte():
    report = PagedKVCache(config()).memory_report()
    # 16 rows at first: 13 int64 of state, an int64 id, an int32 slot, 8 int32 of pages, and 3 int64
    # that say when those were written.
    assert report.table_bytes == 16 * (13 * 8 + 8 + 4 + 8 * 4 + 3 * 8)

    def counted(first, count):
        # Reference counts, a work array, the queue's ring and where each id is in it.
        return (first + count) * (4 + 8) + (2 * count + 64) * 4 + (first + count) * 4

    assert report.page_state_bytes == counted(1, PAGES - 1)
    # Slots, sink records, the record of each page, and an empty dict.
    expected = 2 * counted(0, SLOTS) + 4 * PAGES + sys.getsizeof({})
    assert report.window_state_bytes == expected
    # One codebook for all: 8 magnitudes twice in float64, 7 midpoints, 8 steps, 16 entries.
    # Two rows of signs for each of 8 rotations.
    codebook = 2 * 8 * 8 + 7 * 4 + 8 * 4 + 16 * 4
    signs = LAYERS * 2 * HEADS * DIM * 2 * 4
    assert report.codec_bytes == codebook + signs
    assert report.prefix_bytes == 0


def test_codecs_count_matrices_and_means():
    exact = CacheConfig(num_layers=1, num_kv_heads=HEADS, head_dim=DIM, num_pages=4, keys=Exact())
    exact = exact.replace(values=Exact())
    assert PagedKVCache(exact).memory_report().codec_bytes == 0
    plain = exact.replace(keys=TurboQuant(bits=4))
    base = PagedKVCache(plain).memory_report().codec_bytes
    means = np.zeros((1, HEADS, DIM), np.float32)
    assert PagedKVCache(plain, key_means=means).memory_report().codec_bytes == base + means.nbytes
    dense = plain.replace(keys=TurboQuant(bits=4, rotation="dense"))
    with_matrices = PagedKVCache(dense).memory_report().codec_bytes
    assert with_matrices == base + HEADS * DIM * DIM * 8


def test_prefix_sharing_is_counted_and_grows_with_its_keys():
    cache = PagedKVCache(config(), sharing=SharingOptions())
    empty = cache.memory_report().prefix_bytes
    # Token ids and a flag of each page, a list of keys, three empty dicts.
    expected = PAGES * (4 * SIZE + 1) + sys.getsizeof([None] * PAGES) + 3 * sys.getsizeof({})
    assert empty == expected
    tokens = list(range(3 * SIZE))
    seq = cache.open(tokens)
    append(cache, seq, len(tokens))
    report = cache.memory_report()
    # Three keys of SHA-256 and the prompt, at least.
    assert report.prefix_bytes >= empty + 3 * (32 + 33) + 4 * len(tokens)
    sums_hold(report)
    cache.close(seq)
    # Pages that wait to be found have no owner, and hold nothing.
    assert cache.memory_report().held_bytes == 0
    assert cache.reset_prefix_cache()
    assert cache.memory_report().prefix_bytes < report.prefix_bytes


def test_shadows_are_counted_and_named():
    cache = ShadowedCache(config(), fraction=1.0)
    seq = cache.open()
    append(cache, seq, 40)
    report, plain = cache.memory_report(), cache.shadow.memory_report()
    exact_page = LAYERS * HEADS * SIZE * DIM * 2 * 2
    assert report.shadow_used_bytes == 3 * exact_page
    assert report.shadow_bytes == cache.shadow.config.num_pages * exact_page + plain.metadata_bytes
    assert report.held_bytes == 3 * PAGE + SLOT + 3 * exact_page
    assert report.compression_vs_fp16 == report.fp16_bytes / report.held_bytes
    assert any("shadows" in warning for warning in report.warnings)
    sums_hold(report)


@pytest.mark.parametrize("window", [0, SIZE])
def test_reports_have_a_version_and_survive_json(window):
    report = PagedKVCache(config(window=window, sinks=0)).memory_report()
    assert report.schema == 2
    assert msgspec.json.decode(msgspec.json.encode(report), type=MemoryReport) == report
    assert "page_slack_bytes" in str(msgspec.json.schema(MemoryReport))
