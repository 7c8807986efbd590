"""What users of single-sequence KV-cache packages rely on, on one sequence of a paged cache.

The behaviours and their tolerances are those of two earlier single-sequence designs: TurboQuant
codes with sliding-window eviction, and exact shadows beside compressed streams.
"""

import itertools

import numpy as np
import pytest

from pagedtq import CacheConfig, Exact, KeepFirstLast, PagedKVCache, TurboQuant
from pagedtq.errors import ArgumentError, NonFiniteError, NotUnitNormError


def unit(count, dim, seed):
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def make(dim=64, heads=1, keys=None, values=None, **fields):
    plain = TurboQuant(bits=4, scale="none")
    config = CacheConfig(
        num_layers=1,
        num_kv_heads=heads,
        head_dim=dim,
        num_pages=32,
        page_size=16,
        window=0,
        keys=keys or plain,
        values=values or plain,
        kv_dtype="f32",
        **fields,
    )
    return PagedKVCache(config, accumulate="float64", debug=True)


def push(cache, seq, keys, values):
    cache.append(seq, keys[None, :, None], values[None, :, None])


def scores(cache, seq, query):
    return cache.score(0, query[None, None], seq).values[0]


def test_four_bit_scores_of_unit_vectors_are_within_a_fifth():
    cache = make()
    seq, keys, query = cache.open(), unit(8, 64, 1), unit(1, 64, 3)[0]
    push(cache, seq, keys, unit(8, 64, 2))
    assert np.abs(scores(cache, seq, query) - keys @ query).max() < 0.2


def test_reconstructed_values_have_a_small_error_per_coordinate():
    cache = make()
    seq, values = cache.open(), unit(4, 64, 2)
    push(cache, seq, unit(4, 64, 1), values)
    decoded = cache.load(0, seq)[1][:, 0]
    assert np.mean((decoded - values) ** 2, axis=1).max() < 0.1


@pytest.mark.parametrize("keys", [TurboQuant(scale="none"), TurboQuant(bits=3, estimator="prod")])
def test_bulk_and_incremental_appends_score_the_same_to_1e_10(keys):
    all_keys, all_values, query = unit(7, 64, 1), unit(7, 64, 2), unit(1, 64, 99)[0]
    results = []
    for cuts in ([0, 7], [0, 4, 7], list(range(8))):
        cache = make(keys=keys)
        seq = cache.open()
        for low, high in itertools.pairwise(cuts):
            push(cache, seq, all_keys[low:high], all_values[low:high])
        results.append(scores(cache, seq, query))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("keys", [TurboQuant(scale="none"), TurboQuant(bits=3, estimator="prod")])
@pytest.mark.parametrize(("total", "kept"), [(3, 2), (10, 3), (100, 40)])
def test_a_cache_that_dropped_its_oldest_tokens_equals_a_fresh_one_to_1e_10(keys, total, kept):
    all_keys, all_values, query = unit(total, 32, 1), unit(total, 32, 2), unit(1, 32, 99)[0]
    old, fresh = make(32, keys=keys), make(32, keys=keys)
    seq, other = old.open(), fresh.open()
    for index in range(total):
        push(old, seq, all_keys[index : index + 1], all_values[index : index + 1])
        old.evict(seq, KeepFirstLast(first_tokens=0, last_tokens=kept))
    push(fresh, other, all_keys[-kept:], all_values[-kept:])
    np.testing.assert_allclose(
        scores(old, seq, query), scores(fresh, other, query), rtol=0, atol=1e-10
    )
    for ours, theirs in zip(
        old.attend(0, query[None, None], seq), fresh.attend(0, query[None, None], other)
    ):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-10)


def test_an_empty_cache_has_no_scores_and_a_zero_output():
    cache = make()
    seq, query = cache.open(), unit(1, 64, 1)[0]
    assert scores(cache, seq, query).size == 0
    out, lse = cache.attend(0, query[None, None], seq)
    assert not out.any()
    assert np.isneginf(lse).all()


def test_appending_nothing_changes_nothing():
    cache = make()
    seq = cache.open()
    push(cache, seq, unit(2, 64, 1)[:0], unit(2, 64, 2)[:0])
    assert cache.length(seq) == 0
    push(cache, seq, unit(2, 64, 1), unit(2, 64, 2))
    push(cache, seq, unit(2, 64, 1)[:0], unit(2, 64, 2)[:0])
    assert cache.length(seq) == 2


