"""The crate's own tests of its caches, with their tolerances, on this library's pages."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from pagedtq.compat.turboquant import (
    DimensionMismatch,
    InvalidDimension,
    KVCacheConfig,
    LengthMismatch,
    MultiHeadConfig,
    MultiHeadKVCache,
    NotUnitVector,
    QuantizedKVCache,
    QuantStrategy,
)

MSE, PROD = QuantStrategy.MSE, QuantStrategy.PROD


def unit(dim, count, seed):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_head(heads, dim, count, seed):
    return [unit(dim, count, seed + head) for head in range(heads)]


def single(dim=64, strategy=MSE, **fields):
    return QuantizedKVCache(KVCacheConfig(dim, key_strategy=strategy, **fields))


def multi(heads, dim, strategy=MSE, **fields):
    return MultiHeadKVCache(
        MultiHeadConfig(heads, KVCacheConfig(dim, key_strategy=strategy, **fields))
    )


def filled(cache, count, seed=1):
    cache.append(unit(cache.dim, count, seed), unit(cache.dim, count, seed + 1))
    return cache


def test_mse_scores_are_near_the_true_inner_products():
    cache = single()
    assert cache.num_tokens == 0
    keys, query = unit(64, 8, 1), unit(64, 1, 3)[0]
    cache.append(keys, unit(64, 8, 2))
    assert cache.num_tokens == 8
    scores = cache.attention_scores(query)
    assert scores.shape == (8,)
    assert np.abs(scores - keys @ query).max() < 0.2


def test_prod_gives_one_score_per_token():
    cache = filled(single(strategy=PROD, key_bits=3), 8, 10)
    assert cache.attention_scores(unit(64, 1, 30)[0]).shape == (8,)


def test_appends_add_up():
    cache = filled(single(), 4, 1)
    assert cache.num_tokens == 4
    assert filled(cache, 3, 3).num_tokens == 7


def test_attention_output_is_a_finite_vector():
    output = filled(single(), 8).attention_output(unit(64, 1, 3)[0], 0.0)
    assert output.shape == (64,)
    assert np.isfinite(output).all()


def test_stats_show_compression():
    stats = filled(single(128), 16).stats()
    assert (stats.num_tokens, stats.dim) == (16, 128)
    assert stats.compression_ratio > 1.0
    assert 0 < stats.total_bytes < stats.uncompressed_bytes


def test_clear_empties_the_cache():
    cache = filled(single(), 4)
    assert cache.num_tokens == 4
    cache.clear()
    assert cache.num_tokens == 0
    assert cache.attention_scores(unit(64, 1, 3)[0]).size == 0


def test_empty_cache_scores_nothing_and_attends_to_zeros():
    cache, query = single(), unit(64, 1, 1)[0]
    assert cache.attention_scores(query).size == 0
    output = cache.attention_output(query, 0.0)
    assert output.shape == (64,)
    assert not output.any()


def test_query_of_another_dimension_is_refused():
    with pytest.raises(DimensionMismatch, match="expected dimension 64, got 32"):
        filled(single(), 4).attention_scores(np.zeros(32))


def test_values_are_reconstructed_closely():
    cache, values = single(), unit(64, 4, 2)
    cache.append(unit(64, 4, 1), values)
    decoded = cache.reconstruct_values()
    assert decoded.shape == (4, 64)
    assert (np.mean((decoded - values) ** 2, axis=1) < 0.1).all()


def test_bulk_and_incremental_appends_score_alike():
    keys, values = unit(64, 7, 1), unit(64, 7, 2)
    bulk, pieces = single(), single()
    bulk.append(keys, values)
    pieces.append(keys[:4], values[:4])
    pieces.append(keys[4:], values[4:])
    query = unit(64, 1, 99)[0]
    difference = bulk.attention_scores(query) - pieces.attention_scores(query)
    assert difference.shape == (7,)
    assert np.abs(difference).max() < 1e-10


def test_appending_nothing_changes_nothing():
    cache = single()
    cache.append([], [])
    assert cache.num_tokens == 0
    filled(cache, 2).append([], [])
    assert cache.num_tokens == 2


def test_several_heads_score_each_with_its_query():
    cache = multi(4, 32)
    assert (cache.num_heads, cache.head_dim, cache.num_tokens) == (4, 32, 0)
    cache.append_all(by_head(4, 32, 6, 100), by_head(4, 32, 6, 200))
    assert cache.num_tokens == 6
    scores = cache.attention_scores_all([unit(32, 1, 300 + h)[0] for h in range(4)])
    assert [part.shape for part in scores] == [(6,)] * 4


def test_outputs_of_several_heads_join():
    cache = multi(2, 32)
    cache.append_all(by_head(2, 32, 4, 10), by_head(2, 32, 4, 20))
    outputs = cache.attention_output_all([unit(32, 1, 30 + h)[0] for h in range(2)], 0.0)
    assert [part.shape for part in outputs] == [(32,)] * 2
    assert all(np.isfinite(part).all() for part in outputs)
    joined = cache.concat_outputs(outputs)
    assert joined.shape == (64,)
    assert np.array_equal(joined, np.concatenate(outputs))


def test_stats_of_several_heads():
    cache = multi(4, 64)
    cache.append_all(by_head(4, 64, 8, 0), by_head(4, 64, 8, 100))
    stats = cache.stats()
    assert (stats.num_heads, stats.num_tokens, stats.head_dim) == (4, 8, 64)
    assert stats.compression_ratio > 1.0
    assert len(stats.head_stats) == 4


def test_several_heads_append_in_pieces():
    cache = multi(2, 32)
    cache.append_all(by_head(2, 32, 3, 0), by_head(2, 32, 3, 50))
    assert cache.num_tokens == 3
    cache.append_all(by_head(2, 32, 5, 100), by_head(2, 32, 5, 150))
    assert cache.num_tokens == 8


def test_clear_empties_all_heads():
    cache = multi(2, 32)
    cache.append_all(by_head(2, 32, 4, 0), by_head(2, 32, 4, 10))
    assert cache.num_tokens == 4
    cache.clear()
    assert cache.num_tokens == 0
    assert [cache.head(h).num_tokens for h in range(2)] == [0, 0]


def test_several_heads_score_with_prod():
    cache = multi(2, 64, PROD, key_bits=3)
    cache.append_all(by_head(2, 64, 4, 0), by_head(2, 64, 4, 10))
    scores = cache.attention_scores_all([unit(64, 1, 20 + h)[0] for h in range(2)])
    assert [part.shape for part in scores] == [(4,)] * 2


def test_tokens_can_be_pushed_one_by_one():
    cache = single()
    for key, value in zip(unit(64, 5, 1), unit(64, 5, 2)):
        cache.push_token(key, value)
    assert cache.num_tokens == 5
    assert cache.attention_scores(unit(64, 1, 99)[0]).shape == (5,)


def test_limit_holds_after_every_append():
    cache = single(max_tokens=5)
    assert cache.max_tokens == 5
    assert filled(cache, 5, 1).num_tokens == 5
    assert filled(cache, 3, 3).num_tokens == 5
    assert cache.attention_scores(unit(64, 1, 99)[0]).shape == (5,)


def test_limit_holds_token_by_token():
    cache = single(32, max_tokens=3)
    counts = []
    for key, value in zip(unit(32, 10, 1), unit(32, 10, 2)):
        cache.push_token(key, value)
        counts.append(cache.num_tokens)
    assert counts == [1, 2] + [3] * 8
    assert cache.reconstruct_values().shape == (3, 32)


def test_limit_holds_with_prod():
    cache = filled(single(strategy=PROD, key_bits=3, max_tokens=4), 6)
    assert cache.num_tokens == 4
    assert cache.attention_scores(unit(64, 1, 99)[0]).shape == (4,)


def test_limit_zero_keeps_all():
    assert filled(single(32, max_tokens=0), 100).num_tokens == 100


@pytest.mark.parametrize("short", ["key", "value"])
def test_pushed_token_of_another_dimension_is_refused(short):
    token = {"key": unit(64, 1, 1)[0], "value": unit(64, 1, 2)[0], short: np.zeros(32)}
    with pytest.raises(DimensionMismatch):
        single().push_token(**token)


def test_no_heads_are_refused():
    with pytest.raises(InvalidDimension):
        multi(0, 32)


def test_dimension_zero_is_refused():
    with pytest.raises(InvalidDimension):
        QuantizedKVCache(KVCacheConfig(0))


def test_keys_and_values_must_be_as_many():
    with pytest.raises(LengthMismatch, match="KV cache append key/value count: expected 3, got 5"):
        single().append(unit(64, 3, 1), unit(64, 5, 2))


def test_append_with_a_bad_value_changes_nothing():
    cache, values = single(8), unit(8, 2, 2)
    values[1, 0] = 10.0
    with pytest.raises(NotUnitVector):
        cache.append(unit(8, 2, 1), values)
    assert cache.num_tokens == 0
    assert cache.attention_scores(unit(8, 1, 3)[0]).size == 0


def test_keys_of_too_many_heads_are_refused():
    with pytest.raises(LengthMismatch):
        multi(2, 32).append_all(by_head(3, 32, 2, 0), by_head(2, 32, 2, 10))


def test_heads_must_get_equally_many_tokens():
    cache = multi(2, 32)
    with pytest.raises(LengthMismatch):
        cache.append_all([unit(32, 2, 1), unit(32, 3, 2)], [unit(32, 2, 3), unit(32, 3, 4)])
    assert cache.num_tokens == 0


@pytest.mark.parametrize("cache", [single(32), multi(2, 32)], ids=["single", "multi"])
def test_caches_describe_themselves(cache):
    assert repr(cache).startswith(f"{type(cache).__name__}(0 tokens")


def test_strategy_survives_json():
    for strategy in QuantStrategy:
        text = msgspec.json.encode(strategy)
        assert msgspec.json.decode(text, type=QuantStrategy) is strategy
    assert msgspec.json.encode(PROD) == b'"Prod"'


def test_heads_are_found_by_index():
    cache = multi(4, 32)
    assert isinstance(cache.head(0), QuantizedKVCache)
    assert cache.head(3) is not None
    assert cache.head(4) is None
    assert cache.head(-1) is None


def test_full_cache_equals_a_fresh_one_of_the_newest_tokens():
    keys, values = unit(32, 3, 1), unit(32, 3, 2)
    cache, fresh = single(32, max_tokens=2), single(32)
    for key, value in zip(keys, values):
        cache.push_token(key, value)
    assert cache.num_tokens == 2
    fresh.append(keys[1:], values[1:])
    query = unit(32, 1, 99)[0]
    assert np.abs(cache.attention_scores(query) - fresh.attention_scores(query)).max() < 1e-10
