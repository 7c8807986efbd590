import numpy as np
import pytest

from pagedtq import LayerOverride, PagedKVCache, TurboQuant, preset
from pagedtq.codec import TurboQuantCodec
from pagedtq.errors import ArgumentError


def make(**fields):
    override = LayerOverride(layers=(1,), keys=TurboQuant(bits=2), values=TurboQuant(bits=3))
    base = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 32, "num_pages": 12, "page_size": 16}
    config = preset("k4v4", **{**base, "overrides": (override,), **fields})
    return PagedKVCache(config, num_threads=1)


def fill(cache, seed=0):
    pool = cache.backend.pool
    pool[:] = np.random.default_rng(seed).integers(0, 256, pool.size, np.uint8)


@pytest.mark.parametrize("order", ["layer_major", "page_major"])
def test_copies_move_whole_pages_and_touch_no_other(order):
    cache = make(pool_order=order)
    backend = cache.backend
    fill(cache)
    pages = np.arange(1, 12)
    before = backend.gather(pages)
    backend.copy_pages(np.array([3, 4]), np.array([7, 9]))
    after = backend.gather(pages)
    before[[6, 8]] = before[[2, 3]]
    np.testing.assert_array_equal(after, before)


def test_slabs_are_the_same_bytes_in_both_pool_orders():
    layer_major, page_major = make(), make(pool_order="page_major")
    fill(layer_major)
    slabs = layer_major.backend.gather(np.array([5, 2, 11]))
    assert slabs.shape == (3, layer_major.backend.layout.page_bytes)
    page_major.backend.scatter(slabs, np.array([1, 9, 4]))
    np.testing.assert_array_equal(page_major.backend.gather(np.array([1, 9, 4])), slabs)
    others = page_major.backend.gather(np.array([2, 3, 5, 6, 7, 8, 10, 11]))
    assert not others.any()


def test_clearing_norms_zeroes_norm_planes_of_these_pages_only():
    cache = make(key_bounds=True)
    fill(cache)
    before = cache.backend.pool.copy()
    cache.backend.clear_norms(np.array([2, 5]))
    layout = cache.backend.layout
    for layer, extent in enumerate(layout.extents):
        for name, plane in extent.planes.items():
            now = layout.plane_view(cache.backend.pool, layer, name)
            was = layout.plane_view(before, layer, name)
            cleared = name.endswith("_norms") or name == "key_bounds"
            for page in range(12):
                if cleared and page in (2, 5):
                    assert not now[page].view(np.uint8).any()
                else:
                    np.testing.assert_array_equal(
                        now[page].view(np.uint8), was[page].view(np.uint8)
                    )
            assert plane.nbytes


@pytest.mark.parametrize("bad", [[0], [12], [-1], [3, 40]])
def test_pages_outside_the_pool_are_refused_and_nothing_moves(bad):
    cache = make()
    fill(cache)
    before = cache.backend.pool.copy()
    pages, good = np.array(bad), np.arange(1, 1 + len(bad))
    for call in (
        lambda: cache.backend.copy_pages(pages, good),
        lambda: cache.backend.copy_pages(good, pages),
        lambda: cache.backend.clear_norms(pages),
        lambda: cache.backend.fill_pages(pages, 0),
        lambda: cache.backend.gather(pages),
        lambda: cache.backend.scatter(
            np.zeros((len(bad), cache.backend.layout.page_bytes), np.uint8), pages
        ),
    ):
        with pytest.raises(ArgumentError, match="page ids"):
            call()
    with pytest.raises(ArgumentError, match="slabs"):
        cache.backend.scatter(np.zeros((1, 7), np.uint8), np.array([1]))
    np.testing.assert_array_equal(cache.backend.pool, before)


@pytest.mark.parametrize("window", [0, 16, 32])
@pytest.mark.parametrize("name", ["k4v4", "k3v3", "prod4v4"])
def test_key_bounds_of_full_pages_enclose_every_rotated_key_and_are_tight(name, window):
    config = preset(
        name,
        num_layers=1,
        num_kv_heads=2,
        head_dim=64,
        num_pages=12,
        page_size=16,
        window=window,
        key_bounds=True,
    )
    cache = PagedKVCache(config, debug=True)
    seq = cache.open()
    rng = np.random.default_rng(3)
    norms = 10 ** rng.uniform(-2, 2, (1, 75, 2, 1))
    keys = (rng.standard_normal((1, 75, 2, 64)) * norms).astype(np.float32)
    for low, high in ((0, 5), (5, 40), (40, 41), (41, 75)):
        cache.append(seq, keys[:, low:high], keys[:, low:high])
    backend = cache.backend
    bounds = backend.layout.plane_view(backend.pool, 0, "key_bounds").astype(np.float64)
    coded = cache.state(seq).coded
    full = coded // 16
    assert full >= 3
    codec = TurboQuantCodec(config.keys, 64, 2, seed=config.seed, layer=0, stream="key")
    rotated = codec.decode_rotated(codec.encode(keys[0].astype(np.float16).astype(np.float32)))
    table = cache.tables.block_table([seq])[0]
    for block in range(full):
        inside = rotated[16 * block : 16 * block + 16].astype(np.float64)
        low, high = bounds[table[block], :, 0], bounds[table[block], :, 1]
        assert (low <= inside.min(axis=0)).all()
        assert (high >= inside.max(axis=0)).all()
        slack = np.maximum(np.abs(inside).max(axis=0) * 2.0**-10, 2.0**-24)
        assert (inside.min(axis=0) - low <= slack).all()
        assert (high - inside.max(axis=0) <= slack).all()
    for block in range(full, len(table)):
        assert not bounds[table[block]].any()
