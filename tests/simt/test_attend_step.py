"""A whole attention step by the kernels' source: plan, rotate, attend, merge, against float64."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.backends.attend_kernel import attend_kernel
from pagedtq.backends.attend_shape import attend_shape, table_entries
from pagedtq.backends.kernel_tables import stream_tables
from pagedtq.backends.page_launches import lanes_of
from pagedtq.backends.states import add_sink, merge_states
from pagedtq.paging.kernel_macros import DTYPE_NUMBERS
from tests.reference import relative_error, softmax_attention
from tests.simt.harness import compile_kernels
from tests.simt.test_attend import BOUND, HEADS, fill, make_cache

THREADS = 128


def step(
    cache,
    queries,
    ids,
    q_lens,
    sm_scale,
    *,
    max_units=12,
    other=None,
    sinks=None,
    overlay=False,
    int8_values=None,
    seed=0,
):
    """Run the kernels as a CUDA backend would, and return ``out, lse`` and the plan.

    ``overlay``: sinks and ring are read from the exact window and make up ``other``.
    """
    config, backend, layout = cache.config, cache.backend, cache.backend.layout
    dim, heads = config.head_dim, config.num_kv_heads
    tokens, num_q_heads = queries.shape[:2]
    group = num_q_heads // heads
    keys, values = (None if c is None else stream_tables(c) for c in backend.layers[0].codecs)
    projection = None if keys is None else backend.layers[0].codecs[0].projection
    table = cache.tables.block_table(ids)
    reads = np.stack(list(cache.tables.reads(ids, overlay)))
    starts = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    kernel = attend_kernel(layout, 0, max(q_lens) * group, False, int8_values=int8_values)
    macros = {**layout.kernel_macros(0), "INPUT_DTYPE": DTYPE_NUMBERS["f32"]}
    num_rows = tokens * num_q_heads
    grid = -(-num_rows * lanes_of(dim) // THREADS)
    if overlay:
        other = attend_overlay(cache, queries, ids, reads, starts, macros, sm_scale, seed)

    units = np.full(max_units, 99, np.int32)
    first, splits = np.full((2, len(ids)), 99, np.int32)
    compile_kernels("plan_splits.cu").launch(
        "plan_splits", 1, 256, reads, starts,
        *map(np.int32, (len(ids), group, kernel.columns, kernel.tile_tokens, 1, max_units)),
        units, first, splits, seed=seed,
    )  # fmt: skip
    rows, sketches = np.zeros((2, num_rows, dim), np.uint16)
    scales, offsets = np.full((2, num_rows), np.nan, np.float32)
    mean = None if keys is None else keys.mean
    compile_kernels("rotate_queries.cu", macros).launch(
        "rotate_queries", grid, THREADS, queries,
        *map(np.int32, (num_rows, num_q_heads, group)), np.float32(sm_scale),
        None if keys is None else keys.rotation, mean,
        None if keys is None else keys.projection,
        np.float32(0 if projection is None else projection.factor),
        rows, scales, sketches, offsets if mean is not None else None, seed=seed,
    )  # fmt: skip
    shape = attend_shape(
        layout, 0, table_stride=table.shape[1], batch=len(ids), group=group,
        has_offsets=mean is not None, int8_values=kernel.int8_values,
    )  # fmt: skip
    codecs = config.layer_codecs(0)
    part_outs = np.full((max_units, heads, kernel.columns, dim), np.nan, np.float32)
    part_lses = np.full(part_outs.shape[:3], np.nan, np.float32)
    compile_kernels("attend.cu", kernel.macros()).launch(
        "attend", (max_units, heads), THREADS, backend.pool, shape, table, reads, starts, rows,
        scales, sketches, offsets, *(table_entries(codec, dim) for codec in codecs), units, first,
        splits, part_outs, part_lses, seed=seed,
    )  # fmt: skip
    out = np.full(queries.shape, np.nan, np.float32)
    lse = np.full(queries.shape[:2], np.nan, np.float32)
    other_out, other_lse = (None, None) if other is None else other
    compile_kernels("merge.cu", macros).launch(
        "merge", grid, THREADS, part_outs, part_lses, np.int32(kernel.columns), starts, first,
        splits, *map(np.int32, (len(ids), num_rows, num_q_heads, group)),
        None if values is None else values.inverse_rotation, other_out, other_lse, sinks, out, lse,
        seed=seed,
    )  # fmt: skip
    return out, lse, (units, first, splits)


def attend_overlay(cache, queries, ids, reads, starts, macros, sm_scale, seed):
    """Run the exact window's kernel: ``out, lse`` over sinks and ring."""
    window, heads = cache.backend.layers[0].window, cache.config.num_kv_heads
    out = np.full(queries.shape, np.nan, np.float32)
    lse = np.full(queries.shape[:2], np.nan, np.float32)
    compile_kernels("attend_window.cu", macros).launch(
        "attend_window", -(-lse.size // 4), THREADS, queries, reads, reads[0].copy(), starts,
        cache.tables.window_slots(ids), cache.tables.sink_records(ids),
        window.ring, np.int32(window.rows), window.sink, np.int32(window.sinks),
        *map(np.int32, (len(ids), lse.size, queries.shape[1], heads)),
        np.float32(sm_scale), np.float32(0), np.int32(-1), out, lse, seed=seed,
    )  # fmt: skip
    return out, lse


def expected(cache, queries, ids, q_lens, sm_scale):
    outs, lses, at = [], [], 0
    for seq, count in zip(ids, q_lens):
        keys, values, positions = cache.load(0, seq)
        ends = np.arange(cache.length(seq) - count, cache.length(seq))
        part = queries[at : at + count]
        out, lse = softmax_attention(part, keys, values, positions, ends, sm_scale)
        outs.append(out), lses.append(lse)
        at += count
    return np.concatenate(outs), np.concatenate(lses)


@pytest.mark.parametrize(
    ("name", "head_dim", "group", "q_lens"),
    [
        ("k4v4", 128, 4, (1, 1, 1)),
        ("k3v3", 96, 3, (1, 5, 2)),
        ("prod4v4", 64, 8, (1, 1, 1)),
        ("orthogonal4v4", 64, 2, (2, 1, 1)),
        ("exact", 64, 5, (1, 1, 1)),
        ("k4v4", 20, 2, (1, 1, 1)),
    ],
)
def test_a_step_equals_float64_on_the_decoded_vectors(name, head_dim, group, q_lens):
    rng = np.random.default_rng(1)
    means = None if name == "exact" else rng.standard_normal((1, HEADS, head_dim))
    cache = make_cache(name, head_dim, 16, None if means is None else means.astype(np.float32))
    ids = fill(cache, [70, 5, 33], rng)
    queries = rng.standard_normal((sum(q_lens), HEADS * group, head_dim)).astype(np.float32)
    for sm_scale in (head_dim**-0.5, -0.1, 0.0):
        out, lse, _ = step(cache, queries, ids, q_lens, sm_scale)
        want, want_lse = expected(cache, queries, ids, q_lens, sm_scale)
        assert relative_error(out, want) <= BOUND
        np.testing.assert_allclose(lse, want_lse, rtol=0, atol=BOUND)


def test_an_exact_state_and_learned_sinks_join_after_the_rotation():
    rng = np.random.default_rng(2)
    cache = make_cache("k4v4", 128, 16)
    ids, q_lens = fill(cache, [50, 20], rng), (1, 1)
    queries = rng.standard_normal((2, 8, 128)).astype(np.float32)
    other = (
        rng.standard_normal((2, 8, 128)).astype(np.float32),
        np.float32(3) + np.zeros((2, 8), np.float32),
    )
    other[1][1, :4] = -np.inf
    sinks = rng.standard_normal(8).astype(np.float32)
    out, lse, _ = step(cache, queries, ids, q_lens, 0.1, other=other, sinks=sinks)
    state = expected(cache, queries, ids, q_lens, 0.1)
    state = merge_states((state[0], other[0]), (state[1], other[1].astype(np.float64)))
    want, want_lse = add_sink(*state, sinks)
    assert relative_error(out, want) <= BOUND
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=BOUND)


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e4, 1e8])
def test_queries_of_any_magnitude_are_scaled_into_the_range_of_f16(magnitude):
    rng = np.random.default_rng(3)
    cache = make_cache("k4v4", 64, 16)
    ids = fill(cache, [40], rng)
    queries = (magnitude * rng.standard_normal((1, 4, 64))).astype(np.float32)
    sm_scale = float(np.float32(0.1 / max(magnitude, 1e-20)))
    out, lse, _ = step(cache, queries, ids, (1,), sm_scale)
    want, want_lse = expected(cache, queries, ids, (1,), sm_scale)
    assert relative_error(out, want) <= BOUND
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=BOUND)


