"""Attention and scores over pages against float64 on the decoded vectors."""

import itertools
import warnings

import numpy as np
import pytest

from pagedtq import CacheConfig, Exact, KeepFirstLast, LayerOverride, PagedKVCache, TurboQuant
from pagedtq.backends.states import merge_states
from pagedtq.codec import DenseRotationWarning
from pagedtq.config import PRESETS
from tests.reference import relative_error, scores, softmax_attention

HEADS = 2
FORMATS = ("k4v4", "k3v3", "k2v2", "k8v4", "prod4v4", "exact", "wide", "narrow")
CODECS = {
    **PRESETS,
    "wide": (TurboQuant(bits=5, scale="unbiased"), TurboQuant(bits=6)),
    "narrow": (TurboQuant(bits=1, scale="none"), TurboQuant(bits=7, rotation="dense")),
}


def make_cache(name="k4v4", *, page_size=16, window=0, head_dim=64, means=None, **options):
    keys, values = CODECS[name]
    fields = {"num_layers": 1, "num_kv_heads": HEADS, "num_pages": 64, "num_window_slots": 8}
    fields |= {k: options.pop(k) for k in list(options) if k in CacheConfig.__struct_fields__}
    config = CacheConfig(
        keys=keys, values=values, head_dim=head_dim, page_size=page_size, window=window, **fields
    )
    return PagedKVCache(config, key_means=means, debug=True, num_threads=1, **options)


def fill(cache, lengths, rng, *, mean=0.0, scale=1.0, chunks=3):
    """Open one sequence per length and append random tokens in a few uneven chunks."""
    config = cache.config
    ids = []
    for length in lengths:
        shape = (config.num_layers, length, config.num_kv_heads, config.head_dim)
        keys = (rng.standard_normal(shape) * scale + mean).astype(np.float32)
        values = rng.standard_normal(shape).astype(np.float32)
        ids.append(cache.open())
        cuts = np.unique(np.r_[0, rng.integers(0, length + 1, chunks - 1), length])
        for low, high in itertools.pairwise(cuts.tolist()):
            cache.append(ids[-1], keys[:, low:high], values[:, low:high])
    return ids


def check(cache, ids, q_lens, rng, *, group=2, bound=1e-5, logit_std=None, **options):
    """Compare `attend` with float64 over what `load` returns, for every sequence."""
    config = cache.config
    queries = rng.standard_normal((sum(q_lens), HEADS * group, config.head_dim))
    queries = queries.astype(np.float32)
    sm_scale = config.head_dim**-0.5 if logit_std is None else logit_std * config.head_dim**-0.5
    window_left = options.get("window_left")
    for layer in range(config.num_layers):
        out, lse = cache.attend(layer, queries, ids, q_lens, sm_scale, **options)
        at = 0
        for seq, count in zip(ids, q_lens):
            keys, values, positions = cache.load(layer, seq)
            length = cache.length(seq)
            query_positions = np.arange(length - count, length)
            floor = None if window_left is None else query_positions - window_left
            part = slice(at, at + count)
            want, want_lse = softmax_attention(
                queries[part],
                keys,
                values,
                positions,
                query_positions,
                sm_scale,
                soft_cap=options.get("soft_cap"),
                floor=floor,
            )
            sink = options.get("sink_logits")
            if sink is not None:
                total = np.logaddexp(want_lse, np.asarray(sink, np.float64))
                want, want_lse = want * np.exp(want_lse - total)[..., None], total
            assert relative_error(out[part], want) <= bound
            np.testing.assert_allclose(lse[part], want_lse, rtol=bound, atol=20 * bound)
            at += count
    return queries


