"""Pages written by the kernels' source equal the host's, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from device_layer import DeviceLayer, as_kind, cache_config

from pagedtq.backends.host import HostBackend
from pagedtq.backends.page_launches import LayerLaunches
from pagedtq.backends.tokens import TokenBatch
from pagedtq.config import Exact, LayerOverride, TurboQuant
from pagedtq.errors import UnsupportedError
from pagedtq.paging.layout import PageLayout

FORMATS = {
    "k4v4": (TurboQuant(bits=4), TurboQuant(bits=4)),
    "k3v3": (TurboQuant(bits=3), TurboQuant(bits=3)),
    "k2v2": (TurboQuant(bits=2), TurboQuant(bits=2)),
    "k8v8": (TurboQuant(bits=8), TurboQuant(bits=8)),
    "k1v5": (TurboQuant(bits=1), TurboQuant(bits=5)),
    "k5v6": (TurboQuant(bits=5), TurboQuant(bits=6)),
    "k6v1": (TurboQuant(bits=6, scale="none"), TurboQuant(bits=1, scale="none")),
    "k7v7": (TurboQuant(bits=7, scale="unbiased"), TurboQuant(bits=7)),
    "prod4v4": (TurboQuant(bits=4, estimator="prod"), TurboQuant(bits=4, scale="unbiased")),
    "prod3v3": (
        TurboQuant(bits=3, estimator="prod", projection="orthogonal"),
        TurboQuant(bits=3),
    ),
    "dense4v3": (TurboQuant(bits=4, rotation="dense"), TurboQuant(bits=3)),
    "searched4v3": (
        TurboQuant(bits=4, scale="searched"),
        TurboQuant(bits=3, scale="searched"),
    ),
    "searched2v6": (
        TurboQuant(bits=2, scale="searched"),
        TurboQuant(bits=6, scale="searched"),
    ),
    "exact": (Exact(dtype="bf16"), Exact(dtype="f32")),
    "k4exact": (TurboQuant(bits=4), Exact(dtype="f16")),
}

# Every format once, every dimension, page size, type of input and kv_dtype several times.
CASES = [
    # format, head_dim, page_size, input, kv_dtype
    ("k4v4", 128, 64, "f16", "f16"),
    ("k4v4", 64, 16, "bf16", "bf16"),
    ("k4v4", 96, 256, "f32", "f16"),
    ("k3v3", 128, 16, "bf16", "f16"),
    ("k3v3", 80, 64, "f32", "bf16"),
    ("k3v3", 256, 64, "f16", "f16"),
    ("k2v2", 128, 64, "f32", "f32"),
    ("k2v2", 96, 32, "f16", "f16"),
    ("k8v8", 256, 16, "bf16", "bf16"),
    ("k8v8", 64, 128, "f32", "f32"),
    ("k1v5", 128, 16, "f16", "f16"),
    ("k5v6", 80, 16, "f16", "f32"),
    ("k6v1", 64, 64, "f32", "f16"),
    ("k7v7", 112, 16, "f16", "f16"),
    ("prod4v4", 128, 64, "f16", "f16"),
    ("prod3v3", 96, 16, "bf16", "bf16"),
    ("prod3v3", 64, 64, "f32", "f32"),
    ("dense4v3", 64, 16, "f16", "f16"),
    ("searched4v3", 128, 64, "f16", "f16"),
    ("searched4v3", 80, 16, "bf16", "bf16"),
    ("searched2v6", 64, 16, "f32", "f16"),
    ("exact", 80, 16, "f32", "f32"),
    ("k4exact", 128, 64, "f16", "f16"),
]


def tokens(count, heads, head_dim, kind, kv_dtype="f32", seed=0, means=None):
    """Return keys and values of norms 1e-3 to 1e3, some of them zero."""
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((2, count, heads, head_dim)).astype(np.float32)
    if means is not None:
        vectors[0] += means
    else:
        # Per element, so that f16 inputs stay normal numbers at either end.
        norms = 10.0 ** rng.uniform(-3, 3, (2, count, heads, 1)) / np.sqrt(head_dim)
        vectors *= norms.astype(np.float32)
        vectors[:, count // 2] = 0
        vectors[1, 0, 0] = -0.0
    return as_kind(vectors[0], kind), as_kind(vectors[1], kind)


def store_both(host, keys, values, slots, kind, seed=0):
    device = DeviceLayer(host, seed=seed)
    device.store(keys, values, slots, kind)
    host.store(0, keys, values, slots, kind)
    return device


def assert_same_pages(device, host):
    """Compare plane by plane first, to say where bytes differ, then everything."""
    for name in host.layout.extents[0].planes:
        ours = host.layout.plane_view(device.pool, 0, name)
        theirs = host.layout.plane_view(host.pool, 0, name)
        different = np.argwhere(ours.view(np.uint8) != theirs.view(np.uint8))
        assert not len(different), f"{name}: {len(different)} bytes differ, first {different[0]}"
    assert np.array_equal(device.pool, host.pool)


def poisoned(config, means=None):
    host = HostBackend(config, key_means=means)
    host.pool[:] = 0xFF
    return host


@pytest.mark.parametrize(("form", "head_dim", "page_size", "kind", "kv_dtype"), CASES)
def test_pages_equal_the_hosts_byte_for_byte(form, head_dim, page_size, kind, kv_dtype):
    config = cache_config(*FORMATS[form], head_dim, page_size=page_size, kv_dtype=kv_dtype)
    host = poisoned(config)
    # From an odd slot over a page's edge, with gaps; slots that nobody writes stay poisoned.
    slots = np.arange(page_size + 3, page_size + 3 + page_size + 6, dtype=np.int64)
    slots[[4, 9, 10]] = -1
    keys, values = tokens(len(slots), 2, head_dim, kind)
    device = store_both(host, keys, values, slots, kind)
    assert_same_pages(device, host)
    untouched = host.layout.layer_view(device.pool, 0)[[0, 3, 4]]
    assert (untouched == 0xFF).all()


@pytest.mark.parametrize(
    ("form", "head_dim", "kind"), [("k2v2", 128, "f32"), ("k8v8", 64, "f32"), ("k4v4", 64, "bf16")]
)
def test_norms_beyond_f16_saturate_and_vectors_below_1e12_have_no_codes(form, head_dim, kind):
    # Arrays on the device come unchecked: kernels limit what the host backend would refuse.
    host = poisoned(cache_config(*FORMATS[form], head_dim, page_size=16, kv_dtype=kind))
    norms = np.array([1e-13, 0.9e-12, 1.1e-12, 1e-11, 3e4, 1e5, 1e6, 1e7])
    vectors = np.random.default_rng(6).standard_normal((2, len(norms), 2, head_dim))
    vectors *= norms[:, None, None] / np.linalg.norm(vectors, axis=-1, keepdims=True)
    keys, values = (as_kind(part.astype(np.float32), kind) for part in vectors)
    slots = np.arange(16, 16 + len(norms), dtype=np.int64)
    device = DeviceLayer(host)
    device.store(keys, values, slots, kind)
    host.layers[0].write(TokenBatch(keys, values, kind, kind), slots)
    assert_same_pages(device, host)
    planes = (
        host.layout.plane_view(device.pool, 0, name)[1] for name in ("key_norms", "key_codes")
    )
    stored, codes = (plane[:, : len(norms)] for plane in planes)
    assert (stored[:, -2:] == 65504).all() and np.isfinite(stored).all()
    assert not codes[:, :2].any() and codes[:, 2:].any(axis=-1).all()


@pytest.mark.filterwarnings("ignore::pagedtq.codec.rotation.DenseRotationWarning")
@pytest.mark.parametrize("head_dim", [4, 16, 65, 100, 192, 512])
def test_every_other_dimension_has_a_correct_path(head_dim):
    form = (TurboQuant(bits=3), TurboQuant(bits=3 if head_dim == 512 else 4))
    host = poisoned(cache_config(*form, head_dim, page_size=16))
    slots = np.arange(17, 24, dtype=np.int64)
    keys, values = tokens(len(slots), 2, head_dim, "f16")
    assert_same_pages(store_both(host, keys, values, slots, "f16"), host)


@pytest.mark.filterwarnings("ignore::pagedtq.codec.rotation.DenseRotationWarning")
@pytest.mark.parametrize(
    ("form", "head_dim", "largest"),
    [("dense4v3", 3100, 3072), ("k4v4", 3100, 3072), ("prod4v4", 4096, 3072), ("k4v4", 4096, None)],
)
def test_vectors_that_shared_memory_cannot_hold_are_refused(form, head_dim, largest):
    layout = PageLayout(cache_config(*FORMATS[form], head_dim, num_kv_heads=1, page_size=16))

    def launches():
        return LayerLaunches(layout, 0, np.zeros(1, np.uint8), (None, None))

    if largest is None:
        launches()
        return
    with pytest.raises(UnsupportedError, match=f"at most {largest} elements.*got head_dim"):
        launches()


@pytest.mark.parametrize("form", ["k4v4", "prod4v4", "dense4v3"])
def test_means_of_twenty_times_the_spread_are_subtracted_first(form):
    means = 20 * np.random.default_rng(5).standard_normal((1, 2, 128)).astype(np.float32)
    host = poisoned(cache_config(*FORMATS[form]), means)
    slots = np.arange(70, 91, dtype=np.int64)
    keys, values = tokens(len(slots), 2, 128, "f16", means=means[0])
    device = store_both(host, keys, values, slots, "f16")
    assert_same_pages(device, host)
    norms = host.layout.plane_view(device.pool, 0, "key_norms")[1, :, 6:27]
    assert norms.astype(np.float32).max() < 20  # the mean's own norm is about 226


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("form", ["k4v4", "prod4v4", "dense4v3"])
def test_the_order_of_threads_does_not_matter(form, seed):
    # In 96 dimensions sums and projections go through shared memory.
    head_dim = 128 if form == "k4v4" else 96
    host = poisoned(cache_config(*FORMATS[form], head_dim))
    slots = np.random.default_rng(seed).permutation(np.arange(64, 64 + 33)).astype(np.int64)
    keys, values = tokens(len(slots), 2, head_dim, "f16", seed=seed)
    kind = "f16"
    assert_same_pages(store_both(host, keys, values, slots, kind, seed=seed), host)


def test_a_token_gets_the_same_bytes_alone_and_in_a_batch():
    host = poisoned(cache_config(*FORMATS["k3v3"]))
    slots = np.arange(64, 64 + 9, dtype=np.int64)
    keys, values = tokens(len(slots), 2, 128, "f16")
    whole, single = DeviceLayer(host), DeviceLayer(host)
    whole.store(keys, values, slots, "f16")
    for i in np.random.default_rng(0).permutation(len(slots)):
        one = slice(i, i + 1)
        single.store(keys[one], values[one], slots[one], "f16")
    assert np.array_equal(whole.pool, single.pool)


@pytest.mark.parametrize("offset", [0, 3])
def test_tokens_may_be_strided_views_of_a_fused_projection(offset):
    # [tokens, q | k | v]; at an odd offset the rows are not aligned to 16 bytes.
    host = poisoned(cache_config(*FORMATS["k4v4"], 64))
    rows = np.random.default_rng(2).standard_normal((7, 3, 2, 64)).astype(np.float16)
    memory = np.zeros((7, 3 * 2 * 64 + offset), np.float16)
    memory[:, offset:] = rows.reshape(7, -1)
    keys, values = (memory[:, offset + 128 * i :][:, :128] for i in (1, 2))
    keys, values = (
        np.lib.stride_tricks.as_strided(a, (7, 2, 64), (a.strides[0], 128, 2))
        for a in (keys, values)
    )
    slots = np.arange(64, 71, dtype=np.int64)
    device = DeviceLayer(host)
    strided = [_rebase(array, memory) for array in (keys, values)]
    device.store(*strided, slots, "f16")
    host.store(0, rows[:, 1].copy(), rows[:, 2].copy(), slots)
    assert_same_pages(device, host)


def _rebase(array, memory):
    view = np.ndarray(array.shape, array.dtype, memory, _offset(array, memory), array.strides)
    assert view.base is memory
    return view


def _offset(array, memory):
    return array.ctypes.data - memory.ctypes.data


@pytest.mark.parametrize("pool_order", ["layer_major", "page_major"])
def test_layers_of_either_pool_order_are_written_in_place(pool_order):
    exact = LayerOverride(layers=(0,), keys=Exact(), values=Exact())
    config = cache_config(
        *FORMATS["k4v4"], 64, num_layers=3, pool_order=pool_order, overrides=(exact,)
    )
    host = poisoned(config)
    slots = np.arange(64, 69, dtype=np.int64)
    keys, values = tokens(len(slots), 2, 64, "f16")
    device = DeviceLayer(host, layer=2)
    device.store(keys, values, slots, "f16")
    host.store(2, keys, values, slots)
    assert np.array_equal(device.pool, host.pool)


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16", "f32"])
def test_sealing_from_the_ring_equals_the_host(kv_dtype):
    config = cache_config(
        *FORMATS["k4v4"], page_size=16, window=32, num_window_slots=3, kv_dtype=kv_dtype
    )
    host = poisoned(config)
    ring = host.window(0).ring
    keys, values = tokens(3 * 32, 2, 128, kv_dtype)
    ring[:, :, 0] = keys.reshape(3, 32, 2, 128).transpose(0, 2, 1, 3)
    ring[:, :, 1] = values.reshape(3, 32, 2, 128).transpose(0, 2, 1, 3)
    # Two blocks of one sequence that wrap around its ring, and one of another.
    ring_rows = np.concatenate([32 + (np.arange(20, 52) % 32), np.arange(16)])
    slots = np.concatenate([np.arange(16, 48), np.arange(64, 80)])
    slots[7] = -1
    device = DeviceLayer(host, seed=9)
    device.seal(ring, ring_rows, slots)
    host.seal(0, ring_rows, slots)
    assert_same_pages(device, host)


@pytest.mark.filterwarnings("ignore::pagedtq.codec.rotation.DenseRotationWarning")
@pytest.mark.parametrize(
    ("form", "head_dim"), [("k4v4", 128), ("k3v3", 80), ("prod3v3", 96), ("k4v4", 16)]
)
def test_key_bounds_of_full_pages_equal_the_hosts(form, head_dim):
    host = poisoned(cache_config(*FORMATS[form], head_dim, page_size=16, key_bounds=True))
    slots = np.arange(16, 48, dtype=np.int64)
    keys, values = tokens(32, 2, head_dim, "f16")
    # Channels of one sign, so that a bound of no token at all, zero, would show.
    keys[:, 0] = tokens(32, 1, head_dim, "f16", means=np.float32(20))[0][:, 0]
    host.store(0, keys, values, slots)
    pages = np.array([2, 1])
    device = DeviceLayer(host, seed=5)
    device.write_bounds(pages)
    host.write_bounds(0, pages)
    ours = host.layout.plane_view(device.pool, 0, "key_bounds")[1:3]
    theirs = host.layout.plane_view(host.pool, 0, "key_bounds")[1:3]
    assert np.array_equal(ours, theirs)
    assert (ours[:, :, 0] < ours[:, :, 1]).all()
    others = [name for name in host.layout.extents[0].planes if name != "key_bounds"]
    for name in others:
        views = (host.layout.plane_view(pool, 0, name) for pool in (device.pool, host.pool))
        assert np.array_equal(*(view.view(np.uint8) for view in views)), name
