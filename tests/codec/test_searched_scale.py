"""Codes searched over stretches: never worse than unsearched ones, and by how much better."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.codec import TurboQuantCodec
from pagedtq.config import TurboQuant


def build(head_dim, bits, scale):
    config = TurboQuant(bits=bits, scale=scale)
    return TurboQuantCodec(config, head_dim, 2, seed=3, layer=1, stream="key")


def gaussian(tokens, head_dim, seed=0):
    return np.random.default_rng(seed).standard_normal((tokens, 2, head_dim)).astype(np.float32)


def errors(codec, vectors):
    """Squared error of each vector, relative to its square."""
    decoded = codec.decode(codec.encode(vectors), np.float64)
    squares = np.sum(vectors.astype(np.float64) ** 2, axis=2)
    return np.sum((decoded - vectors) ** 2, axis=2) / squares


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("bits", range(1, 9))
def test_searched_codes_are_nearest_in_direction_of_all_stretches(head_dim, bits):
    codec = build(head_dim, bits, "searched")
    vectors = gaussian(60, head_dim, seed=bits) * np.float32(0.3)
    rotations = codec.rotation.forward(np.repeat(np.eye(head_dim)[:, None], 2, axis=1))
    unit = vectors / np.linalg.norm(vectors.astype(np.float64), axis=2, keepdims=True)
    sizes = np.abs(np.sqrt(head_dim) * np.einsum("thd,dhe->the", unit, rotations))
    magnitudes = np.abs(codec.book.table.astype(np.float64))[: 1 << (bits - 1)]
    cosines = []
    for sixteenths in range(13, 21):
        stretched = sizes * sixteenths / 16
        at = np.sum(stretched[..., None] >= codec.book.midpoints.astype(np.float64), axis=-1)
        chosen = magnitudes[at]
        cosines.append(
            np.sum(chosen * sizes, axis=2) / np.sqrt(np.sum(chosen**2, axis=2) * head_dim)
        )
    best = np.max(cosines, axis=0)
    codes = codec.unpack(codec.encode(vectors))
    got = np.abs(codec.book.table.astype(np.float64))[codes]
    found = np.sum(got * sizes, axis=2) / np.sqrt(np.sum(got**2, axis=2) * head_dim)
    # A coordinate within rounding of a midpoint may fall on either side, and cost next to nothing.
    assert found == pytest.approx(best, abs=2e-5)
    assert np.mean(found >= best - 1e-7) > 0.9


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_vector_is_coded_worse_than_without_the_search(bits):
    vectors = gaussian(300, 128, seed=bits)
    searched = errors(build(128, bits, "searched"), vectors)
    plain = errors(build(128, bits, "norm_corrected"), vectors)
    # What the rounding of the stored norm adds is all that can go wrong.
    assert np.all(np.sqrt(searched) <= np.sqrt(plain) + 2.0**-11)


@pytest.mark.parametrize(
    ("head_dim", "bits", "share"),
    [(64, 4, 0.80), (128, 4, 0.86), (64, 3, 0.905), (128, 3, 0.945), (64, 2, 0.982)],
)
def test_the_search_saves_a_known_share_of_the_error(head_dim, bits, share):
    vectors = gaussian(4000, head_dim)
    searched = errors(build(head_dim, bits, "searched"), vectors).mean()
    plain = errors(build(head_dim, bits, "norm_corrected"), vectors).mean()
    assert searched / plain == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_searched_vectors_keep_their_norm_and_zero_stays_zero(bits):
    codec = build(64, bits, "searched")
    vectors = gaussian(100, 64) * np.float32(5)
    vectors[3] = 0
    decoded = codec.decode(codec.encode(vectors), np.float64)
    norms = np.linalg.norm(vectors.astype(np.float64), axis=2)
    assert np.linalg.norm(decoded, axis=2) == pytest.approx(norms, rel=2.0**-11 * 1.001)
    assert not decoded[3].any()
