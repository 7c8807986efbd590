"""Polar streams in pages: the same operations as any codec, bytes counted as they lie."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq import CacheConfig, Exact, PagedKVCache, Polar, TurboQuant
from pagedtq.codec import PolarCodec
from pagedtq.errors import ConfigError
from pagedtq.paging.layout import PageLayout

D, HEADS = 32, 2
SKETCH = Polar(bits=5, mode="polar_qjl", projections=20)
PAIRS = [
    (Polar(bits=6), Polar(bits=6)),
    (SKETCH, Polar(bits=11)),
    (SKETCH, TurboQuant()),
    (TurboQuant(bits=3, estimator="prod"), Polar(bits=8, radii="f32")),
    (Polar(bits=3, rotation="dense", radii="f32"), Exact(dtype="f32")),
    (Exact(dtype="f32"), Polar(bits=16)),
]


def cache_of(keys, values, **fields):
    shape = {"num_layers": 2, "num_kv_heads": HEADS, "head_dim": D, "num_pages": 24}
    return PagedKVCache(
        CacheConfig(
            **shape, page_size=16, keys=keys, values=values, kv_dtype="f32", seed=9, **fields
        ),
        accumulate="float64",
        debug=True,
    )


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("keys", "values"), PAIRS)
@pytest.mark.parametrize("window", [0, 16])
def test_attention_and_scores_are_those_of_the_loaded_tensors(keys, values, window):
    cache = cache_of(keys, values, window=window, num_window_slots=2)
    seqs = [cache.open(), cache.open()]
    tokens = draw(2, 2, 61, HEADS, D)
    cache.append(seqs, tokens[0], tokens[1], [45, 16])
    queries = draw(2, 2 * HEADS, D, seed=3)
    out, lse = cache.attend(1, queries, seqs)
    scores = cache.score(1, queries, seqs)
    for index, seq in enumerate(seqs):
        loaded_keys, loaded_values, positions = cache.load(1, seq)
        part, at = scores.of(index)
        assert np.array_equal(at, positions)
        for q in range(2 * HEADS):
            products = loaded_keys[:, q // 2].astype(np.float64) @ queries[index, q]
            # The window is kept and scored in float32.
            assert np.abs(part[q] - products).max() < 2e-5
            weights = np.exp(products / np.sqrt(D))
            expected = weights @ loaded_values[:, q // 2] / weights.sum()
            assert np.abs(out[index, q] - expected).max() < 2e-5
            assert abs(lse[index, q] - np.log(weights.sum())) < 2e-5


@pytest.mark.parametrize(("keys", "values"), PAIRS)
def test_empty_batches_and_sequences_read_as_nothing(keys, values):
    cache = cache_of(keys, values, window=0)
    out, lse = cache.attend(0, np.zeros((0, HEADS, D), np.float32), [])
    assert out.shape == (0, HEADS, D) and lse.shape == (0, HEADS)
    seq = cache.open()
    out, lse = cache.attend(0, draw(1, HEADS, D), seq)
    assert not out.any() and np.isneginf(lse).all()
    assert cache.score(0, draw(1, HEADS, D), seq).values.shape == (HEADS, 0)


@pytest.mark.parametrize(("keys", "values"), PAIRS)
def test_pages_hold_what_the_codec_encodes(keys, values):
    cache = cache_of(keys, values, window=0)
    seq, tokens = cache.open(), draw(2, 2, 20, HEADS, D)
    for token in range(20):
        cache.append(seq, tokens[0][:, [token]], tokens[1][:, [token]])
    loaded = cache.load(1, seq)
    for stream, form, got, sent in zip(("key", "value"), (keys, values), loaded, tokens):
        if not isinstance(form, Polar):
            continue
        codec = PolarCodec(form, D, HEADS, seed=9, layer=1, stream=stream)
        expected = codec.decode(codec.encode(sent[1]), np.float64)
        assert np.abs(got - expected).max() < 1e-9


def test_sequence_operations_work_on_polar_pages():
    cache = cache_of(SKETCH, Polar(bits=7), window=0)
    seq, tokens = cache.open(), draw(2, 2, 50, HEADS, D)
    cache.append(seq, tokens[0][:, :40], tokens[1][:, :40])
    child = cache.fork(seq)
    cache.append(child, tokens[0][:, 40:], tokens[1][:, 40:])
    cache.truncate(seq, 21)
    whole = cache_of(SKETCH, Polar(bits=7), window=0)
    other = whole.open()
    whole.append(other, tokens[0], tokens[1])
    for got, expected in zip(cache.load(0, child), whole.load(0, other)):
        assert np.array_equal(got, expected)
    assert np.array_equal(cache.load(0, seq)[0], whole.load(0, other)[0][:21])
    cache.evict(child, [0, 1])
    assert np.array_equal(cache.load(0, child)[0], whole.load(0, other)[0][32:])


def test_reused_pages_show_nothing_of_their_last_owner():
    cache = cache_of(SKETCH, Polar(), window=0)
    pages = np.arange(1, 24)
    cache.backend.fill_pages(pages, 0xFF)  # as radii, NaN
    seq, tokens = cache.open(), draw(2, 2, 3, HEADS, D)
    cache.append(seq, tokens[0], tokens[1])
    out, lse = cache.attend(0, draw(1, HEADS, D), seq)
    assert np.isfinite(out).all() and np.isfinite(lse).all()


def test_key_means_shift_logits_of_polar_keys_back():
    mean = 20 * draw(2, HEADS, D, seed=5)
    config = cache_of(Polar(bits=10), Polar(bits=10), window=16, num_window_slots=1).config
    cache = PagedKVCache(config, key_means=mean, accumulate="float64")
    seq, tokens = cache.open(), draw(2, 2, 45, HEADS, D)
    tokens[0] += mean[:, None]
    cache.append(seq, tokens[0], tokens[1])
    queries = draw(1, HEADS, D, seed=3)
    scores, _ = cache.score(0, queries, seq).of(0)
    true = np.einsum("hd,thd->ht", queries[0], tokens[0][0])
    assert np.abs(scores - true).max() < 0.2
    _, lse = cache.attend(0, queries, seq)
    weights = np.exp(true / np.sqrt(D) - lse[0][:, None])
    assert np.abs(weights.sum(axis=1) - 1).max() < 0.02


@pytest.mark.parametrize(
    ("keys", "values", "expected"),
    [
        # Angles 64 x 4 bits, radii 64 x f16, both streams.
        (Polar(bits=4), Polar(bits=4), 2 * (32 + 128)),
        (Polar(bits=8, radii="f32"), Exact(), 64 + 256 + 256),
        # Seven bits of angle, 32 signs, an f16 norm; values without any of that.
        (
            Polar(bits=8, mode="polar_qjl", projections=32),
            Polar(bits=7),
            (56 + 128 + 4 + 2) + (56 + 128),
        ),
        (Polar(bits=2, mode="polar_qjl"), Exact(), (8 + 128 + 16 + 2) + 256),
    ],
)
def test_bytes_per_token_are_those_of_the_planes(keys, values, expected):
    config = CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=128, num_pages=2, keys=keys, values=values
    )
    layout = PageLayout(config)
    assert layout.extents[0].payload_bytes == 64 * expected
    assert 64 * expected <= layout.page_bytes < 64 * expected + 128 * 8
    assert PagedKVCache(config).memory_report().payload_bytes_per_token == expected


def test_polar_configs_survive_json():
    config = cache_of(SKETCH, Polar(radii="f32"), window=0).config
    assert CacheConfig.from_json(config.to_json()) == config
    assert str(SKETCH) == "5-bit polar_qjl"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": SKETCH}, 'values cannot use mode "polar_qjl"'),
        ({"keys": Polar(), "head_dim": 33}, "Polar needs an even head_dim, got 33"),
    ],
)
def test_polar_where_it_cannot_be_is_refused(fields, message):
    shape = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 32, "num_pages": 2}
    with pytest.raises(ConfigError, match=message):
        CacheConfig(**shape | fields)
