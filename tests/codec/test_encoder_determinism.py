"""Codes and norms of a vector depend on nothing but the vector and its head."""

from __future__ import annotations

import threading
from dataclasses import fields

import numpy as np
import pytest

from pagedtq.codec import TurboQuantCodec, planar
from pagedtq.config import TurboQuant

CONFIGS = [
    (128, TurboQuant(bits=4)),
    (128, TurboQuant(bits=3, scale="unbiased")),
    (64, TurboQuant(bits=8)),
    (80, TurboQuant(bits=5, scale="unbiased")),
    (64, TurboQuant(bits=4, scale="searched")),
    (80, TurboQuant(bits=6, scale="searched")),
    (7, TurboQuant(rotation="dense", bits=6)),
    (12, TurboQuant(bits=4, rotation="dense")),
    (64, TurboQuant(bits=3, estimator="prod")),
    (96, TurboQuant(bits=4, estimator="prod", projection="orthogonal")),
    (33, TurboQuant(bits=4, estimator="prod", rotation="dense")),
]


def planes(encoded):
    """All arrays of an encoding as bytes per (token, head)."""
    for field in fields(encoded):
        array = getattr(encoded, field.name)
        if array is not None:
            yield np.ascontiguousarray(array).view(np.uint8).reshape(*array.shape[:2], -1)


def same(left, right):
    pairs = list(zip(planes(left), planes(right), strict=True))
    return all(np.array_equal(a, b) for a, b in pairs)


def take(encoded, index):
    return type(encoded)(
        *(None if (a := getattr(encoded, f.name)) is None else a[index] for f in fields(encoded))
    )


def draw(tokens, heads, head_dim):
    rng = np.random.default_rng(5)
    norms = np.exp(rng.standard_normal((tokens, heads, 1)) * 2)
    vectors = (rng.standard_normal((tokens, heads, head_dim)) * norms).astype(np.float32)
    vectors[tokens // 2] = 0
    return vectors


@pytest.mark.parametrize(("head_dim", "config"), CONFIGS)
def test_batching_position_and_order_do_not_matter(head_dim, config):
    codec = TurboQuantCodec(config, head_dim, 2, mean=np.full((2, head_dim), 0.25))
    vectors = draw(1025, 2, head_dim)
    whole = codec.encode(vectors)
    for tokens in (1, 2, 7, 1024):
        assert same(codec.encode(vectors[:tokens]), take(whole, slice(None, tokens)))
    assert same(codec.encode(vectors[513:514]), take(whole, slice(513, 514)))
    shuffle = np.random.default_rng(0).permutation(1025)
    assert same(codec.encode(vectors[shuffle]), take(whole, shuffle))


@pytest.mark.parametrize(("head_dim", "config"), CONFIGS[:4])
def test_tile_size_and_memory_order_do_not_matter(head_dim, config, monkeypatch):
    codec = TurboQuantCodec(config, head_dim, 3)
    vectors = draw(500, 3, head_dim)
    whole = codec.encode(vectors)
    assert same(codec.encode(np.asfortranarray(vectors)), whole)
    assert same(codec.encode(np.repeat(vectors, 2, axis=0)[::2]), whole)
    monkeypatch.setattr(planar, "TILE_BYTES", 3 * 17 * 4 * head_dim)
    assert same(codec.encode(vectors), whole)


def test_threads_do_not_disturb_each_other():
    codec = TurboQuantCodec(TurboQuant(bits=4, estimator="prod"), 64, 2)
    parts = np.split(draw(1200, 2, 64), 4)
    alone = [codec.encode(part) for part in parts]
    results = [None] * 4

    def work(i):
        for _ in range(3):
            results[i] = codec.encode(parts[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(a, b) for a, b in zip(alone, results))


@pytest.mark.parametrize(
    "config",
    [
        TurboQuant(bits=4),
        TurboQuant(bits=4, rotation="dense"),
        TurboQuant(bits=4, estimator="prod"),
        TurboQuant(bits=4, estimator="prod", projection="orthogonal"),
    ],
)
def test_a_rank_encodes_its_heads_like_the_whole_model(config):
    vectors = draw(50, 8, 64)
    whole = TurboQuantCodec(config, 64, 8, seed=2, layer=5)
    rank = TurboQuantCodec(config, 64, 2, seed=2, layer=5, first_kv_head=3)
    part = rank.encode(vectors[:, 3:5])
    assert same(part, take(whole.encode(vectors), (slice(None), slice(3, 5))))
    assert np.array_equal(rank.decode(part), whole.decode(whole.encode(vectors))[:, 3:5])


def test_seed_and_layer_change_the_codes():
    vectors = draw(20, 2, 64)
    codes = [
        TurboQuantCodec(TurboQuant(), 64, 2, seed=seed, layer=layer).encode(vectors).codes
        for seed, layer in ((0, 0), (1, 0), (0, 1), (2**64 - 1, 0))
    ]
    for i in range(4):
        for j in range(i):
            assert not np.array_equal(codes[i], codes[j])


@pytest.mark.parametrize(("head_dim", "config"), CONFIGS)
def test_no_vectors_encode_to_nothing(head_dim, config):
    codec = TurboQuantCodec(config, head_dim, 2)
    empty = np.empty((0, 2, head_dim), np.float32)
    codec.validate(empty)
    encoded = codec.encode(empty)
    assert encoded.norms.shape == (0, 2)
    assert codec.decode(encoded).shape == (0, 2, head_dim)
    assert codec.inner_products(np.zeros((3, 2, head_dim)), encoded).shape == (3, 2, 0)


def test_wide_heads_count_their_energy_right():
    # More planes than a byte can count.
    codec = TurboQuantCodec(TurboQuant(bits=4), 1024, 1)
    vectors = draw(30, 1, 1024)
    decoded = codec.decode(codec.encode(vectors), np.float64)
    norms = np.linalg.norm(vectors.astype(np.float64), axis=2)
    assert np.linalg.norm(decoded, axis=2) == pytest.approx(norms, rel=2.0**-11 * 1.001)


def test_seed_offset_is_added_to_the_seed_and_wraps():
    vectors = draw(20, 2, 64)
    for seed, offset in ((5, 2), (2**64 - 1, 2)):
        config = TurboQuant(estimator="prod", seed_offset=offset)
        shifted = TurboQuantCodec(config, 64, 2, seed=seed)
        plain = TurboQuantCodec(TurboQuant(estimator="prod"), 64, 2, seed=(seed + offset) % 2**64)
        assert same(shifted.encode(vectors), plain.encode(vectors))
