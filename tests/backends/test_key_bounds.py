"""Key bounds are never below a decoded score of their page, in any format."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedtq import CacheConfig, Exact, LayerOverride, PagedKVCache, Polar, TurboQuant
from pagedtq.errors import ArgumentError, UnsupportedError

SIZE = 16


def cache_of(keys, *, head_dim=32, heads=2, means=None, window=0, **fields):
    config = CacheConfig(
        num_layers=fields.pop("num_layers", 1),
        num_kv_heads=heads,
        head_dim=head_dim,
        num_pages=40,
        page_size=SIZE,
        keys=keys,
        values=TurboQuant(bits=4),
        window=window,
        num_window_slots=4,
        kv_dtype=fields.pop("kv_dtype", "f32"),
        key_bounds=fields.pop("key_bounds", True),
        overrides=fields.pop("overrides", ()),
    )
    return PagedKVCache(config, key_means=means, num_threads=1, debug=True, **fields)


def fill(cache, length, rng, scale=1.0, mean=0.0):
    config = cache.config
    shape = (config.num_layers, length, config.num_kv_heads, config.head_dim)
    seq = cache.open()
    keys = (rng.standard_normal(shape) * scale + mean).astype(np.float32)
    cache.append(seq, keys, rng.standard_normal(shape, np.float32))
    return seq


def best_scores(cache, layer, queries, ids):
    """The largest score of each page by `score`, on the pages that have bounds."""
    bounds = cache.score_bounds(layer, queries, ids)
    stats = cache.page_stats(cache.score(layer, queries, ids))
    best = []
    for index in range(len(ids)):
        mine = slice(bounds.indptr[index], bounds.indptr[index + 1])
        theirs = slice(stats.indptr[index], stats.indptr[index + 1])
        chosen = np.isin(stats.blocks[theirs], bounds.blocks[mine])
        assert stats.blocks[theirs][chosen].tolist() == bounds.blocks[mine].tolist()
        best.append(stats.maximum[:, theirs][:, chosen])
    return bounds, np.concatenate(best, axis=1)


@settings(max_examples=120, derandomize=True, deadline=None)
@given(st.data())
def test_no_score_of_a_page_is_above_its_bound(data):
    prod = data.draw(st.booleans(), "prod")
    keys = TurboQuant(
        bits=data.draw(st.integers(2 if prod else 1, 8), "bits"),
        estimator="prod" if prod else "mse",
        projection=data.draw(st.sampled_from(["gaussian", "orthogonal"])),
        scale=data.draw(st.sampled_from(["norm_corrected", "none", "unbiased"])),
    )
    dim = data.draw(st.sampled_from([8, 16, 32, 64, 80, 96, 128]), "dim")
    heads, group = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 4), (2, 3), (3, 8)]), "heads")
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 30), "seed"))
    means = None
    spread = data.draw(st.sampled_from([0.0, 1.0, 20.0]), "spread of the means")
    if data.draw(st.booleans(), "centred"):
        means = (rng.standard_normal((1, heads, dim)) * spread).astype(np.float32)
    window = data.draw(st.sampled_from([0, SIZE, 2 * SIZE]), "window")
    dtype = data.draw(st.sampled_from(["float32", "float64"]))
    cache = cache_of(keys, head_dim=dim, heads=heads, means=means, window=window, accumulate=dtype)
    scale = 10.0 ** data.draw(st.integers(-6, 3), "scale")
    ids = [
        fill(cache, data.draw(st.integers(1, 90)), rng, scale, 0 if means is None else means[0])
        for _ in range(2)
    ]
    if data.draw(st.booleans(), "hole") and cache.state(ids[0]).ring_start >= 2 * SIZE:
        cache.evict(ids[0], [1])
    queries = rng.standard_normal((2, heads * group, dim)) * 10.0 ** data.draw(st.integers(-4, 4))
    if data.draw(st.booleans(), "aligned"):
        # A query along a stored key: the largest score there is, and signs that all agree.
        decoded, _, _ = cache.load(0, ids[1])
        queries[1] = np.repeat(decoded[0], group, axis=0)
    bounds, best = best_scores(cache, 0, queries.astype(np.float32), ids)
    assert bounds.values.shape == best.shape
    assert bounds.values.dtype == best.dtype
    assert (bounds.values >= best).all()


@pytest.mark.parametrize("estimator", ["mse", "prod"])
def test_bounds_hold_where_the_arithmetic_leaves_no_room(estimator):
    """Pages of one repeated key: the bound of a page is the score itself, but for rounding."""
    rng = np.random.default_rng(0)
    keys = TurboQuant(bits=3, estimator=estimator)
    for dim in (16, 128, 112):
        cache = cache_of(keys, head_dim=dim, heads=1)
        seqs = []
        for _ in range(6):
            seq = cache.open()
            key = np.repeat(rng.standard_normal((1, 1, 1, dim)), SIZE, axis=1).astype(np.float32)
            cache.append(seq, key, key)
            seqs.append(seq)
        queries = rng.standard_normal((6, 16, dim)).astype(np.float32)
        bounds, best = best_scores(cache, 0, queries, seqs)
        assert (bounds.values >= best).all()
        if estimator == "mse":
            # Tight: nothing but the rounding of the float16 bounds is added.
            norms = np.abs(queries).sum(axis=2).T * np.sqrt(dim)
            assert (bounds.values - best <= 2e-3 * norms).all()


@pytest.mark.parametrize("dim", [16, 112, 128])
def test_bounds_cover_what_the_sums_round(dim):
    """Norms of 1 make decoded keys exact in float16, so that only the order of the sum is left."""
    rng = np.random.default_rng(8)
    cache = cache_of(TurboQuant(bits=4), head_dim=dim, heads=1, accumulate="float64")
    seq = cache.open()
    keys = np.repeat(rng.standard_normal((1, 30, 1, dim)), SIZE, axis=1).astype(np.float32)
    cache.append(seq, keys, keys)
    backend, pages = cache.backend, cache.tables.block_table([seq])[0]
    backend.layout.plane_view(backend.pool, 0, "key_norms")[pages] = 1
    backend.write_bounds(0, pages)
    queries = rng.standard_normal((1, 16, dim)).astype(np.float32)
    bounds, best = best_scores(cache, 0, queries, [seq])
    assert (bounds.values >= best).all()
    assert (bounds.values - best <= 1e-12 * np.abs(queries).sum() * np.sqrt(dim)).all()


@pytest.mark.parametrize("scale", ["norm_corrected", "none", "unbiased"])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_bounds_of_the_largest_keys_that_can_be_stored_are_finite(bits, scale):
    """All of the norm in one rotated channel, or spread over all of them."""
    cache = cache_of(TurboQuant(bits=bits, scale=scale), head_dim=16, heads=1)
    rotated = np.zeros((SIZE, 1, 16))
    rotated[np.arange(SIZE), 0, np.arange(SIZE)] = 32700
    rotated[8:] = 32700 / 4
    keys = cache.backend.layers[0].codecs[0].rotation.inverse(rotated)[None].astype(np.float32)
    seq = cache.open()
    cache.append(seq, keys, keys)
    queries = np.random.default_rng(1).standard_normal((1, 4, 16)).astype(np.float32)
    queries[:, 0] = 0
    bounds, best = best_scores(cache, 0, queries, [seq])
    assert np.isfinite(bounds.values).all()
    assert (bounds.values >= best).all()


def test_bounds_separate_pages_whose_keys_differ():
    """Keys of each page around a direction of its own: a query along it finds its page first."""
    rng = np.random.default_rng(2)
    cache = cache_of(TurboQuant(bits=4), head_dim=64, heads=1)
    centres = rng.standard_normal((8, 64))
    keys = np.repeat(centres, SIZE, axis=0) + 0.3 * rng.standard_normal((8 * SIZE, 64))
    seq = cache.open()
    cache.append(seq, keys[None, :, None].astype(np.float32), np.ones((1, 128, 1, 64), np.float32))
    for page in range(8):
        query = centres[page].astype(np.float32)[None, None]
        assert int(np.argmax(cache.score_bounds(0, query, [seq]).values[0])) == page


def test_sinks_are_bounded_by_their_exact_scores():
    rng = np.random.default_rng(3)
    cache = cache_of(TurboQuant(bits=1), head_dim=32, heads=2, window=SIZE)
    seq = fill(cache, 80, rng)
    exact, _, _ = cache.load(0, seq)
    for token in range(4):
        queries = exact[token][None].astype(np.float32) * 7
        bounds, best = best_scores(cache, 0, queries, [seq])
        assert (bounds.values >= best).all()
        decoded, _, _ = cache.load(0, seq, exact=False)
        # The claim is about the exact sink: its codes alone score lower.
        own = np.einsum("hd,hd->h", queries[0].astype(float), decoded[token].astype(float))
        assert (bounds.values[:, 0] > own).all()


@pytest.mark.parametrize("window", [0, SIZE])
def test_only_blocks_wholly_in_codes_have_bounds(window):
    rng = np.random.default_rng(4)
    cache = cache_of(TurboQuant(), window=window)
    queries = rng.standard_normal((1, 2, 32)).astype(np.float32)
    for length in (1, 15, 16, 17, 47, 48, 64, 65):
        seq = fill(cache, length, rng)
        bounds = cache.score_bounds(0, queries, seq)
        assert bounds.blocks.tolist() == list(range(cache.state(seq).ring_start // SIZE))
        cache.close(seq)
    assert cache.score_bounds(0, queries[:0], []).values.shape == (2, 0)


def test_bounds_follow_a_page_that_is_cut_and_filled_again():
    rng = np.random.default_rng(5)
    for window in (0, SIZE):
        cache = cache_of(TurboQuant(bits=2), heads=1, window=window)
        seq = fill(cache, 40, rng)
        cache.truncate(seq, 20)
        shape = (1, 60, 1, 32)
        big = 50 * rng.standard_normal(shape).astype(np.float32)
        cache.append(seq, big, big)
        queries = rng.standard_normal((1, 16, 32)).astype(np.float32)
        bounds, best = best_scores(cache, 0, queries, [seq])
        assert bounds.blocks.size >= 3
        assert (bounds.values >= best).all()


def test_layers_without_bounds_are_refused_by_name():
    layers = (
        LayerOverride(layers=(1,), keys=Exact(), values=Exact()),
        LayerOverride(layers=(2,), keys=Polar(), values=Polar()),
    )
    cache = cache_of(TurboQuant(), num_layers=3, overrides=layers)
    seq = fill(cache, 40, np.random.default_rng(0))
    queries = np.ones((1, 2, 32), np.float32)
    assert cache.score_bounds(0, queries, seq).blocks.tolist() == [0, 1]
    with pytest.raises(UnsupportedError, match=r"layer 1 \(exact f16 keys\) keeps no bounds"):
        cache.score_bounds(1, queries, seq)
    with pytest.raises(UnsupportedError, match=r"layer 2 .*needs TurboQuant keys"):
        cache.score_bounds(2, queries, seq)
    with pytest.raises(ArgumentError, match="layer"):
        cache.score_bounds(3, queries, seq)
    plain = cache_of(TurboQuant(), key_bounds=False)
    seq = fill(plain, 40, np.random.default_rng(0))
    with pytest.raises(UnsupportedError, match="it needs key_bounds=True"):
        plain.score_bounds(0, queries, seq)


# -- norms -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys", [TurboQuant(bits=8), TurboQuant(bits=8, estimator="prod"), Polar()]
)
def test_norm_ratios_are_those_of_the_centred_vectors(keys):
    rng = np.random.default_rng(6)
    means = 5 * rng.standard_normal((1, 2, 32)).astype(np.float32)
    cache = cache_of(keys, means=means, key_bounds=False)
    shape = (1, 48, 2, 32)
    k = (rng.standard_normal(shape) * rng.uniform(0.1, 3, (1, 48, 2, 1)) + means[:, None]).astype(
        "f4"
    )
    v = (rng.standard_normal(shape) * rng.uniform(0.1, 3, (1, 48, 2, 1))).astype("f4")
    seq = cache.open()
    cache.append(seq, k, v)
    pages = cache.tables.block_table([seq])[0]
    got = cache.backend.norm_ratios(0, pages)
    lengths = np.linalg.norm(v[0], axis=2) / np.linalg.norm(k[0] - means, axis=2)
    want = lengths.reshape(3, SIZE, 2).mean(axis=1)
    # Up to one factor per stream, which orders nothing.
    ratio = got / want
    assert np.abs(ratio / ratio.mean() - 1).max() < 0.02


def test_norm_ratios_read_the_norm_planes_and_nothing_else():
    rng = np.random.default_rng(7)
    cache = cache_of(TurboQuant(), key_bounds=False)
    seq = fill(cache, 48, rng)
    pages = cache.tables.block_table([seq])[0]
    before = cache.backend.norm_ratios(0, pages)
    for name in cache.backend.layout.extents[0].planes:
        if not name.endswith("_norms"):
            cache.backend.layout.plane_view(cache.backend.pool, 0, name)[:] = 0
    assert np.array_equal(cache.backend.norm_ratios(0, pages), before)


def test_norm_ratios_of_zero_vectors_are_finite_and_of_exact_layers_refused():
    cache = cache_of(
        TurboQuant(),
        num_layers=2,
        key_bounds=False,
        overrides=(LayerOverride(layers=(1,), keys=TurboQuant(), values=Exact()),),
    )
    seq = cache.open()
    zeros = np.zeros((2, SIZE, 2, 32), np.float32)
    cache.append(seq, zeros, zeros)
    pages = cache.tables.block_table([seq])[0]
    assert cache.backend.norm_ratios(0, pages).tolist() == [[0, 0]]
    cache.append(seq, zeros, zeros + 1)
    assert np.isfinite(cache.backend.norm_ratios(0, cache.tables.block_table([seq])[0])).all()
    with pytest.raises(UnsupportedError, match="both streams must be coded"):
        cache.backend.norm_ratios(1, pages)
    with pytest.raises(ArgumentError, match="page ids"):
        cache.backend.norm_ratios(0, np.array([0]))
