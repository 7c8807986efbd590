"""Compressed codecs under a model: both ways of attention agree, and nothing is stored twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pagedtq import Exact, LayerOverride, TurboQuant
from pagedtq.integrations.transformers import (
    PagedTQCache,
    calibrate_key_means,
    padded_batch,
)
from tests.integrations.tiny_models import (
    FAMILIES,
    generate,
    left_padded,
    paged,
    prompt,
    reference_cache,
    tiny,
)

# One family has a head_dim without a fast rotation, which is slow and says so.
pytestmark = pytest.mark.filterwarnings("ignore::pagedtq.codec.DenseRotationWarning")


@pytest.fixture(params=FAMILIES)
def model(request):
    return with_own_attention(tiny(request.param))


@pytest.fixture
def llama():
    return with_own_attention(tiny("llama"))


def with_own_attention(model):
    model.set_attn_implementation("eager")
    return model


def both_ways(model, run):
    """Run with the model's attention on decoded keys, then with attention on pages."""
    dense = run()
    model.set_attn_implementation("pagedtq")
    try:
        return dense, run()
    finally:
        model.set_attn_implementation("eager")


@pytest.mark.parametrize("own_tokens", ["exact", "stored"])
@pytest.mark.parametrize("window", [0, 16])
def test_decoded_keys_and_pages_give_the_same_logits(model, window, own_tokens):
    ids, mask = left_padded([37, 20, 3])
    more = prompt(3, 5, seed=4)
    whole = torch.cat([mask, torch.ones_like(more)], dim=1)

    def run():
        cache = paged(model, "k4v4", page_size=16, window=window, sinks=3, own_tokens=own_tokens)
        with torch.no_grad():
            first = model(ids, attention_mask=mask, past_key_values=cache).logits
            second = model(more, attention_mask=whole, past_key_values=cache).logits
        return first[mask == 1], second

    dense, pages = both_ways(model, run)
    for one, other in zip(dense, pages):
        assert (one - other).abs().max() < 1e-4


def test_own_tokens_as_stored_differ_from_own_tokens_as_they_came(llama):
    ids = prompt(1, 32)
    with torch.no_grad():
        exact = llama(ids, past_key_values=reference_cache(llama)).logits
        came, stored = (
            llama(ids, past_key_values=paged(llama, "k2v2", window=0, own_tokens=how)).logits
            for how in ("exact", "stored")
        )
    assert torch.equal(came, exact), "a prompt reads itself before anything is coded"
    assert (stored - exact).abs().max() > 1e-2


def test_fewer_bits_lose_more_and_exact_layers_win_some_back(llama):
    ids = prompt(1, 64)
    step = prompt(1, 1, seed=2)

    def error(settings, **fields):
        cache = paged(llama, settings, window=0, **fields)
        with torch.no_grad():
            llama(ids, past_key_values=cache)
            mine = llama(step, past_key_values=cache).logits
            whole = llama(torch.cat([ids, step], dim=1)).logits[:, -1:]
        return float((mine - whole).norm() / whole.norm())

    errors = [error(name) for name in ("k2v2", "k4v4", "k8v8", "exact")]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-5
    boundary = LayerOverride(layers=(0, -1), keys=Exact(dtype="f32"), values=Exact(dtype="f32"))
    assert error("k2v2", overrides=(boundary,)) < errors[0]
    assert error((TurboQuant(bits=8), TurboQuant(bits=2))) < errors[0]


def test_beams_share_the_pages_of_their_common_past(llama):
    ids = prompt(1, 60)
    cache = paged(llama, "k4v4", page_size=16, window=16, max_tokens=128)
    generate(llama, ids, cache, num_beams=4, max_new_tokens=20)
    stats = cache.pages.stats()
    assert stats.num_sequences == 4
    # 79 tokens are 5 pages; the prompt's three full ones are held once.
    assert stats.pages_shared >= 3
    assert stats.pages_used <= 3 + 4 * 2
    cache.pages.check_integrity()