def test_strict_mode_takes_unit_vectors_only_and_is_transactional():
    strict = TurboQuant(bits=4, scale="none", unit_norm=True)
    for kv_dtype in ("f32", "f16", "bf16"):
        config = CacheConfig(
            num_layers=1,
            num_kv_heads=1,
            head_dim=8,
            num_pages=8,
            page_size=16,
            window=0,
            keys=strict,
            values=strict,
            kv_dtype=kv_dtype,
        )
        cache = PagedKVCache(config)
        seq = cache.open()
        keys, values = unit(2, 8, 1), unit(2, 8, 2)
        values[1, 0] = 10.0
        with pytest.raises(NotUnitNormError) as error:
            push(cache, seq, keys, values)
        assert error.value.norm > 9
        assert cache.length(seq) == 0
        push(cache, seq, keys, unit(2, 8, 2))
        assert cache.length(seq) == 2


def test_keys_and_values_must_pair_up():
    cache = make()
    seq = cache.open()
    with pytest.raises(ArgumentError, match="values"):
        push(cache, seq, unit(3, 64, 1), unit(5, 64, 2))
    with pytest.raises(ArgumentError):
        push(cache, seq, unit(3, 32, 1), unit(3, 64, 2))
    bad = unit(3, 64, 1)
    bad[2, 63] = np.nan
    with pytest.raises(NonFiniteError):
        push(cache, seq, unit(3, 64, 1), bad)
    assert cache.length(seq) == 0


def test_the_key_most_like_the_query_ranks_first():
    rng = np.random.default_rng(5)
    cache = make(16, keys=TurboQuant(bits=8, scale="none"))
    seq = cache.open()
    keys = rng.standard_normal((10, 16)).astype(np.float32)
    query = 3 * rng.standard_normal(16).astype(np.float32)
    keys[9] = query + 0.001
    push(cache, seq, keys, keys)
    assert np.argmax(scores(cache, seq, query)) == 9


def test_attention_over_identical_values_returns_that_value():
    rng = np.random.default_rng(6)
    cache = make(16, values=TurboQuant(bits=8))
    seq = cache.open()
    value = rng.standard_normal(16).astype(np.float32)
    push(cache, seq, rng.standard_normal((5, 16)).astype(np.float32), np.tile(value, (5, 1)))
    out, _ = cache.attend(0, rng.standard_normal((1, 1, 16)).astype(np.float32), seq)
    assert np.linalg.norm(out - value) / np.linalg.norm(value) < 0.15


def test_keys_and_values_have_rotations_of_their_own():
    cache = make(64)
    seq = cache.open()
    vector = unit(1, 64, 7)
    push(cache, seq, vector, vector)
    keys, values, _ = cache.load(0, seq)
    assert np.abs(keys - values).max() > 1e-3


def test_an_exact_value_stream_decodes_bit_exactly():
    cache = make(64, values=Exact(dtype="f32"))
    seq, values = cache.open(), unit(20, 64, 8)
    push(cache, seq, unit(20, 64, 9), values)
    np.testing.assert_array_equal(cache.load(0, seq)[1][:, 0], values)


def test_heads_are_independent_and_reported_together():
    cache = make(32, heads=4)
    seq = cache.open()
    keys = np.stack([unit(6, 32, 100 + h) for h in range(4)], axis=1)
    values = np.stack([unit(6, 32, 200 + h) for h in range(4)], axis=1)
    cache.append(seq, keys[None], values[None])
    queries = np.stack([unit(1, 32, 300 + h)[0] for h in range(4)])[None]
    got = cache.score(0, queries, seq).values
    assert got.shape == (4, 6)
    for head in range(4):
        assert np.abs(got[head] - keys[:, head] @ queries[0, head]).max() < 0.3
    report = cache.memory_report()
    assert report.fp16_bytes == 6 * 4 * 2 * 32 * 2
    assert report.fp32_bytes == 2 * report.fp16_bytes


def test_a_compressed_cache_says_how_much_it_saves():
    cache = make(128, heads=8)
    seq = cache.open()
    rng = np.random.default_rng(1)
    cache.append(seq, *rng.standard_normal((2, 1, 160, 8, 128)).astype(np.float32))
    report = cache.memory_report()
    # 16 tokens of 132 bytes, padded to a multiple of 128: 136 bytes a token.
    assert report.payload_bytes_per_token == 8 * 132
    assert report.compression_vs_fp16 == pytest.approx(512 / 136, rel=1e-6)
    assert cache.stats().page_utilisation == 1.0
