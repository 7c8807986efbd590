"""The score kernel's own source against float64 on the decoded keys, run on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.backends.attend_kernel import attend_kernel
from pagedtq.backends.attend_shape import attend_shape, table_entries
from pagedtq.backends.host_score import Scores
from pagedtq.backends.host_score import page_stats as host_page_stats
from pagedtq.backends.queries import check_queries, prepare_queries
from pagedtq.backends.score_places import (
    block_counts,
    page_stats,
    score_starts,
    stats_places,
)
from tests.parity.matrix import ALL_EXACT
from tests.reference import scores as exact_scores
from tests.simt.device_attention import f16_rows, share_out
from tests.simt.device_layer import run
from tests.simt.harness import compile_kernels
from tests.simt.test_attend import BOUND, HEADS, fill, make_cache


def score(cache, queries, ids, splits, seed=0, reads=None, table=None):
    """Return ragged scores ``[num_q_heads, total]`` and where each sequence and block begins."""
    backend, layout = cache.backend, cache.backend.layout
    dim, host = cache.config.head_dim, cache.backend.layers[0]
    table = cache.tables.block_table(ids) if table is None else table
    reads = cache.tables.reads(ids, False) if reads is None else reads
    tokens = check_queries(queries, reads, None, HEADS, dim, None)
    prepared = prepare_queries(tokens, host.codecs[0], host.mean, 1.0)
    group = tokens.values.shape[2]
    kernel = attend_kernel(layout, 0, group, False)
    rows, scales, power = f16_rows(prepared.keys.reshape(-1, dim), 1.0)
    sketches = offsets = None
    if prepared.qjl is not None:
        flat = prepared.qjl.reshape(-1, dim) * power[:, None]
        sketches = flat.astype(np.float16).view(np.uint16)
    if prepared.offset is not None:
        offsets = prepared.offset.astype(np.float32).reshape(-1)
    units = share_out(reads, np.ones(len(ids), int), group, kernel.columns, splits)
    shape = attend_shape(
        layout, 0, table_stride=table.shape[1], batch=len(ids), group=group,
        has_offsets=offsets is not None,
    )  # fmt: skip
    starts, block_starts = score_starts(table, reads, cache.config.page_size)
    out = np.full((HEADS * group, starts[-1]), np.nan, np.float32)
    compile_kernels("score.cu", kernel.macros()).launch(
        "score", (len(units[0]), HEADS), 128, backend.pool, shape, table,
        np.stack([reads.kv_lens, *reads[1:]]), rows, scales, sketches, offsets,
        table_entries(cache.config.layer_codecs(0)[0], dim), *units, starts, block_starts, out,
        seed=seed,
    )  # fmt: skip
    return out, (starts, block_starts)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    ("name", "head_dim", "page_size", "group"),
    [
        ("k4v4", 128, 64, 4),
        ("k3v3", 128, 16, 16),
        ("k2v2", 64, 128, 5),
        ("exact", 64, 16, 3),
        ("prod4v4", 128, 64, 8),
        ("k8v8", 64, 16, 1),
        ("k4v3", 64, 16, 8),
        ("k2v3", 64, 64, 3),
        ("k8v4", 64, 128, 5),
        ("k1v6", 64, 16, 7),
        ("f32", 64, 16, 16),
    ],
)
def test_scores_equal_float64_and_leave_out_what_is_not_readable(
    name, head_dim, page_size, group, splits
):
    rng = np.random.default_rng(1)
    centred = name not in ALL_EXACT
    means = 3 * rng.standard_normal((1, HEADS, head_dim)) if centred else None
    means = None if means is None else means.astype(np.float32)
    cache = make_cache(name, head_dim, page_size, means)
    ids = fill(cache, [1, 3 * page_size + 5, 4 * page_size, 2 * page_size + 9], rng)
    cache.tables.evict(ids[2], [1])
    cache.tables.set_start(ids[3], 5, page_size + 3)
    queries = rng.standard_normal((4, HEADS * group, head_dim)).astype(np.float32)
    got, (starts, _) = score(cache, queries, ids, np.full(4, splits, np.int32))
    again, _ = score(cache, queries, ids, np.full(4, splits, np.int32), seed=1)
    assert np.array_equal(got, again)
    for i, seq in enumerate(ids):
        keys, _, _ = cache.load(0, seq)
        want = exact_scores(queries[i], keys)
        part = got[:, starts[i] : starts[i + 1]]
        assert part.shape == want.shape
        size = np.linalg.norm(queries[i], axis=-1)[:, None] * np.linalg.norm(keys, axis=-1).max()
        assert (np.abs(part - want) <= BOUND * size).all()
        assert np.linalg.norm(part - want) <= BOUND * np.linalg.norm(want)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("page_size", "group"), [(16, 3), (128, 4)])
def test_page_statistics_equal_the_hosts_on_the_same_scores(page_size, group, seed):
    rng = np.random.default_rng(2)
    cache = make_cache("k4v4", 64, page_size)
    ids = fill(cache, [1, 5 * page_size + 3, 3 * page_size, 2 * page_size + 9], rng)
    cache.tables.evict(ids[1], [1])
    cache.tables.set_start(ids[3], 5, page_size + 3)
    queries = 3 * rng.standard_normal((4, HEADS * group, 64)).astype(np.float32)
    # Of a sequence with nothing to read there is no page.
    table, reads = cache.tables.block_table(ids), cache.tables.reads(ids, False)
    reads = reads._replace(stop=reads.stop * [1, 1, 0, 1])
    got, starts = score(cache, queries, ids, np.full(4, 2, np.int32), seed, reads=reads)
    places = stats_places(block_counts(table, reads, page_size))
    maximum, mass = np.full((2, len(got), len(places.blocks)), np.nan, np.float32)
    scale = 0.125 if seed else 1.0
    run(page_stats(got, starts, places.numbers, maximum, mass, scale), seed)
    positions = np.concatenate([_readable(table[b], reads, b, page_size) for b in range(4)])
    scores = Scores(got.astype(np.float64), starts[0], positions)
    want = host_page_stats(scores, page_size, scale)
    assert np.array_equal(places.indptr, want.indptr)
    assert np.array_equal(places.blocks, want.blocks)
    assert np.array_equal(maximum, want.maximum)
    np.testing.assert_allclose(mass, want.mass, rtol=1e-5)


def _readable(table, reads, b, page_size):
    place = np.arange(int(reads.stop[b]))
    allowed = (place < reads.keep[b]) | (place >= reads.start[b])
    return place[(place >= reads.first[b]) & allowed & (table[place // page_size] != 0)]


def test_entries_outside_the_read_ranges_are_never_followed():
    rng = np.random.default_rng(3)
    cache = make_cache("k3v3", 64, 16)
    ids = fill(cache, [200], rng)
    cache.tables.set_start(ids[0], 20, 120)
    queries = rng.standard_normal((1, HEADS * 4, 64)).astype(np.float32)
    splits = np.ones(1, np.int32)
    want, (starts, _) = score(cache, queries, ids, splits)
    wild = cache.tables.block_table(ids).copy()
    wild[0, 2:7] = 2**30
    got, (wild_starts, _) = score(cache, queries, ids, splits, table=wild)
    assert np.array_equal(starts, wild_starts) and np.array_equal(got, want)
