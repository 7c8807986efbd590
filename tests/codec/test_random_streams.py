"""Random streams: the published generator, independent of how work is split."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from pagedtq.codec.random_streams import (
    GAUSSIAN_STEP,
    random_gaussians,
    random_signs,
    random_words,
    stream_key,
)
from pagedtq.errors import ArgumentError


def test_words_are_splitmix64():
    # The generator's well-known first outputs for seed 1234567.
    assert random_words(1234567, 5).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_any_part_of_a_stream_can_be_drawn_alone():
    key = stream_key(3, 1, "key", 0)
    assert np.array_equal(random_words(key, 100)[40:60], random_words(key, 20, start=40))


def test_streams_differ_in_seed_layer_name_and_head():
    base = (0, 0, "key", 0)
    keys = {stream_key(*base)}
    for i, word in enumerate((1, 1, "value", 1)):
        keys.add(stream_key(*base[:i], word, *base[i + 1 :]))
    keys |= {stream_key(0, 0, "key_qjl", 0), stream_key(2**64 - 1, 0, "key", 0)}
    assert len(keys) == 7


def test_an_unknown_stream_is_refused():
    with pytest.raises(ArgumentError, match="stream must be one of key, value, key_qjl"):
        stream_key(0, 0, "query", 0)


def test_signs_are_balanced_and_follow_the_top_bit():
    words, signs = random_words(9, 100_000), random_signs(9, 100_000)
    assert signs.dtype == np.float32
    assert np.array_equal(signs < 0, words >> np.uint64(63) == 1)
    assert abs(signs.mean()) < 0.01


def test_gaussians_have_the_moments_of_a_normal_and_are_exact_in_float32():
    normals = random_gaussians(5, 200_001)
    assert normals.shape == (200_001,)
    assert abs(normals.mean()) < 0.01
    assert abs(normals.var() - 1) < 0.01
    assert abs((normals**4).mean() - 3) < 0.1
    assert np.array_equal(normals, normals.astype(np.float32))
    assert np.array_equal(normals / GAUSSIAN_STEP, np.rint(normals / GAUSSIAN_STEP))


def test_gaussians_are_the_same_on_every_platform():
    digest = hashlib.sha256(random_gaussians(1, 4096).astype("<f4").tobytes()).hexdigest()
    assert digest == "57cdd96916753e1f99ae3805af4a1aa6d444b90c5adc698e5a6739e1c7554aa3"