@pytest.mark.parametrize("window", [0, 1, 2], ids=["window0", "windowP", "window2P"])
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("name", FORMATS)
def test_attend_equals_float64_on_the_decoded_vectors(name, page_size, window):
    rng = np.random.default_rng(1)
    cache = make_cache(name, page_size=page_size, window=window * page_size)
    lengths = [1, page_size - 1, page_size, page_size + 1, 3 * page_size + 5]
    ids = fill(cache, lengths, rng)
    check(cache, ids, [1] * 5, rng)
    check(cache, ids, [1, 2, 5, page_size + 1, 7], rng)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 16])
def test_every_group_size_attends_right(group):
    rng = np.random.default_rng(2)
    cache = make_cache(window=None)
    ids = fill(cache, [40, 70, 3], rng)
    check(cache, ids, [1, 3, 2], rng, group=group)


@pytest.mark.parametrize("head_dim", [5, 64, 80, 96, 112, 128, 160, 192, 256])
def test_every_head_dim_attends_right(head_dim):
    rng = np.random.default_rng(3)
    with warnings.catch_warnings():
        # 5 has no fast transform; the codec says so once per process.
        warnings.simplefilter("ignore", DenseRotationWarning)
        cache = make_cache("k3v3", head_dim=head_dim, window=None)
    check(cache, fill(cache, [37, 50], rng), [1, 4], rng)


