"""Kernels that move whole pages and window rows, against the host's bytes."""

from __future__ import annotations

import numpy as np
import pytest
from device_layer import DeviceLayer, cache_config, read_only, run
from test_store import FORMATS, tokens

from pagedtq.backends import page_launches
from pagedtq.backends.host import HostBackend
from pagedtq.config import Exact, LayerOverride
from pagedtq.paging.span_tables import layer_spans, norm_spans


@pytest.fixture(params=["layer_major", "page_major"])
def host(request):
    """Return layers of three codecs, with key bounds, every byte of the pool random."""
    exact = LayerOverride(layers=(0,), keys=Exact(), values=Exact())
    prod = LayerOverride(layers=(2,), keys=FORMATS["prod4v4"][0], values=FORMATS["k3v3"][1])
    config = cache_config(
        *FORMATS["k4v4"],
        80,
        num_layers=4,
        num_pages=9,
        page_size=16,
        pool_order=request.param,
        key_bounds=True,
        overrides=(exact, prod),
    )
    backend = HostBackend(config)
    backend.pool[:] = np.random.default_rng(0).integers(0, 256, backend.pool.size, np.uint8)
    return backend


@pytest.mark.parametrize("run_bytes", [1, 40_000])
def test_copied_pages_equal_the_hosts(host, run_bytes):
    src, dst = np.array([1, 5, 5]), np.array([8, 2, 3])
    pool, spans = host.pool.copy(), read_only(layer_spans(host.layout))
    run(page_launches.copy_pages(pool, spans, read_only(src), read_only(dst), run_bytes), seed=1)
    host.pages.copy(src, dst)
    assert np.array_equal(pool, host.pool)


def test_slabs_equal_the_hosts_and_go_back_anywhere(host):
    pages, layout = np.array([7, 1, 4]), host.layout
    spans, largest = layer_spans(layout), max(layout.layer_page_bytes)
    slabs = np.zeros((3, layout.page_bytes), np.uint8)
    source = read_only(host.pool)
    run(page_launches.gather_slabs(source, spans, pages, slabs, largest))
    assert np.array_equal(slabs, host.pages.gather(pages))
    pool, elsewhere = host.pool.copy(), np.array([2, 8, 3])
    run(page_launches.scatter_slabs(pool, spans, elsewhere, read_only(slabs), largest))
    host.pages.scatter(slabs, elsewhere)
    assert np.array_equal(pool, host.pool)


def test_clearing_zeroes_norms_and_bounds_and_nothing_else(host):
    pages = np.array([3, 6])
    pool, before = host.pool.copy(), host.pool.copy()
    run(page_launches.clear_norms(pool, norm_spans(host.layout), pages, 2))
    host.pages.clear_norms(pages)
    assert np.array_equal(pool, host.pool)
    assert (before != pool).sum() > 2 * 2 * 3 * 2 * 16  # pages, heads, coded layers, planes, tokens


@pytest.mark.parametrize(
    ("kind", "kv_dtype", "head_dim"),
    [("f32", "f16", 128), ("f16", "f16", 96), ("f32", "bf16", 80), ("bf16", "f32", 4)],
)
def test_window_rows_equal_the_hosts(kind, kv_dtype, head_dim):
    window = {"page_size": 16, "window": 16, "sinks": 4, "num_window_slots": 3}
    config = cache_config(*FORMATS["k4v4"], head_dim, kv_dtype=kv_dtype, **window)
    host = HostBackend(config)
    window = host.window(0)
    ring, sinks = window.ring.copy(), window.sink.copy()
    keys, values = tokens(6, 2, config.head_dim, kind)
    ring_mapping = np.array([16, 17, -1, -1, 31, 40])
    sink_mapping = np.array([4, 5, 6, -1, -1, 0])
    mappings = read_only(ring_mapping), read_only(sink_mapping)
    launches = DeviceLayer(host).launches
    run(launches.store_window(keys, values, kind, *mappings, ring, sinks), seed=4)
    window.write(host.check(0, keys, values, kind), ring_mapping, sink_mapping)
    assert np.array_equal(_bits(ring), _bits(window.ring))
    assert np.array_equal(_bits(sinks), _bits(window.sink))


def _bits(array):
    return array.view(np.uint8)


def test_rings_are_copied_as_pages_of_one_layer():
    config = cache_config(*FORMATS["k4v4"], page_size=16, window=16, num_window_slots=4)
    window = HostBackend(config).window(0)
    window.ring[:] = np.random.default_rng(1).standard_normal(window.ring.shape)
    ring, slot = window.ring.copy(), window.ring[0].nbytes
    span = np.array([[0, slot, 0, slot]])
    pool = _bits(ring).reshape(-1)
    run(page_launches.copy_pages(pool, span, np.array([1]), np.array([3]), slot))
    window.copy_slots(np.array([1]), np.array([3]))
    assert np.array_equal(ring, window.ring)