@pytest.mark.parametrize("window", [0, 32])
def test_a_pool_that_grows_gives_what_a_large_one_gives(llama, monkeypatch, window):
    monkeypatch.setattr(padded_batch, "FIRST_TOKENS", 16)
    ids, mask = left_padded([40, 11])
    fields = {"page_size": 16, "window": window, "sinks": 5}
    small = paged(llama, "k4v4", **fields)
    large = paged(llama, "k4v4", max_tokens=130, **fields)
    logits = []
    for cache in (small, large):
        seen, found = mask, []
        with torch.no_grad():
            llama(ids, attention_mask=mask, past_key_values=cache)
            first = cache.pages.config
            cache.batch_repeat_interleave(3)
            seen = seen.repeat_interleave(3, dim=0)
            # The rows part here, so forks of one past are copied while the pool grows.
            for part in prompt(6, 80, seed=6).split(9, dim=1):
                seen = torch.cat([seen, torch.ones_like(part)], dim=1)
                call = llama(part, attention_mask=seen, past_key_values=cache)
                found.append(call.logits)
        logits.append(torch.cat(found, dim=1))
    assert torch.equal(*logits)
    assert first.num_pages == 2 * (130 // 16 + 2) + 1
    assert small.pages.config.num_pages > 2 * (40 // 16 + 2) + 1
    assert small.pages.stats().pages_used == large.pages.stats().pages_used


def test_padding_is_not_stored(llama):
    ids, mask = left_padded([48, 1])
    cache = paged(llama, "k4v4", page_size=16)
    with torch.no_grad():
        llama(ids, attention_mask=mask, past_key_values=cache)
    assert cache.get_seq_length() == 48
    assert [cache.pages.length(i) for i in cache.sequence_ids] == [48, 1]
    assert cache.pages.stats().pages_used == 4
    keys, _ = cache.layers[0].dense()
    assert keys.shape == (2, 2, 48, 16)
    assert not keys[1, :, :47].any() and keys[1, :, 47].any()


def test_bytes_are_those_of_the_codec(llama):
    cache = paged(llama, "k4v4", window=0)
    with torch.no_grad():
        llama(prompt(1, 128), past_key_values=cache)
    report = cache.pages.memory_report()
    # 16 channels of 4 bits and a float16 norm, keys and values, 2 heads, 3 layers.
    assert report.payload_bytes_per_token == 3 * 2 * 2 * (8 + 2)
    assert report.fp16_bytes == 128 * 3 * 2 * 2 * 32


@pytest.mark.parametrize("family", ["llama", "gemma2", "llama-mqa-80"])
def test_key_centring_leaves_logits_true(family):
    """Means far from zero, and calls that end on both sides of the window's edges."""
    model = with_own_attention(tiny(family))
    ids = prompt(2, 40)
    shape = paged(model).config
    means = 20 * np.random.default_rng(0).standard_normal(
        (shape.num_layers, shape.num_kv_heads, shape.head_dim)
    ).astype(np.float32)
    codecs = (TurboQuant(bits=8), Exact(dtype="f32"))

    def error(key_means):
        cache = paged(model, codecs, key_means=key_means, page_size=16, window=16)
        with torch.no_grad():
            parts = ids.split([17, 1, 14, 1, 7], dim=1)
            logits = [model(part, past_key_values=cache).logits for part in parts]
        return float((torch.cat(logits, dim=1) - exact).abs().max())

    with torch.no_grad():
        exact = model(ids).logits
    uncentred = error(None)
    # Keys less such means are 20 times as large, and so are their codes' errors: 14 to 30 times
    # the error measured. A mean left in the lse of one part alone gives 200 times.
    for centred in both_ways(model, lambda: error(means)):
        assert centred < 60 * uncentred


def test_calibrated_means_are_those_of_the_keys_and_lower_the_error(llama):
    shifted = with_own_attention(tiny("llama", seed=5))
    if not getattr(shifted, "_shifted", False):
        for layer in shifted.model.layers:
            layer.self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(32))
            # Low-frequency channels of RoPE barely turn: their offset survives in the mean.
            layer.self_attn.k_proj.bias.data[[6, 7, 14, 15, 22, 23, 30, 31]] = 30.0
        shifted._shifted = True
    settings = calibrate_key_means(shifted, prompt(2, 160, seed=8), window=0)
    assert settings.num_tokens == 320
    cache = paged(shifted, "exact", window=0)
    with torch.no_grad():
        shifted(prompt(2, 160, seed=8), past_key_values=cache)
    keys = torch.stack([layer.dense()[0] for layer in cache.layers]).double()
    assert np.allclose(settings.key_means, keys.mean(dim=(1, 3)).numpy(), atol=1e-5)

    ids = prompt(1, 96, seed=9)
    with torch.no_grad():
        exact = shifted(ids).logits

        def error(what):
            cache = PagedTQCache.from_model(shifted, what, window=0, own_tokens="stored")
            return float((shifted(ids, past_key_values=cache).logits - exact).norm())

        assert error(settings) < 0.6 * error("k4v4")


def test_calibration_takes_padding_several_texts_and_either_attention(llama):
    ids, mask = left_padded([150, 90])
    padded = calibrate_key_means(llama, ids, attention_mask=mask).key_means
    split = calibrate_key_means(llama, [ids[:1], ids[1:, 60:]]).key_means
    assert np.allclose(padded, split, atol=1e-4)
    llama.set_attn_implementation("pagedtq")
    assert np.allclose(
        calibrate_key_means(llama, ids, attention_mask=mask).key_means, padded, atol=1e-4
    )


def test_scores_through_a_centred_cache_are_true_inner_products(llama):
    settings = calibrate_key_means(llama, prompt(2, 100), window=0)
    cache = PagedTQCache.from_model(
        llama, (TurboQuant(bits=8), TurboQuant(bits=8)), key_means=settings.key_means, window=0
    )
    exact = paged(llama, "exact", window=0)
    ids = prompt(1, 50, seed=3)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        llama(ids, past_key_values=exact)
    queries = np.random.default_rng(1).standard_normal((1, 8, 16)).astype(np.float32)
    for layer in range(3):
        mine, _ = cache.pages.score(layer, queries, cache.sequence_ids).of(0)
        true, _ = exact.pages.score(layer, queries, exact.sequence_ids).of(0)
        assert np.abs(mine - true).max() < 0.02 * np.abs(true).max()


def test_own_tokens_are_read_as_they_came_where_pages_hold_them_rounded(llama):
    """Pages of float16 under a float32 model: the call that brings a token reads all of it."""
    ids = prompt(1, 20)
    codecs = (Exact(dtype="f16"), Exact(dtype="f16"))

    def run():
        cache = paged(llama, codecs, window=0)
        with torch.no_grad():
            llama(ids, past_key_values=cache)
            return llama(prompt(1, 1, seed=2), past_key_values=cache).logits

    dense, pages = both_ways(llama, run)
    assert (dense - pages).abs().max() < 2e-6
