"""The crate's own tests of its compressor, with their tolerances, on this library's pages."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.compat.turbo_quant import (
    DimensionMismatch,
    KvCacheCompressor,
    KvCacheConfig,
    KvQuantPolicy,
    KvRuntimeConfig,
)


def draw(dim, seed):
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


def compressor(dim):
    return KvCacheCompressor(KvCacheConfig(dim, bits=8, projections=dim // 4, seed=42))


def filled(dim, count, step=1, offset=100):
    cache = compressor(dim)
    for i in range(count):
        cache.compress_token(draw(dim, i * step), draw(dim, i * step + offset))
    return cache


def test_empty_cache_has_no_scores():
    assert compressor(16).attention_scores(draw(16, 1)).shape == (0,)


def test_tokens_are_counted():
    assert len(filled(16, 5)) == 5


def test_every_token_has_a_score():
    assert filled(16, 10).attention_scores(draw(16, 999)).shape == (10,)


def test_key_like_the_query_scores_highest():
    cache, query = filled(16, 9, step=10, offset=1), draw(16, 999)
    cache.compress_token(query + np.float32(0.001), draw(16, 9000))
    assert cache.attention_scores(query).argmax() == 9


def test_attention_has_the_values_dimension():
    assert filled(16, 5, offset=50).attend(draw(16, 1)).shape == (16,)


def test_attention_over_equal_values_gives_that_value():
    cache, value = compressor(16), draw(16, 77)
    for i in range(8):
        cache.compress_token(draw(16, i), value)
    error = np.linalg.norm(cache.attend(draw(16, 1)) - value)
    assert error / np.linalg.norm(value) < 0.15


def test_codes_are_smaller_than_float32():
    assert filled(64, 20, offset=1000).compression_ratio() > 1.0


def test_key_of_another_dimension_is_refused():
    with pytest.raises(DimensionMismatch):
        compressor(16).compress_token(draw(8, 0), draw(16, 1))


def test_query_of_another_dimension_is_refused():
    with pytest.raises(DimensionMismatch):
        filled(16, 1).attention_scores(draw(8, 0))


def test_keys_and_values_are_rotated_independently():
    cache, row = compressor(16), draw(16, 42)
    cache.compress_token(row, row)
    planes = cache._tokens._cache.backend.layers[0].writer._planes
    key, value = (planes[stream + "_angles"][1, 0, 0] for stream in ("key", "value"))
    assert key.any()
    assert not np.array_equal(key, value)


def test_shadow_scores_are_there():
    cache = compressor(16)
    cache.compress_token(draw(16, 1), draw(16, 2))
    (shadow,) = cache.shadow_attention_scores(draw(16, 3))
    assert np.isfinite(shadow.abs_error)


def test_exact_values_beside_coded_keys_come_back_unchanged():
    policy = KvQuantPolicy.quantized(8, 4)
    cache = KvCacheCompressor(KvRuntimeConfig(16, policy, KvQuantPolicy.exact(), 42, True))
    value = draw(16, 99)
    cache.compress_token(draw(16, 1), value)
    assert np.array_equal(cache.decode_values([0])[0], value)