@pytest.mark.parametrize("logit_std", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("window", [0, None])
def test_sharp_softmaxes_stay_within_1e_5(logit_std, window):
    rng = np.random.default_rng(4)
    cache = make_cache("k4v4", window=window, head_dim=128, page_size=64)
    check(cache, fill(cache, [700, 130], rng), [1, 2], rng, logit_std=logit_std)


@pytest.mark.parametrize("window", [0, None])
def test_key_norms_of_800_stay_within_1e_4(window):
    rng = np.random.default_rng(5)
    cache = make_cache("k4v4", window=window, head_dim=128, page_size=64)
    ids = fill(cache, [300, 200], rng, scale=800 / 128**0.5)
    check(cache, ids, [1, 2], rng, bound=1e-4)


@pytest.mark.parametrize("offset", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize("soft_cap", [None, 30.0])
@pytest.mark.parametrize("name", ["k4v4", "prod4v4"])
def test_a_key_mean_of_20_times_the_spread_weighs_ring_and_body_alike(name, soft_cap, offset):
    rng = np.random.default_rng(6)
    mean = 20 * rng.standard_normal((1, HEADS, 64)).astype(np.float32)
    for window in (0, 16, 32):
        cache = make_cache(name, window=window, means=mean)
        lengths = [window + 16 + offset, 16 + offset, 48 + offset]
        ids = fill(cache, lengths, rng, mean=mean[:, None])
        check(cache, ids, [1, 2, 3], rng, bound=5e-5, soft_cap=soft_cap)


def test_key_means_change_no_softmax_but_are_part_of_scores_and_lse():
    rng = np.random.default_rng(7)
    mean = 3 * rng.standard_normal((1, HEADS, 64)).astype(np.float32)
    keys = rng.standard_normal((1, 50, HEADS, 64)).astype(np.float32) + mean[:, None]
    values = rng.standard_normal((1, 50, HEADS, 64)).astype(np.float32)
    query = rng.standard_normal((1, 4, 64)).astype(np.float32)
    exact, exact_lse = softmax_attention(
        query, keys[0], values[0], np.arange(50), np.array([49]), 0.125
    )
    errors = {}
    for means in (None, mean):
        cache = make_cache(means=means)
        seq = cache.open()
        cache.append(seq, keys, values)
        out, lse = cache.attend(0, query, seq)
        score_error = relative_error(cache.score(0, query, seq).values, scores(query[0], keys[0]))
        errors[means is None] = (
            relative_error(out, exact),
            np.abs(lse - exact_lse).max(),
            score_error,
        )
    # Coding what varies, and not the offset, leaves a smaller error everywhere.
    assert all(centred < plain for centred, plain in zip(errors[False], errors[True]))
    assert errors[False][2] < 0.1


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("window", [0, None])
def test_soft_cap_and_learned_sinks(window, soft_cap):
    rng = np.random.default_rng(8)
    cache = make_cache(window=window)
    ids = fill(cache, [100, 10], rng)
    sinks = rng.standard_normal(4).astype(np.float32)
    check(cache, ids, [1, 3], rng, soft_cap=soft_cap, sink_logits=sinks)


@pytest.mark.parametrize("window_left", [0, 3, 17, 40, 1000])
@pytest.mark.parametrize("window", [0, 16, 32])
def test_sliding_window_layers_read_only_what_their_model_reads(window, window_left):
    rng = np.random.default_rng(9)
    cache = make_cache(window=window)
    ids = fill(cache, [100, 10, 33], rng)
    check(cache, ids, [1, 3, 20], rng, window_left=window_left)


@pytest.mark.parametrize("window", [0, 16, 32])
@pytest.mark.parametrize("name", ["k4v4", "exact"])
def test_a_chunk_passed_along_is_read_exactly(name, window):
    rng = np.random.default_rng(10)
    cache = make_cache(name, window=window, kv_dtype="f32")
    lengths, q_lens = [60, 9, 33], [21, 9, 1]
    ids, raw = [], []
    for length, count in zip(lengths, q_lens):
        keys, values = rng.standard_normal((2, 1, length, HEADS, 64)).astype(np.float32)
        ids.append(cache.open())
        cache.append(ids[-1], keys, values)
        raw.append((keys[0, -count:], values[0, -count:]))
    queries = rng.standard_normal((sum(q_lens), 4, 64)).astype(np.float32)
    own_keys, own_values = (np.concatenate(parts) for parts in zip(*raw))
    out, lse = cache.attend(0, queries, ids, q_lens, keys=own_keys, values=own_values)
    at = 0
    for seq, length, count, (own_k, own_v) in zip(ids, lengths, q_lens, raw):
        keys, values, positions = cache.load(0, seq)
        keys[-count:], values[-count:] = own_k, own_v
        part = slice(at, at + count)
        want, want_lse = softmax_attention(
            queries[part], keys, values, positions, np.arange(length - count, length), 0.125
        )
        assert relative_error(out[part], want) <= 1e-5
        np.testing.assert_allclose(lse[part], want_lse, atol=1e-4)
        at += count


@pytest.mark.parametrize("window", [0, 16])
def test_scores_are_true_inner_products_at_the_right_positions(window):
    rng = np.random.default_rng(11)
    mean = rng.standard_normal((1, HEADS, 64)).astype(np.float32)
    for name in FORMATS:
        cache = make_cache(name, window=window, means=mean, num_pages=128)
        ids = fill(cache, [1, 15, 80, 33], rng)
        cache.evict(ids[2], KeepFirstLast(first_tokens=3, last_tokens=20))
        queries = rng.standard_normal((4, 6, 64)).astype(np.float32)
        result = cache.score(0, queries, ids)
        for index, seq in enumerate(ids):
            values, at = result.of(index)
            keys, _, positions = cache.load(0, seq)
            np.testing.assert_array_equal(at, positions)
            assert relative_error(values, scores(queries[index], keys)) <= 1e-5


def test_page_stats_are_the_maximum_and_mass_of_each_page():
    rng = np.random.default_rng(12)
    cache = make_cache(window=0)
    ids = fill(cache, [40, 16, 5], rng)
    ids.insert(1, cache.open())
    queries = rng.standard_normal((4, 4, 64)).astype(np.float32)
    result = cache.score(0, queries, ids)
    stats = cache.page_stats(result)
    np.testing.assert_array_equal(np.diff(stats.indptr), [3, 0, 1, 1])
    np.testing.assert_array_equal(stats.blocks, [0, 1, 2, 0, 0])
    for index in (0, 2, 3):
        values, positions = result.of(index)
        part = slice(*stats.indptr[index : index + 2])
        for column, block in zip(range(part.start, part.stop), stats.blocks[part]):
            inside = values[:, positions // 16 == block]
            np.testing.assert_array_equal(stats.maximum[:, column], inside.max(axis=1))
            mass = np.exp(inside - values.max(axis=1, keepdims=True)).sum(axis=1)
            np.testing.assert_allclose(stats.mass[:, column], mass, rtol=1e-6)


@pytest.mark.parametrize("window", [0, 16])
def test_nothing_resident_gives_minus_infinity_and_zero_and_merges_without_nan(window):
    cache = make_cache(window=window)
    empty, other = cache.open(), cache.open()
    rng = np.random.default_rng(13)
    cache.append(other, *rng.standard_normal((2, 1, 5, HEADS, 64)).astype(np.float32))
    queries = rng.standard_normal((2, 4, 64)).astype(np.float32)
    out, lse = cache.attend(0, queries, [empty, other])
    assert np.isneginf(lse[0]).all()
    assert not out[0].any()
    assert np.isfinite(lse[1]).all()
    merged, total = merge_states((out, out), (lse, lse))
    np.testing.assert_allclose(merged, out, rtol=1e-6)
    np.testing.assert_allclose(total[1], lse[1] + np.log(2), rtol=1e-6)
    assert np.isneginf(total[0]).all()
    assert cache.score(0, queries, [empty, other]).indptr.tolist() == [0, 0, 5]


@pytest.mark.parametrize("window", [0, 16])
def test_zero_vectors_attend_and_decode_to_zero(window):
    cache = make_cache(window=window)
    seq = cache.open()
    zeros = np.zeros((1, 40, HEADS, 64), np.float32)
    cache.append(seq, zeros, zeros)
    out, lse = cache.attend(0, np.ones((1, 4, 64), np.float32), seq)
    assert not out.any()
    np.testing.assert_allclose(lse, np.log(40), rtol=1e-6)
    keys, values, _ = cache.load(0, seq)
    assert not keys.any()
    assert not values.any()


@pytest.mark.parametrize("window", [0, 64])
def test_value_norms_from_a_thousandth_to_a_thousand(window):
    rng = np.random.default_rng(14)
    cache = make_cache(window=window, page_size=64, head_dim=128)
    seq = cache.open()
    shape = (1, 400, HEADS, 128)
    values = rng.standard_normal(shape)
    values *= 10 ** rng.uniform(-3, 3, (1, 400, HEADS, 1)) / np.linalg.norm(
        values, axis=-1, keepdims=True
    )
    keys = rng.standard_normal(shape).astype(np.float32)
    cache.append(seq, keys, values.astype(np.float32))
    check(cache, [seq], [2], rng)
    decoded = cache.load(0, seq)[1]
    error = np.linalg.norm(decoded - values[0], axis=-1) / np.linalg.norm(values[0], axis=-1)
    assert error.max() < 0.2


@pytest.mark.parametrize("window", [0, 64])
def test_a_long_tail_under_one_dominant_token_is_not_lost(window):
    # One token with 99 % of the mass before 32 k others that share a common value direction:
    # their small weights must add up.
    rng = np.random.default_rng(15)
    length = 32_768
    cache = make_cache(window=window, page_size=64, head_dim=64, num_pages=600)
    seq = cache.open()
    query = np.zeros((1, 4, 64), np.float32)
    query[..., 0] = 8.0
    keys = 0.05 * rng.standard_normal((1, length, HEADS, 64)).astype(np.float32)
    keys[0, 0, :, 0] = np.log(99 * length) + 0.1
    values = 0.1 * rng.standard_normal((1, length, HEADS, 64)).astype(np.float32)
    values[..., 1] += 1.0
    values[0, 0] = 0
    cache.append(seq, keys, values)
    out, _ = cache.attend(0, query, seq)
    loaded_keys, loaded_values, positions = cache.load(0, seq)
    want, _ = softmax_attention(
        query, loaded_keys, loaded_values, positions, np.array([length - 1]), 0.125
    )
    assert relative_error(out, want) <= 1e-5
    assert 0.002 < out[..., 1].mean() < 0.05


def test_float64_accumulation_is_a_reference():
    rng = np.random.default_rng(16)
    for name in FORMATS:
        cache = make_cache(name, window=16, accumulate="float64")
        ids = fill(cache, [60, 7], rng)
        assert cache.attend(0, np.ones((2, 4, 64), np.float32), ids)[0].dtype == np.float64
        check(cache, ids, [1, 2], rng, bound=1e-12)


def test_positions_outside_the_read_ranges_are_never_read():
    rng = np.random.default_rng(17)
    for window, name in itertools.product((0, 16), ("k4v4", "exact", "prod4v4")):
        cache = make_cache(name, window=window)
        seq = fill(cache, [100], rng)[0]
        cache.evict(seq, KeepFirstLast(first_tokens=5, last_tokens=30))
        _, _, positions = cache.load(0, seq)
        np.testing.assert_array_equal(positions, np.r_[0:5, 70:100])
        # Poison every stored norm (exact: every element) that is not to be read.
        layout, pool = cache.backend.layout, cache.backend.pool
        for plane in layout.extents[0].planes:
            if plane.endswith("_norms") or plane in ("keys", "values"):
                view = layout.plane_view(pool, 0, plane)
                keep = view[..., :].copy()
                view[:] = np.nan
                for slot in cache.tables.slots_of(seq, positions):
                    page, offset = divmod(int(slot), 16)
                    view[page, :, offset] = keep[page, :, offset]
        check(cache, [seq], [1], rng)
        check(cache, [seq], [4], rng)


def test_holes_from_eviction_are_skipped():
    rng = np.random.default_rng(18)
    for window in (0, 16, 32):
        cache = make_cache(window=window)
        seq = fill(cache, [170], rng)[0]
        cache.evict(seq, [1, 4, 5])
        positions = cache.load(0, seq)[2]
        np.testing.assert_array_equal(positions, np.r_[0:16, 32:64, 96:170])
        check(cache, [seq], [1], rng)
        cache.evict(seq, [0])
        check(cache, [seq], [3], rng)


def test_layers_may_differ_in_codec():
    rng = np.random.default_rng(19)
    exact = LayerOverride(layers=(0, -1), keys=Exact(), values=Exact())
    mixed = LayerOverride(layers=(1,), keys=Exact(dtype="f32"), values=TurboQuant(bits=2))
    for window in (0, 16):
        cache = make_cache(window=window, num_layers=4, overrides=(exact, mixed))
        ids = fill(cache, [50, 20, 3], rng)
        check(cache, ids, [2, 1, 3], rng)


def test_batch_of_one_and_batch_of_many_agree():
    rng = np.random.default_rng(20)
    cache = make_cache(window=16)
    ids = fill(cache, [50, 20, 90], rng)
    queries = rng.standard_normal((3, 4, 64)).astype(np.float32)
    out, lse = cache.attend(0, queries, ids)
    for index, seq in enumerate(ids):
        alone, alone_lse = cache.attend(0, queries[index : index + 1], seq)
        np.testing.assert_allclose(out[index : index + 1], alone, rtol=0, atol=1e-6)
        np.testing.assert_allclose(lse[index : index + 1], alone_lse, rtol=0, atol=1e-5)


def test_threads_do_not_change_what_attend_returns():
    rng = np.random.default_rng(21)
    cache = make_cache(window=64, page_size=64, head_dim=128, num_pages=200)
    seq = fill(cache, [5000], rng)[0]
    queries = rng.standard_normal((1, 8, 128)).astype(np.float32)
    one = cache.attend(0, queries, seq)
    cache.backend.workers.num_threads = 2
    two = cache.attend(0, queries, seq)
    np.testing.assert_array_equal(one[0], two[0])
    np.testing.assert_array_equal(one[1], two[1])
