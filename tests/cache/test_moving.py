"""Moving a cache into another of a different size keeps every byte that counts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedtq import KeepFirstLast, PagedKVCache
from pagedtq.cache import move_sequences
from pagedtq.errors import ArgumentError, OutOfPages, OutOfWindowSlots, StepError
from tests.cache.bank import FORMATS, LAYERS, make_config

MEANS = np.random.default_rng(3).standard_normal((LAYERS, 2, 16)).astype(np.float32)


def tokens(count, seed):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((LAYERS, count, 2, 16)).astype(np.float32) for _ in range(2))


def busy(name, window, **fields):
    """Sequences of several lengths, a fork that shares an open page, one cut, one evicted."""
    config = make_config(
        name, num_pages=40, page_size=16, window=window, sinks=3, num_window_slots=6, **fields
    )
    cache = PagedKVCache(config, key_means=MEANS, debug=True)
    ids = [cache.open() for _ in range(4)]
    for seq_id, length in zip(ids, (70, 33, 100, 0)):
        if length:
            cache.append(seq_id, *tokens(length, seq_id % 97))
    ids.append(cache.fork(ids[0]))
    cache.truncate(ids[1], 29)
    cache.evict(ids[2], KeepFirstLast(first_tokens=16, last_tokens=50))
    return cache, ids


def assert_same(one, ids, other, moved):
    other.check_integrity()
    for mine, theirs in zip(ids, moved):
        assert one.state(mine) == other.state(theirs)
        for layer in range(LAYERS):
            for a, b in zip(one.load(layer, mine), other.load(layer, theirs)):
                assert np.array_equal(a, b)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("window", [0, 16, 32])
@pytest.mark.parametrize("order", ["layer_major", "page_major"])
def test_sequences_arrive_with_all_their_bytes_and_go_on_alike(name, window, order):
    cache, ids = busy(name, window)
    config = cache.config.replace(num_pages=90, num_window_slots=9, pool_order=order)
    target = PagedKVCache(config, key_means=MEANS, debug=True)
    moved = move_sequences(cache, target).tolist()
    assert_same(cache, ids, target, moved)
    assert target.stats().pages_used == cache.stats().pages_used
    assert target.stats().pages_shared == cache.stats().pages_shared
    for mine, theirs in zip(ids, moved):
        cache.append(mine, *tokens(20, 5))
        target.append(theirs, *tokens(20, 5))
    assert_same(cache, ids, target, moved)


@given(start=st.integers(0, 70), count=st.integers(0, 70), row=st.integers(0, 3))
def test_a_range_that_is_loaded_is_that_part_of_the_whole(start, count, row):
    cache, ids = busy("k4v4", 16)
    seq_id = [ids[0], ids[1], ids[2], ids[4]][row]
    stop = min(start + count, cache.length(seq_id))
    start = min(start, stop)
    keys, values, positions = cache.load(1, seq_id)
    part = cache.load(1, seq_id, start=start, stop=stop)
    inside = (positions >= start) & (positions < stop)
    for whole, got in zip((keys, values, positions), part):
        assert np.array_equal(whole[inside], got)


def test_a_range_outside_the_sequence_is_refused():
    cache, ids = busy("k4v4", 16)
    with pytest.raises(ArgumentError, match=r"stop must be in \[0, 70\], got 71"):
        cache.load(0, ids[0], stop=71)
    with pytest.raises(ArgumentError, match=r"start must be in \[0, 20\], got 21"):
        cache.load(0, ids[0], start=21, stop=20)
    with pytest.raises(ArgumentError, match=r"positions \[64, 66\) are in the exact window only"):
        cache.load(0, ids[0], exact=False, stop=66)
    assert len(cache.load(0, ids[0], exact=False, stop=64)[2]) == 64


@pytest.mark.parametrize(
    ("changes", "means", "error"),
    [
        ({"seed": 1}, MEANS, ArgumentError),
        ({"window": 32}, MEANS, ArgumentError),
        ({}, None, ArgumentError),
        ({}, MEANS + 1, ArgumentError),
        ({"num_pages": 10}, MEANS, OutOfPages),
        ({"num_window_slots": 2}, MEANS, OutOfWindowSlots),
    ],
)
def test_a_target_that_does_not_fit_is_refused_and_unchanged(changes, means, error):
    cache, _ = busy("k4v4", 16)
    target = PagedKVCache(cache.config.replace(**changes), key_means=means, debug=True)
    pool = target.backend.pool.copy()
    with pytest.raises(error):
        move_sequences(cache, target)
    assert np.array_equal(target.backend.pool, pool)
    assert target.stats().num_sequences == 0


def test_an_open_step_is_refused():
    cache, ids = busy("k4v4", 16)
    cache.begin_step([ids[0]], 1)
    with pytest.raises(StepError):
        move_sequences(cache, PagedKVCache(cache.config, key_means=MEANS))
