"""Which tiles and pages a unit of the attention kernel goes over, at the edges of what is read."""

from __future__ import annotations

import numpy as np

from tests.simt.device_attention import DeviceAttention
from tests.simt.test_attend import HEADS, check, fill, make_cache


def attend(cache, queries, table, reads, q_lens=None, **options):
    """Return ``out, lse`` of one part per sequence."""
    return DeviceAttention(cache.backend).attend(queries, table, reads, 0.1, q_lens, **options)


def test_a_tile_that_holds_both_ends_of_a_hole_counts_once():
    rng = np.random.default_rng(1)
    cache = make_cache("k4v4", 64, 64)
    ids = fill(cache, [200], rng)
    cache.tables.set_start(ids[0], 3, 9)
    for splits in (1, 3):
        check(cache, ids, [1], 4, splits, rng)


def test_a_larger_value_norm_counts_wherever_it_comes():
    cache = make_cache("k4v4", 64, 64)
    # Of two tiles a warp takes, weights follow the first: a later norm, of the even token of a
    # pair or of the odd one, must raise their reference by itself, since no score does.
    for token in (300, 301):
        rng = np.random.default_rng(token)
        keys, values = rng.standard_normal((2, 1, 320, HEADS, 64)).astype(np.float32)
        values[0, token] *= 1e3
        seq = cache.open()
        cache.append(seq, keys, values)
        check(cache, [seq], [1], 4, 1, rng, sm_scale=0.0)


def test_pages_below_a_sliding_window_are_not_followed():
    rng = np.random.default_rng(2)
    cache = make_cache("k4v4", 64, 16)
    ids = fill(cache, [100], rng)
    table, reads = cache.tables.block_table(ids), cache.tables.reads(ids, False)
    queries = rng.standard_normal((2, 4 * HEADS, 64)).astype(np.float32)
    wild = table.copy()
    # The first of the query tokens is at 98, and reads from 78 on.
    wild[0, :4] = 2**30
    want, got = (attend(cache, queries, t, reads, [2], window_left=20) for t in (table, wild))
    assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])


def test_pages_above_the_last_query_token_are_not_followed():
    rng = np.random.default_rng(3)
    cache = make_cache("k4v4", 64, 16)
    ids = fill(cache, [100], rng)
    table, reads = cache.tables.block_table(ids), cache.tables.reads(ids, False)
    queries = rng.standard_normal((2, 4 * HEADS, 64)).astype(np.float32)
    # A sequence of 60 tokens in pages of a longer one: what is readable ends at 100 nevertheless.
    reads = reads._replace(kv_lens=reads.kv_lens - 40)
    wild = table.copy()
    wild[0, 4:] = 2**30
    want, got = (attend(cache, queries, t, reads, [2]) for t in (table, wild))
    assert np.array_equal(got[0], want[0]) and np.array_equal(got[1], want[1])
