"""`compat.turboquant` beyond the crate's own tests: every rule it states, and its pages."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedtq.codec import TurboQuantCodec, codebook
from pagedtq.compat.turboquant import (
    CacheStats,
    DimensionMismatch,
    InvalidBitWidth,
    InvalidDimension,
    InvalidValue,
    KVCacheConfig,
    LengthMismatch,
    MultiHeadCacheStats,
    MultiHeadConfig,
    MultiHeadKVCache,
    NotUnitVector,
    QuantizedKVCache,
    QuantStrategy,
    TurboQuantError,
)
from pagedtq.config import TurboQuant
from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConfigError,
    NonFiniteError,
    NotUnitNormError,
    PagedTQError,
    UnsupportedError,
)

MSE, PROD = QuantStrategy.MSE, QuantStrategy.PROD
TOP = (1 << 64) - 1


def unit(dim, count, seed):
    rows = np.random.default_rng(seed).standard_normal((count, dim))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cache_of(dim=32, **fields):
    return QuantizedKVCache(KVCacheConfig(dim, **fields))


def filled(cache, count, seed=1):
    cache.append(unit(cache.dim, count, seed), unit(cache.dim, count, seed + 1000))
    return cache


# -- configuration --------------------------------------------------------------------------------


def test_defaults_are_the_crates():
    config = KVCacheConfig(64)
    assert (config.key_bits, config.value_bits, config.key_strategy) == (4, 4, PROD)
    assert (config.seed, config.max_tokens) == (42, 0)


def test_builders_change_one_field_of_a_copy():
    config = KVCacheConfig(64)
    built = (
        config.with_key_bits(3)
        .with_value_bits(2)
        .with_key_strategy(MSE)
        .with_seed(7)
        .with_max_tokens(9)
    )
    assert built == KVCacheConfig(64, 3, 2, MSE, 7, 9)
    assert config == KVCacheConfig(64)


def test_configurations_and_stats_survive_json():
    config = MultiHeadConfig(2, KVCacheConfig(32, key_bits=3, seed=TOP))
    assert msgspec.json.decode(msgspec.json.encode(config), type=MultiHeadConfig) == config
    stats = MultiHeadKVCache(config).stats()
    assert msgspec.json.decode(msgspec.json.encode(stats), type=MultiHeadCacheStats) == stats


@pytest.mark.parametrize("kind", [KVCacheConfig, MultiHeadConfig, CacheStats, MultiHeadCacheStats])
def test_schema_names_every_field(kind):
    properties = msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
    assert set(properties) == set(kind.__struct_fields__)


@pytest.mark.parametrize("dim", [0, 1, 2, -3, 5000, 64.0])
def test_dimension_out_of_range_is_refused(dim):
    with pytest.raises(InvalidDimension, match="expected a dimension from 3 to 4096") as caught:
        cache_of(dim)
    assert caught.value.dim == dim


def test_smallest_and_odd_dimensions_work():
    for dim in (3, 7, 10):
        cache = filled(cache_of(dim), 5)
        assert cache.attention_output(unit(dim, 1, 9)[0], 1.0).shape == (dim,)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"value_bits": 0}, "value_bits must be between 1 and 8, got 0"),
        ({"value_bits": 9}, "value_bits must be between 1 and 8, got 9"),
        ({"key_bits": 9}, "key_bits must be between 2 and 8, got 9"),
        ({"key_bits": 1}, "key_bits must be between 2 and 8, got 1"),
        ({"key_bits": 0, "key_strategy": MSE}, "key_bits must be between 1 and 8, got 0"),
        # The value quantiser is made first, so its fault is found first.
        ({"key_bits": 0, "value_bits": 0}, "value_bits must be"),
    ],
)
def test_bit_width_out_of_range_is_refused(fields, message):
    with pytest.raises(InvalidBitWidth, match=message):
        cache_of(64, **fields)


def test_one_bit_is_enough_for_mse():
    assert filled(cache_of(key_bits=1, value_bits=1, key_strategy=MSE), 3).num_tokens == 3


@pytest.mark.parametrize("fields", [{"seed": -1}, {"seed": TOP + 1}, {"max_tokens": -1}])
def test_seed_and_limit_out_of_range_are_refused(fields):
    with pytest.raises(ConfigError):
        cache_of(**fields)
    with pytest.raises(ConfigError):
        MultiHeadKVCache(MultiHeadConfig(2, KVCacheConfig(32, **fields)))


@pytest.mark.parametrize("strategy", ["Prod", None, 1])
def test_strategy_of_another_type_is_refused(strategy):
    with pytest.raises(ArgumentTypeError, match="key_strategy must be QuantStrategy"):
        cache_of(key_strategy=strategy)


@pytest.mark.parametrize("cache", [QuantizedKVCache, MultiHeadKVCache])
def test_what_is_no_configuration_is_refused_by_type(cache):
    with pytest.raises(ArgumentTypeError, match="config must be"):
        cache(None)
    with pytest.raises(ArgumentTypeError, match="config must be KVCacheConfig"):
        MultiHeadKVCache(MultiHeadConfig(2, 64))


# -- seeds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [42, TOP - 1, TOP])
def test_values_are_coded_with_the_seed_plus_two(seed):
    cache, values = cache_of(seed=seed), unit(32, 6, 3)
    cache.append(unit(32, 6, 2), values)
    codec = TurboQuantCodec(
        TurboQuant(scale="none"), 32, 1, seed=(seed + 2) % 2**64, stream="value"
    )
    encoded = codec.encode(values[:, None].astype(np.float32))
    assert (
        np.abs(cache.reconstruct_values() - codec.decode(encoded, np.float64)[:, 0]).max() < 1e-12
    )


def test_keys_are_coded_with_the_seed_itself():
    cache, keys = cache_of(seed=5, key_bits=3), unit(32, 6, 3)
    cache.append(keys, unit(32, 6, 2))
    codec = TurboQuantCodec(TurboQuant(bits=3, estimator="prod"), 32, 1, seed=5)
    encoded = codec.encode(keys[:, None].astype(np.float32))
    assert np.abs(cache.reconstruct_keys() - codec.decode(encoded, np.float64)[:, 0]).max() < 1e-12


@pytest.mark.parametrize("seed", [42, TOP - 1500])
def test_head_h_is_a_single_cache_with_the_seed_plus_thousand_h(seed):
    multi = MultiHeadKVCache(MultiHeadConfig(3, KVCacheConfig(32, seed=seed)))
    keys, values = unit(32, 5, 1), unit(32, 5, 2)
    multi.append_all([keys] * 3, [values] * 3)
    for head in range(3):
        alone = cache_of(seed=(seed + 1000 * head) % 2**64)
        alone.append(keys, values)
        assert np.array_equal(multi.head(head).reconstruct_keys(), alone.reconstruct_keys())
        assert np.array_equal(multi.reconstruct_values_all()[head], alone.reconstruct_values())
    first, second, _ = multi.reconstruct_keys_all()
    assert not np.array_equal(first, second)


# -- checks of an append --------------------------------------------------------------------------


def test_nothing_is_appended_without_keys_whatever_the_values():
    cache = cache_of()
    cache.append([], unit(32, 3, 1))
    cache.append(np.zeros((0, 7)), [])
    assert cache.num_tokens == 0


def bad(rows, index, kind):
    rows = list(rows)
    rows[index] = {
        "short": rows[index][:-1],
        "long": rows[index] * 2,
        "zero": rows[index] * 0,
        "nan": np.full_like(rows[index], math.nan),
        "inf": rows[index] + math.inf,
    }[kind]
    return rows


@pytest.mark.parametrize(
    ("faults", "error"),
    [
        ({("key", 0): "short"}, DimensionMismatch),
        ({("key", 1): "long"}, NotUnitVector),
        ({("key", 1): "zero"}, NotUnitVector),
        ({("key", 1): "nan"}, InvalidValue),
        ({("key", 1): "inf"}, InvalidValue),
        ({("value", 1): "long"}, NotUnitVector),
        ({("value", 2): "nan"}, InvalidValue),
        ({("value", 2): "short"}, DimensionMismatch),
        # One vector after the other, its length before its norm, all keys before all values.
        ({("key", 0): "long", ("key", 1): "short"}, NotUnitVector),
        ({("key", 0): "nan", ("key", 1): "long"}, InvalidValue),
        ({("key", 1): "short", ("key", 2): "nan"}, DimensionMismatch),
        ({("key", 2): "nan", ("value", 0): "short"}, InvalidValue),
    ],
)
@pytest.mark.parametrize("heads", [1, 2])
def test_first_fault_decides_and_nothing_changes(faults, error, heads):
    streams = {"key": unit(32, 3, 1), "value": unit(32, 3, 2)}
    for (stream, index), kind in faults.items():
        streams[stream] = bad(streams[stream], index, kind)
    if heads == 1:
        cache = filled(cache_of(), 2)
        before = cache.reconstruct_keys()
        with pytest.raises(error):
            cache.append(streams["key"], streams["value"])
        assert np.array_equal(cache.reconstruct_keys(), before)
        return
    multi = MultiHeadKVCache(MultiHeadConfig(2, KVCacheConfig(32)))
    multi.append_all([unit(32, 2, 5)] * 2, [unit(32, 2, 6)] * 2)
    before = multi.reconstruct_keys_all()
    good = unit(32, 3, 7)
    with pytest.raises(error):
        multi.append_all([good, streams["key"]], [good, streams["value"]])
    assert all(map(np.array_equal, multi.reconstruct_keys_all(), before))


def test_counts_are_compared_before_any_vector_is_looked_at():
    with pytest.raises(LengthMismatch) as caught:
        cache_of().append([[1.0]], [])
    assert (caught.value.expected, caught.value.got) == (1, 0)
    assert caught.value.context == "KV cache append key/value count"


def test_norms_are_checked_to_one_part_in_a_hundred_thousand():
    cache, rows = cache_of(), unit(32, 1, 1)
    cache.append(rows * (1 + 9e-6), rows * (1 - 9e-6))
    with pytest.raises(NotUnitVector) as caught:
        cache.append(rows * (1 + 2e-5), rows)
    assert caught.value.norm == pytest.approx(1 + 2e-5, abs=1e-9)
    assert cache.num_tokens == 1


def test_pushed_token_is_checked_for_both_lengths_before_any_norm():
    with pytest.raises(DimensionMismatch):
        cache_of().push_token(np.full(32, math.nan), np.zeros(31))


@pytest.mark.parametrize("what", [None, 3, ["a"], [[[1.0]]], [[1j] * 32]])
def test_what_is_no_list_of_vectors_is_refused_by_type(what):
    with pytest.raises(ArgumentTypeError):
        cache_of().append(what, what)


def test_lists_arrays_and_narrow_types_are_taken_alike():
    keys, values = unit(32, 3, 1).astype(np.float32), unit(32, 3, 2).astype(np.float32)
    results = []
    for make in (lambda a: a, lambda a: a.tolist(), list, lambda a: a.astype(np.float64)):
        cache = cache_of()
        cache.append(make(keys), make(values))
        results.append(cache.reconstruct_keys())
    assert all(np.array_equal(results[0], other) for other in results[1:])


def test_multi_head_counts_are_checked_in_order():
    cache = MultiHeadKVCache(MultiHeadConfig(2, KVCacheConfig(32)))
    a, b = unit(32, 2, 1), unit(32, 3, 2)
    for keys, values, context in (
        ([a], [a], "multi-head key head count"),
        ([a, a], [a], "multi-head value head count"),
        ([a, b], [b, a], "multi-head key token count for head 1"),
        ([a, a], [b, a], "multi-head value token count for head 0"),
        ([a, a], [a, b], "multi-head value token count for head 1"),
    ):
        with pytest.raises(LengthMismatch) as caught:
            cache.append_all(keys, values)
        assert caught.value.context == context
    cache.append_all([[], []], [[], []])
    assert cache.num_tokens == 0


def test_heads_of_a_multi_head_cache_cannot_change_alone():
    head = MultiHeadKVCache(MultiHeadConfig(2, KVCacheConfig(32))).head(1)
    row = unit(32, 1, 1)
    for change in (
        lambda: head.append(row, row),
        lambda: head.push_token(row[0], row[0]),
        head.clear,
    ):
        with pytest.raises(UnsupportedError, match="heads change together"):
            change()


def test_queries_of_several_heads_must_be_as_many():
    cache = MultiHeadKVCache(MultiHeadConfig(2, KVCacheConfig(32)))
    for read in (cache.attention_scores_all, lambda q: cache.attention_output_all(q, 1.0)):
        with pytest.raises(DimensionMismatch, match="expected dimension 2, got 3"):
            read(unit(32, 3, 1))


def test_outputs_to_join_must_fit():
    cache = MultiHeadKVCache(MultiHeadConfig(2, KVCacheConfig(32)))
    with pytest.raises(LengthMismatch, match="multi-head output count: expected 2, got 1"):
        cache.concat_outputs([np.zeros(32)])
    with pytest.raises(LengthMismatch, match="output dimension for head 1: expected 32, got 31"):
        cache.concat_outputs([np.zeros(32), np.zeros(31)])


@pytest.mark.parametrize(
    ("kind", "parents"),
    [
        (InvalidDimension, (ConfigError,)),
        (InvalidBitWidth, (ConfigError,)),
        (DimensionMismatch, (ArgumentError,)),
        (LengthMismatch, (ArgumentError,)),
        (NotUnitVector, (NotUnitNormError,)),
        (InvalidValue, (NonFiniteError,)),
    ],
)
def test_every_error_is_the_crates_and_the_librarys(kind, parents):
    assert issubclass(kind, (TurboQuantError, *parents))
    assert issubclass(kind, PagedTQError)
    assert issubclass(kind, ValueError)


# -- reading --------------------------------------------------------------------------------------


def test_query_is_checked_even_when_the_cache_is_empty():
    with pytest.raises(DimensionMismatch):
        cache_of().attention_scores(np.zeros(31))
    with pytest.raises(InvalidValue, match="KV cache query: expected a finite number, got nan"):
        cache_of().attention_scores(np.full(32, math.nan))


def test_attention_of_an_empty_cache_checks_nothing():
    assert not cache_of().attention_output(np.zeros(5), math.nan).any()


@pytest.mark.parametrize("temperature", [math.nan, math.inf, -math.inf])
def test_temperature_that_is_not_finite_is_refused_before_the_query(temperature):
    with pytest.raises(InvalidValue, match="attention temperature"):
        filled(cache_of(), 2).attention_output(np.zeros(5), temperature)


@pytest.mark.parametrize("temperature", ["1", None, True, np.ones(2)])
def test_temperature_that_is_no_number_is_refused_by_type(temperature):
    with pytest.raises(ArgumentTypeError, match="temperature must be a number"):
        filled(cache_of(), 2).attention_output(unit(32, 1, 5)[0], temperature)


@pytest.mark.parametrize("strategy", [MSE, PROD])
@pytest.mark.parametrize(
    ("temperature", "scale"), [(0.0, 32**-0.5), (-3.0, 32**-0.5), (0.25, 0.25), (40.0, 40.0)]
)
def test_attention_is_softmax_of_scaled_scores_over_decoded_values(strategy, temperature, scale):
    cache, query = filled(cache_of(key_strategy=strategy), 150), 3 * unit(32, 1, 5)[0]
    logits = scale * cache.attention_scores(query)
    weights = np.exp(logits - logits.max())
    expected = weights / weights.sum() @ cache.reconstruct_values()
    assert np.abs(cache.attention_output(query, temperature) - expected).max() < 1e-10


@pytest.mark.parametrize("strategy", [MSE, PROD])
def test_scores_are_inner_products_with_reconstructed_keys(strategy):
    cache, query = filled(cache_of(key_strategy=strategy), 70), unit(32, 1, 5)[0]
    query = query.astype(np.float32).astype(np.float64)
    difference = cache.attention_scores(query) - cache.reconstruct_keys() @ query
    assert np.abs(difference).max() < 1e-6


def test_scores_scale_with_queries_of_any_size():
    cache, query = filled(cache_of(), 5), unit(32, 1, 5)[0]
    scores = cache.attention_scores(query)
    for power in (-1000, -200, 200, 1000):
        scaled = cache.attention_scores(np.ldexp(query, power))
        assert np.array_equal(scaled, np.ldexp(scores, power))
    assert not cache.attention_scores(np.zeros(32)).any()


def test_very_sharp_attention_picks_the_best_token():
    cache, query = filled(cache_of(), 20), unit(32, 1, 5)[0]
    best = cache.attention_scores(query).argmax()
    expected = cache.reconstruct_values()[best]
    for temperature in (1e6, 1e300):
        output = cache.attention_output(np.ldexp(query, 100), temperature)
        assert np.abs(output - expected).max() < 1e-12


def test_distortion_through_the_cache_is_the_codecs():
    dim, count = 64, 4000
    keys, values, query = unit(dim, count, 1), unit(dim, count, 2), unit(dim, 200, 3)
    cache = cache_of(dim, key_strategy=MSE, key_bits=3)
    cache.append(keys, values)
    for decoded, true, bits in (
        (cache.reconstruct_keys(), keys, 3),
        (cache.reconstruct_values(), values, 4),
    ):
        error = np.mean(np.sum((decoded - true) ** 2, axis=1))
        assert error == pytest.approx(codebook(dim, bits).optimal_distortion, rel=0.02)
    # Prod: averaged over projections, (pi/2 - 1/d) D(bits - 1) / d; unbiased.
    errors, slopes = [], []
    for seed in range(24):
        cache = cache_of(dim, key_bits=3, seed=seed)
        cache.append(keys[:300], values[:300])
        estimate = np.array([cache.attention_scores(q) for q in query[:20]])
        true = query[:20] @ keys[:300].T
        errors.append(np.mean((estimate - true) ** 2))
        slopes.append(np.sum(estimate * true) / np.sum(true * true))
    expected = (math.pi / 2 - 1 / dim) * codebook(dim, 2).optimal_distortion / dim
    assert np.mean(errors) == pytest.approx(expected, rel=0.05)
    assert np.mean(slopes) == pytest.approx(1, abs=0.01)


# -- growth and eviction --------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, 90), min_size=1, max_size=12),
    st.sampled_from([0, 1, 5, 63, 64, 65, 130]),
    st.sampled_from([MSE, PROD]),
)
def test_any_sequence_of_appends_equals_a_fresh_cache_of_what_is_left(counts, limit, strategy):
    total = sum(counts)
    keys, values = unit(8, total, 1), unit(8, total, 2)
    cache = cache_of(8, max_tokens=limit, key_strategy=strategy)
    done = 0
    for count in counts:
        cache.append(keys[done : done + count], values[done : done + count])
        done += count
    kept = min(total, limit or total)
    assert cache.num_tokens == kept
    fresh = cache_of(8, key_strategy=strategy)
    fresh.append(keys[total - kept :], values[total - kept :])
    query = unit(8, 1, 3)[0]
    for read in (
        lambda c: c.attention_scores(query),
        lambda c: c.attention_output(query, 2.0),
        QuantizedKVCache.reconstruct_keys,
        QuantizedKVCache.reconstruct_values,
    ):
        a, b = read(cache), read(fresh)
        assert a.shape == b.shape
        assert np.abs(a - b).max(initial=0) < 1e-10


def test_sliding_cache_stays_small_however_long_it_runs():
    cache, keys, values = cache_of(8, max_tokens=100), unit(8, 90, 1), unit(8, 90, 2)
    for _ in range(200):
        cache.append(keys, values)
    tokens = cache._tokens
    assert cache.num_tokens == 100
    assert tokens._cache.length(tokens._seq) < 90 * 100
    assert cache.stats().pool_bytes == cache_of(8).stats().pool_bytes
    assert cache.stats().page_bytes <= 3 * cache.stats().pool_bytes // 9
    tokens._cache.check_integrity()


def test_page_copies_of_a_growing_cache_are_at_most_its_pages():
    cache, rows = cache_of(8), unit(8, 64, 1)
    copied = 0
    move = cache._tokens._move

    def counted(num_pages):
        nonlocal copied
        copied += cache._tokens._cache.tables.pool.num_used
        move(num_pages)

    cache._tokens._move = counted
    for blocks in range(1, 200):
        cache.append(rows, rows)
        assert copied <= 2 * blocks
    assert copied > 0


# -- bytes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "key_row", "value_row"),
    [
        ({"key_strategy": MSE}, 64, 64),
        ({"key_strategy": MSE, "key_bits": 3, "value_bits": 2}, 48, 32),
        ({}, 48 + 16 + 4, 64),
        ({"key_bits": 2, "value_bits": 8}, 16 + 16 + 4, 128),
    ],
)
def test_stats_follow_the_crates_formula(fields, key_row, value_row):
    stats = filled(cache_of(128, **fields), 10).stats()
    assert (stats.key_bytes, stats.value_bytes) == (10 * key_row, 10 * value_row)
    assert stats.total_bytes == 10 * (key_row + value_row)
    assert stats.uncompressed_bytes == 10 * 128 * 4 * 2
    assert stats.compression_ratio == stats.uncompressed_bytes / stats.total_bytes


def test_stats_of_an_empty_cache_have_ratio_zero():
    stats = cache_of().stats()
    assert (stats.total_bytes, stats.uncompressed_bytes, stats.compression_ratio) == (0, 0, 0.0)
    assert stats.page_bytes == 0


def test_page_bytes_are_whole_pages_with_their_norms():
    page = 64 * (64 + 64 + 2 + 2)
    stats = filled(cache_of(128, key_strategy=MSE), 65).stats()
    assert stats.page_bytes == 2 * page
    assert stats.pool_bytes == 9 * page


def test_stats_of_several_heads_add_up():
    cache = MultiHeadKVCache(MultiHeadConfig(3, KVCacheConfig(32)))
    cache.append_all([unit(32, 4, 1)] * 3, [unit(32, 4, 2)] * 3)
    stats = cache.stats()
    for name in ("total_bytes", "uncompressed_bytes", "page_bytes", "pool_bytes"):
        assert getattr(stats, name) == sum(getattr(head, name) for head in stats.head_stats) > 0
    assert stats.compression_ratio == stats.uncompressed_bytes / stats.total_bytes
