"""Key means: right whatever the chunks, and refused where they would mean nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedtq.codec.key_means import MIN_TOKENS, KeyMeanAccumulator
from pagedtq.errors import ArgumentError, ArgumentTypeError, NonFiniteError

LAYERS, HEADS, DIM = 2, 3, 8


def keys(count, seed=0, offset=0.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((LAYERS, count, HEADS, DIM)) + offset).astype(np.float32)


def gathered(tokens, cuts=()):
    sums = KeyMeanAccumulator(LAYERS, HEADS, DIM)
    bounds = [0, *cuts, tokens.shape[1]]
    for begin, end in itertools.pairwise(bounds):
        for layer in range(LAYERS):
            sums.add(layer, tokens[layer, begin:end])
    return sums


@given(
    cuts=st.lists(st.integers(0, 300), max_size=4).map(sorted),
    offset=st.sampled_from([0.0, -3.0, 1e4]),
)
def test_means_are_the_float64_means_whatever_the_chunks(cuts, offset):
    tokens = keys(300, offset=offset)
    means = gathered(tokens, cuts).means()
    assert means.dtype == np.float32
    exact = tokens.astype(np.float64).mean(axis=1)
    assert np.abs(means - exact).max() <= np.spacing(np.float32(np.abs(exact).max()))


def test_too_few_tokens_are_refused_with_the_layer_that_lacks_them():
    sums = gathered(keys(MIN_TOKENS))
    sums.means()
    sums.add(0, keys(1)[0])
    with pytest.raises(ArgumentError, match=r"at least 129 tokens, layer 1 has seen 128"):
        sums.means(129)
    with pytest.raises(ArgumentError, match="layer 0 has seen 0"):
        KeyMeanAccumulator(LAYERS, HEADS, DIM).means()


@pytest.mark.parametrize("offset", [0.0, 5.0, 1e6])
def test_a_head_whose_keys_are_all_the_same_is_refused(offset):
    tokens = keys(200)
    tokens[1, :, 2] = tokens[1, 0, 2] + np.float32(offset)
    with pytest.raises(ArgumentError, match="all keys of layer 1, head 2 are the same"):
        gathered(tokens, [50, 60]).means()


def test_a_small_spread_around_a_large_mean_is_no_repetition():
    tokens = keys(200)
    tokens = (100 + tokens * 1e-2).astype(np.float32)
    assert np.abs(gathered(tokens).means() - 100).max() < 0.01


def test_bad_keys_are_refused_and_add_nothing():
    sums = gathered(keys(200))
    before = sums.means()
    bad = keys(5)[0]
    bad[4, 2, 7] = np.nan
    with pytest.raises(NonFiniteError):
        sums.add(0, bad)
    with pytest.raises(ArgumentTypeError):
        sums.add(0, keys(5)[0].astype(np.float64))
    with pytest.raises(ArgumentError):
        sums.add(0, keys(5)[0][:, :2])
    with pytest.raises(ArgumentError, match=r"layer must be in \[0, 1\], got 2"):
        sums.add(2, keys(5)[0])
    assert np.array_equal(sums.means(), before)
    assert sums.num_tokens.tolist() == [200, 200]