@pytest.mark.parametrize(("units", "int8_values"), [(1, False), (12, False), (1, True)])
def test_a_long_tail_below_one_dominant_token_does_not_underflow(units, int8_values):
    # One token takes 99 % of the mass; the tail shares a direction that must not be lost, beside
    # that token in a warp's sums nor, most of it in units of its own, in the merge.
    rng = np.random.default_rng(10)
    cache = make_cache("k4v4", 64, 64, num_pages=600)
    seq, length = cache.open(), 32768
    keys = np.zeros((1, length, HEADS, 64), np.float32)
    values = 0.1 * rng.standard_normal(keys.shape).astype(np.float32)
    values += 10 * rng.standard_normal(64).astype(np.float32)
    keys[0, 777] = rng.standard_normal(64).astype(np.float32)
    values[0, 777] = 10 * rng.standard_normal((HEADS, 64)).astype(np.float32)
    cache.append(seq, keys, values)
    query = np.repeat(keys[0, 777], 4, axis=0)[None]
    sm_scale = float(np.log(99 * length) / (query**2).sum(-1).min())
    out, lse, (_, _, splits) = step(
        cache, query, [seq], (1,), sm_scale, max_units=units, int8_values=int8_values
    )
    assert splits[0] == units
    want, want_lse = expected(cache, query, [seq], (1,), sm_scale)
    assert relative_error(out, want) <= BOUND
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=BOUND)
    alone = cache.load(0, seq)[1][777].repeat(4, axis=0)

    def tail(state):
        share = (state[0] * alone).sum(-1) / (alone**2).sum(-1)
        return state[0] - alone * share[:, None]

    assert relative_error(tail(out), tail(want)) <= 0.02


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("batch", "max_units"), [(1, 1), (1, 40), (7, 7), (7, 64), (300, 700)])
def test_a_plan_covers_every_column_tile_once_in_equal_parts(batch, max_units, seed):
    rng = np.random.default_rng(batch + max_units)
    lengths = rng.integers(1, 5000, batch)
    reads = np.zeros((5, batch), np.int64)
    reads[0] = reads[2] = lengths
    reads[3], reads[4] = lengths // 5, lengths // 3
    q_lens = np.ones(batch, np.int64) if batch == max_units else rng.integers(0, 4, batch)
    starts = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
    units, first, splits = np.full(max_units, 99, np.int32), *np.full((2, batch), 99, np.int32)
    compile_kernels("plan_splits.cu").launch(
        "plan_splits", 1, 256, reads, starts, *map(np.int32, (batch, 6, 8, 64, 2, max_units)),
        units, first, splits, seed=seed,
    )  # fmt: skip
    tiles = -(-q_lens * 6 // 8)
    assert np.array_equal(first, np.cumsum(tiles * splits) - tiles * splits)
    listed = np.repeat(np.arange(batch), tiles * splits)
    assert len(listed) <= max_units
    assert np.array_equal(units[: len(listed)], listed)
    assert (units[len(listed) :] == -1).all()
    # Longer sequences never get fewer parts, and nobody gets parts below the minimum.
    readable = -(-(lengths - (reads[4] - reads[3])) // 64)
    assert (np.diff(splits[np.argsort(readable, kind="stable")]) >= 0).all()
    assert (splits <= np.maximum(-(-readable // 2), 1)).all()
    if batch == 1 and max_units == 40:
        assert splits[0] > 1 or readable[0] <= 2
