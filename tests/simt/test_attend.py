"""The attention kernel's own source against float64 on the decoded vectors, run on the CPU."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from pagedtq import CacheConfig, Exact, LayerOverride, PagedKVCache, TurboQuant
from pagedtq.codec import DenseRotationWarning
from pagedtq.config import PRESETS
from tests.reference import relative_error, softmax_attention
from tests.simt.device_attention import DeviceAttention

HEADS = 2
BOUND = 2e-3

CODECS = {
    **PRESETS,
    "k2v3": (TurboQuant(bits=2), TurboQuant(bits=3)),
    "k1v6": (TurboQuant(bits=1), TurboQuant(bits=6)),
    "k5v7": (TurboQuant(bits=5, scale="unbiased"), TurboQuant(bits=7, scale="none")),
    "orthogonal4v4": (
        TurboQuant(bits=4, estimator="prod", projection="orthogonal"),
        TurboQuant(bits=4),
    ),
    "bf16": (Exact(dtype="bf16"), Exact(dtype="bf16")),
    "f32": (Exact(dtype="f32"), Exact(dtype="f32")),
    "k4exact": (TurboQuant(bits=4), Exact(dtype="f16")),
    "exactv4": (Exact(dtype="f16"), TurboQuant(bits=4)),
}

# Page size, group, query tokens of the five sequences, parts per sequence, holes.
SHAPES = {
    16: [(1, (1, 1, 1, 1, 1), 1, False), (7, (1, 2, 1, 9, 3), 2, True)],
    64: [(4, (1, 1, 1, 1, 1), 3, True), (5, (1, 3, 2, 1, 1), 1, False)],
    128: [(8, (1, 1, 1, 1, 1), 2, False), (3, (1, 1, 4, 2, 1), 4, True)],
}

# Formats, dims and page sizes pairwise; groups, query tokens, parts and holes come with the shape.
MATRIX = [
    ("k4v4", 128, 16, 0), ("k4v4", 128, 64, 0), ("k4v4", 128, 128, 1), ("k4v4", 64, 64, 1),
    ("k4v4", 96, 16, 1), ("k4v4", 256, 64, 0), ("k3v3", 128, 16, 1), ("k3v3", 64, 128, 0),
    ("k3v3", 256, 64, 1), ("k2v2", 128, 128, 1), ("k2v2", 64, 64, 0), ("k2v2", 256, 16, 1),
    ("k3v4", 128, 64, 1), ("k4v3", 64, 16, 0), ("k2v3", 96, 16, 0), ("exact", 128, 64, 0),
    ("exact", 64, 16, 1), ("exact", 256, 128, 0), ("k4exact", 128, 64, 1), ("exactv4", 64, 64, 0),
    ("prod4v4", 128, 64, 0), ("orthogonal4v4", 256, 64, 0), ("k8v8", 64, 16, 0),
    ("k1v6", 64, 16, 1), ("k5v7", 64, 128, 0), ("bf16", 64, 16, 1), ("f32", 96, 16, 0),
    ("k4v4", 160, 64, 1), ("prod4v4", 80, 16, 1), ("k3v3", 20, 16, 0),
    ("k3v3", 192, 16, 1), ("k2v2", 192, 64, 1), ("k3v3", 96, 128, 1), ("k2v2", 96, 64, 0),
    ("k3v3", 160, 64, 1), ("prod4v4", 256, 16, 1), ("exact", 256, 16, 1), ("k2v2", 320, 16, 1),
    # Rows read section by section.
    ("k3v4", 512, 16, 0), ("exact", 512, 16, 1), ("prod4v4", 512, 16, 0), ("k8v8", 512, 64, 0),
    ("k3v3", 320, 64, 1), ("k2v2", 288, 16, 0), ("k5v7", 200, 16, 1), ("k1v6", 256, 64, 0),
    ("f32", 272, 16, 1), ("prod4v4", 160, 16, 0), ("k3v3", 112, 64, 1), ("k4v4", 112, 16, 0),
]  # fmt: skip


def make_cache(name, head_dim, page_size, means=None, **fields):
    keys, values = CODECS[name]
    options = {"num_layers": 1, "num_kv_heads": HEADS, "num_pages": 40, "window": 0, **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DenseRotationWarning)
        config = CacheConfig(
            keys=keys, values=values, head_dim=head_dim, page_size=page_size, **options
        )
        # Debug mode fills pages with NaN when they are handed out.
        return PagedKVCache(config, key_means=means, debug=True, num_threads=1)


def fill(cache, lengths, rng, value_scale=1.0):
    config = cache.config
    ids = [cache.open() for _ in lengths]
    for seq, length in zip(ids, lengths):
        shape = (2, config.num_layers, length, config.num_kv_heads, config.head_dim)
        keys, values = rng.standard_normal(shape).astype(np.float32)
        cache.append(seq, keys, values * np.float32(value_scale))
    return ids


def check(cache, ids, q_lens, group, splits, rng, *, layer=0, sm_scale=None, seed=0, **options):
    """Attend through the kernel and compare every head and half with float64."""
    config = cache.config
    dim = config.head_dim
    sm_scale = dim**-0.5 if sm_scale is None else sm_scale
    queries = rng.standard_normal((sum(q_lens), HEADS * group, dim)).astype(np.float32)
    table, reads = cache.tables.block_table(ids), cache.tables.reads(ids, False)
    splits = np.full(len(ids), splits, np.int32)
    out, lse = DeviceAttention(cache.backend, layer).attend(
        queries, table, reads, sm_scale, q_lens, splits, seed=seed, **options
    )
    at = 0
    for seq, count in zip(ids, q_lens):
        part = slice(at, at + count)
        keys, values, positions = cache.load(layer, seq)
        ends = np.arange(cache.length(seq) - count, cache.length(seq))
        left = options.get("window_left")
        want, want_lse = softmax_attention(
            queries[part], keys, values, positions, ends, sm_scale,
            soft_cap=options.get("soft_cap"), floor=None if left is None else ends - left,
        )  # fmt: skip
        for head in range(HEADS * group):
            for half in (slice(0, dim // 2), slice(dim // 2, None)):
                size = np.linalg.norm(want[:, head], axis=-1, keepdims=True)
                share = np.linalg.norm(want[:, head, half], axis=-1)
                assert relative_error(out[part, head, half], want[:, head, half]) <= BOUND * max(
                    1.0, float((size[:, 0] / np.where(share > 0, share, 1)).max())
                ), (head, half)
        np.testing.assert_allclose(lse[part], want_lse, rtol=0, atol=BOUND)
        at += count
    return out, lse


@pytest.mark.parametrize(("name", "head_dim", "page_size", "variant"), MATRIX)
def test_attention_equals_float64_on_the_decoded_vectors(name, head_dim, page_size, variant):
    rng = np.random.default_rng(head_dim + page_size)
    cache = make_cache(name, head_dim, page_size)
    group, q_lens, splits, holes = SHAPES[page_size][variant]
    lengths = [1, page_size - 1, page_size + 1, 3 * page_size, 3 * page_size + 5]
    ids = fill(cache, lengths, rng)
    if holes:
        cache.tables.evict(ids[3], [1])
        cache.tables.evict(ids[4], [0, 2])
    check(cache, ids, q_lens, group, splits, rng)


@pytest.mark.parametrize("group", [1, 3, 4, 5, 7, 8, 16, 20, 64])
def test_every_group_gets_its_own_columns(group):
    rng = np.random.default_rng(group)
    cache = make_cache("k4v4", 128, 64)
    check(cache, fill(cache, [130, 7], rng), [1, 2], group, 2, rng)


@pytest.mark.parametrize("page_size", [16, 64, 128])
@pytest.mark.parametrize("name", ["k4v4", "exact"])
def test_token_exact_read_ranges_cut_tiles_anywhere(name, page_size):
    rng = np.random.default_rng(5)
    cache = make_cache(name, 64, page_size, num_pages=90)
    ids = fill(cache, [400, 400, 400], rng)
    for seq, keep, start in zip(ids, (0, 3, 70), (130, 131, 399)):
        cache.tables.set_start(seq, keep, start)
    for splits in (1, 3):
        check(cache, ids, [1, 2, 1], 4, splits, rng)


@pytest.mark.parametrize("window_left", [0, 5, 63, 64, 200])
def test_sliding_windows_narrow_each_query_token_by_itself(window_left):
    rng = np.random.default_rng(6)
    cache = make_cache("k4v4", 64, 64)
    check(cache, fill(cache, [300, 90], rng), [5, 3], 3, 2, rng, window_left=window_left)


@pytest.mark.parametrize("name", ["k4v4", "prod4v4", "exact"])
def test_soft_caps_bend_true_logits(name):
    rng = np.random.default_rng(7)
    means = 3 * rng.standard_normal((1, HEADS, 64)).astype(np.float32)
    cache = make_cache(name, 64, 16, None if name == "exact" else means)
    check(cache, fill(cache, [100, 33], rng), [1, 2], 4, 2, rng, soft_cap=5.0, sm_scale=0.25)


def test_key_means_are_part_of_every_lse():
    rng = np.random.default_rng(8)
    means = 20 * rng.standard_normal((1, HEADS, 64)).astype(np.float32)
    cache = make_cache("k4v4", 64, 16, means)
    ids = [cache.open()]
    keys = rng.standard_normal((1, 90, HEADS, 64)).astype(np.float32) + means[:, None]
    cache.append(ids[0], keys, rng.standard_normal(keys.shape).astype(np.float32))
    check(cache, ids, [1], 4, 2, rng)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_value_norms_of_any_size_fill_the_range_of_f16(scale):
    rng = np.random.default_rng(9)
    cache = make_cache("k4v4", 128, 64)
    check(cache, fill(cache, [200, 65], rng, scale), [1, 1], 4, 1, rng)


def test_exact_magnitudes_beyond_f16_saturate():
    rng = np.random.default_rng(10)
    cache = make_cache("f32", 96, 16, kv_dtype="f32")
    keys, values = rng.standard_normal((2, 1, 21, HEADS, 96)).astype(np.float32)
    keys[0, 20, 0, 5], values[0, 3, 0, 7], values[0, 18, 1, 60] = 1e6, 1e6, -1e6
    seq = cache.open()
    cache.append(seq, keys, values)
    queries = rng.standard_normal((1, HEADS, 96)).astype(np.float32)
    table, reads = cache.tables.block_table([seq]), cache.tables.reads([seq], False)
    out, _ = DeviceAttention(cache.backend).attend(queries, table, reads, 1e-4)
    keys, values = (np.clip(part[0], -65504, 65504) for part in (keys, values))
    want, _ = softmax_attention(queries, keys, values, np.arange(21), np.array([20]), 1e-4)
    assert relative_error(out, want) <= BOUND


def test_layers_of_either_pool_order_are_read_in_place():
    rng = np.random.default_rng(11)
    override = LayerOverride(layers=(0,), keys=Exact(), values=Exact())
    for order in ("layer_major", "page_major"):
        cache = make_cache("k3v3", 64, 16, num_layers=2, overrides=(override,), pool_order=order)
        ids = fill(cache, [50, 20], rng)
        for layer in (0, 1):
            check(cache, ids, [1, 1], 4, 2, rng, layer=layer)


@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_threads_does_not_matter(seed):
    rng = np.random.default_rng(12)
    cache = make_cache("k4v4", 128, 16)
    ids = fill(cache, [100, 17], rng)
    first = check(cache, ids, [1, 2], 4, 2, np.random.default_rng(13))
    second = check(cache, ids, [1, 2], 4, 2, np.random.default_rng(13), seed=seed)
    for a, b in zip(first, second):
        assert np.array_equal(a, b)


def test_a_sequence_gets_the_same_result_alone_and_in_a_batch():
    rng = np.random.default_rng(14)
    cache = make_cache("k3v3", 128, 64)
    ids = fill(cache, [150, 70, 300], rng)
    queries = rng.standard_normal((3, HEADS * 4, 128)).astype(np.float32)
    device = DeviceAttention(cache.backend)
    splits = np.full(3, 2, np.int32)

    def attend(chosen):
        seqs = [ids[i] for i in chosen]
        table, reads = cache.tables.block_table(seqs), cache.tables.reads(seqs, False)
        return device.attend(queries[chosen], table, reads, 0.1, splits=splits[: len(chosen)])

    out, lse = attend([0, 1, 2])
    for i in range(3):
        alone, alone_lse = attend([i])
        assert np.array_equal(alone[0], out[i]) and np.array_equal(alone_lse[0], lse[i])


def test_entries_outside_the_read_ranges_are_never_followed():
    rng = np.random.default_rng(15)
    cache = make_cache("k4v4", 64, 16)
    ids = fill(cache, [200], rng)
    cache.tables.set_start(ids[0], 20, 120)
    table, reads = cache.tables.block_table(ids), cache.tables.reads(ids, False)
    queries = rng.standard_normal((1, 8, 64)).astype(np.float32)
    device = DeviceAttention(cache.backend)
    want = device.attend(queries, table, reads, 0.1)
    wild = table.copy()
    wild[0, 2:7] = 2**30
    got = device.attend(queries, wild, reads, 0.1)
    assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])


def test_a_sequence_with_nothing_to_read_is_zero_with_an_lse_of_minus_infinity():
    rng = np.random.default_rng(16)
    cache = make_cache("k4v4", 64, 16)
    ids = fill(cache, [40, 16], rng)
    reads = cache.tables.reads(ids, False)
    reads = reads._replace(stop=reads.stop * [0, 1])
    queries = rng.standard_normal((2, 8, 64)).astype(np.float32)
    table = cache.tables.block_table(ids)
    out, lse = DeviceAttention(cache.backend).attend(queries, table, reads, 0.1)
    assert np.isneginf(lse[0]).all() and not out[0].any()
    assert np.isfinite(lse[1]).all() and out[1].any()
