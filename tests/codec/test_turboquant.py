"""TurboQuant MSE: codes of an independent float64 encoder, distortion, scales, special vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedtq.codec import TurboQuantCodec
from pagedtq.codec.codebook import codebook
from pagedtq.config import TurboQuant
from pagedtq.errors import ConfigError

SCALES = ("none", "norm_corrected", "unbiased")


def gaussian(tokens, heads, head_dim, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((tokens, heads, head_dim)).astype(np.float32)


def build(head_dim=128, heads=2, bits=4, mean=None, stream="key", **fields):
    config = TurboQuant(bits=bits, **fields)
    return TurboQuantCodec(config, head_dim, heads, seed=3, layer=1, stream=stream, mean=mean)


def reference_coordinates(codec, vectors):
    """Unit-variance coordinates in float64 from the matrices of the rotation."""
    d, heads = codec.head_dim, codec.num_heads
    eye = np.repeat(np.eye(d)[:, None], heads, axis=1)
    matrices = codec.rotation.forward(eye)
    x = vectors.astype(np.float64)
    if codec.mean is not None:
        # The subtraction is defined in float32.
        x = (vectors - codec.mean).astype(np.float64)
    norms = np.sqrt(np.sum(x**2, axis=2))
    rotated = np.einsum("thd,dhe->the", x, matrices)
    return np.sqrt(d) * rotated / norms[..., None], norms


@pytest.mark.filterwarnings("ignore::pagedtq.codec.DenseRotationWarning")
@pytest.mark.parametrize("head_dim", [7, 64, 80, 100, 112, 128, 256])
@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_are_those_of_a_float64_encoder_except_on_a_border(head_dim, bits):
    rotation = "dense" if head_dim == 100 else "hadamard"
    codec = build(head_dim, bits=bits, rotation=rotation)
    vectors = gaussian(40, 2, head_dim, seed=bits) * np.float32(3.7)
    u, norms = reference_coordinates(codec, vectors)
    magnitudes = codebook(head_dim, bits).magnitudes
    nearest = np.argmin(np.abs(np.abs(u)[..., None] - magnitudes), axis=-1)
    expected = nearest | (u < 0).astype(int) << (bits - 1)
    encoded = codec.encode(vectors)
    codes = codec.unpack(encoded)
    borders = np.append((magnitudes[1:] + magnitudes[:-1]) / 2, 0.0)
    near_border = np.abs(np.abs(u)[..., None] - borders).min(axis=-1) < 1e-5
    assert np.array_equal(codes[~near_border], expected[~near_border])
    assert near_border.mean() < 0.01

    # The stored norm, from the codes, in float64 (norm_corrected is the default).
    table = codec.book.table.astype(np.float64)[codes]
    stored = norms / np.sqrt(np.sum(table**2, axis=2))
    assert encoded.norms == pytest.approx(stored, rel=2.0**-11 * 1.001)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("bits", range(1, 9))
def test_distortion_is_the_exact_one_within_one_percent(head_dim, bits):
    codec = build(head_dim, heads=1, bits=bits, scale="none")
    vectors = gaussian(6000 if bits < 7 else 20_000, 1, head_dim, seed=10 * bits)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    error = codec.decode(codec.encode(vectors)) - vectors
    measured = np.mean(np.sum(np.square(error, dtype=np.float64), axis=2))
    assert measured == pytest.approx(codec.book.optimal_distortion, rel=0.01)


@pytest.mark.parametrize("head_dim", [80, 96, 100, 112, 192])
def test_other_dimensions_reach_the_distortion_of_their_density(head_dim):
    rotation = "dense" if head_dim == 100 else "hadamard"
    codec = build(head_dim, heads=1, scale="none", rotation=rotation)
    vectors = gaussian(3000, 1, head_dim)
    error = codec.decode(codec.encode(vectors)) - vectors
    assert np.sum(error**2) / np.sum(vectors**2) == pytest.approx(codec.book.distortion, rel=0.015)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_constant_and_one_hot_vectors_are_quantised_like_any_other(head_dim):
    codec = build(head_dim, heads=8, scale="none")
    constant = np.ones((1, 8, head_dim), np.float32)
    one_hot = np.repeat(np.eye(head_dim, dtype=np.float32)[:, None], 8, axis=1)
    for vectors in (constant, one_hot):
        error = codec.decode(codec.encode(vectors)) - vectors
        # Only the signs are random here, so the spread is wide; without them it is 78 times.
        assert np.sum(error**2) / np.sum(vectors**2) < 4 * codec.book.distortion


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", [80, 128])
def test_norm_corrected_decodes_to_the_exact_norm(head_dim, bits):
    codec = build(head_dim, bits=bits, scale="norm_corrected")
    vectors = gaussian(100, 2, head_dim) * np.float32(5)
    decoded = codec.decode(codec.encode(vectors), np.float64)
    norms = np.linalg.norm(vectors.astype(np.float64), axis=2)
    # One fp16 rounding of the stored norm.
    assert np.linalg.norm(decoded, axis=2) == pytest.approx(norms, rel=2.0**-11 * 1.001)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", [80, 128])
def test_unbiased_scale_keeps_the_product_with_the_vector(head_dim, bits):
    codec = build(head_dim, bits=bits, scale="unbiased")
    vectors = gaussian(100, 2, head_dim) * np.float32(0.2)
    decoded = codec.decode(codec.encode(vectors), np.float64)
    squares = np.sum(vectors.astype(np.float64) ** 2, axis=2)
    products = np.sum(decoded * vectors, axis=2)
    assert products == pytest.approx(squares, rel=2.0**-11 * 1.002)


@pytest.mark.parametrize("bits", range(1, 9))
def test_scale_none_stores_the_norm_times_the_factor(bits):
    codec = build(bits=bits, scale="none")
    vectors = gaussian(50, 2, 128)
    norms = np.linalg.norm(vectors, axis=2) * codec.book.factor
    assert codec.encode(vectors).norms == pytest.approx(norms, rel=2.0**-11 * 1.001)


def test_scales_share_their_codes():
    vectors = gaussian(50, 2, 128)
    codes = [build(scale=scale).encode(vectors).codes for scale in SCALES]
    assert np.array_equal(codes[0], codes[1])
    assert np.array_equal(codes[0], codes[2])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", [1, 3, 4, 7])
def test_zero_vectors_come_back_as_zeros(bits, scale):
    codec = build(bits=bits, scale=scale)
    vectors = gaussian(5, 2, 128)
    vectors[1], vectors[3, 1] = 0, -0.0
    vectors[2, 0] = 1e-30
    encoded = codec.encode(vectors)
    decoded = codec.decode(encoded)
    for token, head in ((1, 0), (1, 1), (3, 1), (2, 0)):
        assert encoded.norms[token, head] == 0
        assert not codec.unpack(encoded)[token, head].any()
        assert not decoded[token, head].any()
    assert decoded[0].any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_stored_norms_of_ordinary_vectors_are_normal_fp16(head_dim, bits, scale):
    codec = build(head_dim, heads=1, bits=bits, scale=scale)
    vectors = gaussian(200, 1, head_dim)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    for norm in (1e-3, 1.0, 1e3):
        stored = codec.encode(vectors * np.float32(norm)).norms
        assert stored.min() >= np.finfo(np.float16).tiny
        assert np.isfinite(stored).all()
        # The factor lies in [0.5, 1); the unbiased scale adds up to pi / 2 at one bit.
        assert 0.4 * norm < stored.min()
        assert stored.max() < 1.75 * norm


@pytest.mark.parametrize("scale", SCALES)
def test_the_largest_admitted_norm_is_stored_finite(scale):
    codec = build(scale=scale, bits=1)
    vectors = gaussian(100, 2, 128)
    vectors *= np.float32(32750) / np.linalg.norm(vectors, axis=2, keepdims=True)
    codec.validate(vectors)
    assert np.isfinite(codec.encode(vectors).norms).all()
    # A single rotated coordinate holds everything: the worst case of the folded scales.
    spike = np.zeros((1, 2, 128), np.float32)
    spike[..., 5] = 32750
    assert np.isfinite(build(scale=scale).encode(codec.rotation.inverse(spike)).norms).all()


def test_scaling_a_vector_by_a_power_of_two_scales_only_the_norm():
    codec = build()
    vectors = gaussian(20, 2, 128)
    one, eight = codec.encode(vectors), codec.encode(vectors * np.float32(8))
    assert np.array_equal(one.codes, eight.codes)
    assert np.array_equal(one.norms * np.float16(8), eight.norms)


@given(
    head_dim=st.sampled_from([4, 16, 96, 80, 128]),
    bits=st.integers(1, 8),
    exponent=st.integers(-9, 12),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=40)
def test_no_rotated_coordinate_changes_its_sign(head_dim, bits, exponent, seed):
    codec = build(head_dim, heads=1, bits=bits)
    rng = np.random.default_rng(seed)
    vectors = (rng.standard_normal((8, 1, head_dim)) * 2.0**exponent).astype(np.float32)
    encoded = codec.encode(vectors)
    products = codec.rotation.forward(vectors) * codec.decode_rotated(encoded)
    norms = np.linalg.norm(vectors, axis=2)
    assert np.all(products >= -1e-6 * norms[..., None] ** 2)
    # With equal norms this bounds the error: the angle is at most a right one.
    error = np.linalg.norm(codec.decode(encoded) - vectors, axis=2)
    assert np.all(error <= 1.4143 * (1 + 2.0**-11) * norms)


def test_a_mean_is_subtracted_before_and_added_after():
    mean = gaussian(1, 2, 128, seed=9)[0] * np.float32(20)
    vectors = gaussian(500, 2, 128)
    plain, centred = build(), build(mean=mean)
    encoded = centred.encode(vectors + mean)
    assert np.array_equal(encoded.codes, plain.encode((vectors + mean) - mean).codes)
    error = centred.decode(encoded) - (vectors + mean)
    assert np.sum(error**2) / np.sum(vectors**2) < 1.01 * centred.book.distortion
    # What is not centred pays for the length of the mean.
    error = plain.decode(plain.encode(vectors + mean)) - (vectors + mean)
    assert np.sum(error**2) / np.sum(vectors**2) > 100 * plain.book.distortion


def test_a_vector_equal_to_the_mean_comes_back_exactly():
    mean = gaussian(1, 2, 128)[0]
    codec = build(mean=mean)
    assert np.array_equal(codec.decode(codec.encode(mean[None]))[0], mean)


@pytest.mark.parametrize("mean", [False, True])
def test_inner_products_are_those_with_the_decoded_vectors(mean):
    codec = build(mean=gaussian(1, 2, 128, seed=4)[0] if mean else None)
    vectors, queries = gaussian(30, 2, 128), gaussian(5, 6, 128, seed=1).astype(np.float64)
    encoded = codec.encode(vectors)
    keys = np.repeat(codec.decode(encoded, np.float64), 3, axis=1)
    expected = np.einsum("bhd,thd->bht", queries, keys)
    assert codec.inner_products(queries, encoded) == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_keys_and_values_are_rotated_differently():
    vectors = gaussian(10, 2, 128)
    key, value = build(bits=2), build(bits=2, stream="value")
    assert not np.array_equal(key.encode(vectors).codes, value.encode(vectors).codes)


def test_what_has_no_codec_is_refused():
    with pytest.raises(ConfigError, match='must be "key" or "value"'):
        build(stream="query")
    with pytest.raises(ConfigError, match='cannot use estimator "prod"'):
        build(stream="value", estimator="prod")
