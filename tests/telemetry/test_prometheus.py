"""Metrics: what a scrape shows is what the cache counts, and nothing is global."""

from __future__ import annotations

import subprocess
import sys

import msgspec
import numpy as np
import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

from pagedtq import PagedKVCache, SharingOptions, preset
from pagedtq.cache import CacheCounters, CacheStats, MemoryReport
from pagedtq.errors import ArgumentError, UnsupportedError
from pagedtq.paging import BlockHasher
from pagedtq.serving import BlockManager, ServedRequest
from pagedtq.telemetry import METRICS, PrometheusCollector

SIZE = 16


def admit(manager, name, tokens):
    request = ServedRequest(name, tokens, BlockHasher(SIZE))
    found, num_found = manager.get_computed_blocks(request)
    new = manager.allocate_slots(request, request.num_tokens - num_found, num_found, found)
    request.num_computed_tokens = request.num_tokens if new is not None else 0
    return request


def scraped(*sources, **options):
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(*sources, **options))
    lines = generate_latest(registry).decode().splitlines()
    return dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))


def test_a_scrape_shows_what_the_manager_counts():
    manager = BlockManager(11, SIZE)
    first = admit(manager, "0", [1] * 40)
    admit(manager, "1", [1] * 40)
    shown = scraped(manager.stats, manager.counters)
    assert shown["pagedtq_pages_used"] == "4.0"
    assert shown["pagedtq_pages_shared"] == "2.0"
    assert shown["pagedtq_prefix_queries_total"] == "80.0"
    assert shown["pagedtq_prefix_hits_total"] == "32.0"
    assert shown["pagedtq_blocks_published_total"] == "2.0"
    manager.free(first)
    registry = CollectorRegistry()
    registry.register(PrometheusCollector(manager.stats))
    assert registry.get_sample_value("pagedtq_num_sequences") == 1.0
    admit(manager, "2", [2] * 20)
    assert registry.get_sample_value("pagedtq_num_sequences") == 2.0


def test_every_count_of_a_cache_is_exported():
    config = preset("k4v4", num_layers=1, num_kv_heads=1, head_dim=64, num_pages=8, page_size=16)
    cache = PagedKVCache(config, sharing=SharingOptions())
    keys, values = np.ones((2, 1, 40, 1, 64), np.float32)
    first = cache.open([1] * 40)
    cache.append(first, keys, values)
    second = cache.open([1] * 40)
    assert cache.length(second) == 32
    cache.evict(first, [0])
    counters = cache.counters()
    assert counters == CacheCounters(
        prefix_queries=80,
        prefix_hits=32,
        blocks_published=2,
        blocks_forgotten=0,
        blocks_evicted=1,
    )
    shown = scraped(cache.stats, cache.counters, cache.memory_report)
    for field in (*CacheStats.__struct_fields__, *CacheCounters.__struct_fields__):
        suffix = "_total" if field in CacheCounters.__struct_fields__ else ""
        assert f"pagedtq_{field}{suffix}" in shown
    # What is divided is left to whoever reads: every count is a whole number.
    assert {type(count) for count in msgspec.structs.astuple(cache.stats())} == {int}
    assert cache.stats().page_utilisation == (24 + 32) / (2 + 2) / SIZE
    assert float(shown["pagedtq_pages_used_bytes"]) == cache.memory_report().pages_used_bytes > 0


def test_pages_that_are_taken_again_are_counted_as_forgotten():
    manager = BlockManager(4, SIZE)
    manager.free(admit(manager, "0", [1] * 48))
    assert manager.counters().blocks_forgotten == 0
    manager.free(admit(manager, "1", [2] * 33))
    counters = manager.counters()
    assert (counters.blocks_published, counters.blocks_forgotten) == (5, 3)
    assert manager.reset_prefix_cache()
    counters = manager.counters()
    assert (counters.blocks_published, counters.blocks_forgotten) == (5, 5)


def test_a_request_that_was_not_admitted_is_no_lookup():
    manager = BlockManager(3, SIZE)
    assert admit(manager, "0", [1] * 48).num_computed_tokens == 0
    assert manager.counters().prefix_queries == 0


def test_a_scheduler_adds_its_own_counts_as_a_mapping():
    shown = scraped(lambda: {"preemptions": 3, "something else": 4}, labels={"cache": "a"})
    assert shown == {'pagedtq_preemptions_total{cache="a"}': "3.0"}


def test_names_are_unique_and_state_falls_while_counters_do_not():
    fields = [name.field for name in METRICS]
    assert len(set(fields)) == len(fields)
    kinds = {name.field: name.kind for name in METRICS}
    assert {kinds[field] for field in CacheStats.__struct_fields__} == {"gauge"}
    assert {kinds[field] for field in CacheCounters.__struct_fields__} == {"counter"}
    for field in msgspec.structs.fields(MemoryReport):
        assert kinds.get(field.name, "gauge") == "gauge"


def test_registering_reads_nothing_and_nothing_is_registered_on_import():
    reads = []

    def source():
        reads.append(1)
        return {"pages_used": 1}

    collector = PrometheusCollector(source)
    before = len(reads)
    CollectorRegistry().register(collector)
    assert len(reads) == before
    assert not [name for name in REGISTRY._names_to_collectors if name.startswith("pagedtq")]


def test_two_sources_of_one_count_and_none_at_all_are_refused():
    with pytest.raises(ArgumentError, match="two sources have the field pages_used"):
        PrometheusCollector(lambda: {"pages_used": 1}, lambda: {"pages_used": 2})
    with pytest.raises(ArgumentError, match="no source"):
        PrometheusCollector(lambda: {"strange": 1})


def test_without_the_extra_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(UnsupportedError, match=r"pagedtq\[metrics\]"):
        PrometheusCollector(lambda: {"pages_used": 1})


def test_importing_the_package_loads_neither_extra(root):
    code = (
        "import sys, pagedtq.serving, pagedtq.telemetry;"
        "assert not {'zmq', 'prometheus_client'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)
