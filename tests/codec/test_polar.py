"""Polar codes: what they decode to, what that costs, and that nothing else decides it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedtq import Polar
from pagedtq.codec import PolarCodec, bitpack
from pagedtq.codec.polar import bin_centres
from pagedtq.errors import ConfigError, NonFiniteError, OverflowingError

D = 64


def draw(tokens, heads=2, dim=D, seed=0):
    return np.random.default_rng(seed).standard_normal((tokens, heads, dim)).astype(np.float32)


def codec(dim=D, heads=2, stream="key", seed=3, layer=0, first_kv_head=0, mean=None, **fields):
    return PolarCodec(
        Polar(**fields),
        dim,
        heads,
        seed=seed,
        layer=layer,
        stream=stream,
        first_kv_head=first_kv_head,
        mean=mean,
    )


def same(a, b):
    parts = ("angles", "radii", "qjl_signs", "residual_norms")
    return all(np.array_equal(getattr(a, part), getattr(b, part)) for part in parts)


def relative_error(one, vectors):
    error = one.decode(one.encode(vectors), np.float64) - vectors
    return np.sum(error**2) / np.sum(vectors.astype(np.float64) ** 2)


@pytest.mark.parametrize("bits", range(1, 17))
def test_error_is_that_of_uniform_bins_decoded_at_their_centres(bits):
    half = math.pi / 2**bits
    expected = 2 * (1 - math.sin(half) / half)
    # The radii's own rounding is all that is left with many bits.
    tolerance = 0.03 * expected + (2**-24 if bits > 12 else 0)
    measured = relative_error(codec(bits=bits, radii="f32"), draw(800))
    assert measured == pytest.approx(expected, abs=tolerance)


def test_left_edges_would_cost_four_times_the_error():
    one, vectors = codec(bits=6, radii="f32"), draw(300)
    encoded = one.encode(vectors)
    rotated = one.rotation.forward(vectors.astype(np.float64))
    index = bitpack.unpack(encoded.angles, 6, D // 2)
    edge = index * (2 * math.pi / 64) - math.pi
    left = np.stack([np.cos(edge), np.sin(edge)], -1) * encoded.radii[..., None]
    error = np.sum((left.reshape(rotated.shape) - rotated) ** 2)
    centre = np.sum((one.decode_rotated(encoded, np.float64) - rotated) ** 2)
    assert error / centre == pytest.approx(4, rel=0.05)


def test_angles_do_not_turn_on_average():
    one, vectors = codec(bits=3, radii="f32"), draw(2000)
    decoded = one.decode_rotated(one.encode(vectors), np.float64)
    rotated = one.rotation.forward(vectors.astype(np.float64))
    turn = (decoded[..., 0::2] + 1j * decoded[..., 1::2]) * np.conj(
        rotated[..., 0::2] + 1j * rotated[..., 1::2]
    )
    # The mean over 128 000 pairs of an angle uniform in +-pi/8; a left edge gives -0.39.
    assert abs(np.angle(turn).mean()) < 0.003


def test_angle_on_a_border_has_a_bin():
    table = bin_centres(2, "float64")
    assert table.shape == (4, 2)
    root = math.sqrt(0.5)
    assert np.allclose(table, [[-root, -root], [root, -root], [root, root], [-root, root]])
    one = codec(dim=4, heads=1, bits=2, rotation="dense", radii="f32")
    for angle in (math.pi, -math.pi, 0.0, math.pi / 2):
        pair = [math.cos(angle), math.sin(angle)]
        vectors = one.rotation.inverse(np.array([[pair + pair]])).astype(np.float32)
        index = bitpack.unpack(one.encode(vectors).angles, 2, 2)
        assert index.max() < 4
        decoded = one.decode(one.encode(vectors))
        assert np.linalg.norm(decoded - vectors) < 2 * math.sin(math.pi / 8 + 1e-3) * math.sqrt(2)


@pytest.mark.parametrize("radii", ["f16", "f32"])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_radii_keep_their_precision(radii, scale):
    one, vectors = codec(bits=4, radii=radii), draw(100) * np.float32(scale)
    encoded = one.encode(vectors)
    assert encoded.radii.dtype == {"f16": np.float16, "f32": np.float32}[radii]
    pairs = one.rotation.forward(vectors.astype(np.float64)).reshape(100, 2, D // 2, 2)
    exact = np.hypot(pairs[..., 0], pairs[..., 1])
    step = {"f16": 2.0**-11, "f32": 2.0**-24}[radii]
    # Below 2**-14 the spacing of f16 stays what it is there.
    assert (np.abs(encoded.radii - exact) <= step * np.maximum(exact, 2.0**-14) * 1.01).all()


def test_zero_vectors_decode_to_zero():
    for fields in ({}, {"mode": "polar_qjl"}):
        one = codec(**fields)
        assert not one.decode(one.encode(np.zeros((2, 2, D), np.float32))).any()


def test_no_tokens_give_empty_rows():
    encoded = codec(mode="polar_qjl", projections=5).encode(draw(0))
    assert encoded.angles.shape == (0, 2, D // 2 * 7 // 8)
    assert encoded.radii.shape == (0, 2, D // 2)
    assert encoded.qjl_signs.shape == (0, 2, 1)
    assert encoded.residual_norms.shape == (0, 2)


# -- sketch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [16, 64, 100])
def test_sketch_makes_inner_products_unbiased(rows):
    slopes = {"polar": [], "polar_qjl": []}
    for seed in range(40):
        keys, queries = draw(60, 4, seed=seed), draw(20, 4, seed=100 + seed).astype(np.float64)
        true = np.einsum("bhd,thd->bht", queries, keys)
        for mode, bits in (("polar", 2), ("polar_qjl", 3)):
            more = {"projections": rows} if mode == "polar_qjl" else {}
            one = codec(heads=4, seed=seed, mode=mode, bits=bits, **more)
            estimate = one.inner_products(queries, one.encode(keys))
            slopes[mode].append(np.sum(estimate * true) / np.sum(true * true))
    # Two bits of angle alone shrink every product by sin(pi/4) / (pi/4).
    assert np.mean(slopes["polar"]) == pytest.approx(math.sin(math.pi / 4) * 4 / math.pi, abs=0.01)
    assert np.mean(slopes["polar_qjl"]) == pytest.approx(1, abs=0.02)


def test_sketch_is_scaled_by_the_residual_and_not_by_one():
    one, keys = codec(mode="polar_qjl", bits=5), draw(50)
    encoded = one.encode(keys)
    residual = one.rotation.forward(keys.astype(np.float64)) - one.decode_rotated(
        encoded, np.float64
    )
    exact = np.linalg.norm(residual, axis=2)
    assert np.allclose(encoded.residual_norms, exact, rtol=2**-10)
    # Estimates scale with the keys; an estimator of fixed scale would not.
    queries = draw(3, seed=9).astype(np.float64)
    small = one.inner_products(queries, one.encode(keys / 256))
    assert np.allclose(256 * small, one.inner_products(queries, encoded), rtol=5e-3, atol=5e-3)


def test_decoded_vectors_give_the_estimates():
    one, keys, queries = codec(mode="polar_qjl", bits=4, projections=24), draw(9), draw(4, seed=5)
    encoded = one.encode(keys)
    products = np.einsum("bhd,thd->bht", queries, one.decode(encoded, np.float64))
    estimates = one.inner_products(queries.astype(np.float64), encoded)
    assert np.abs(products - estimates).max() < 1e-9


def test_mean_is_taken_off_and_added_back():
    mean = 50 * draw(1, seed=7)[0]
    vectors = draw(40) + mean
    one = codec(bits=8, mean=mean)
    assert np.abs(one.decode(one.encode(vectors)) - vectors).max() < 0.2
    queries = draw(3, seed=8).astype(np.float64)
    true = np.einsum("bhd,thd->bht", queries, vectors)
    assert np.abs(one.inner_products(queries, one.encode(vectors)) - true).max() < 1


# -- what decides the codes -----------------------------------------------------------------------


@given(st.integers(1, 40), st.data(), st.sampled_from([64, 80, 10]))
def test_codes_do_not_depend_on_what_is_encoded_beside_them(tokens, data, dim):
    one = codec(dim=dim, mode="polar_qjl", bits=6)
    vectors = draw(tokens, dim=dim, seed=tokens)
    whole = one.encode(vectors)
    cut = data.draw(st.integers(0, tokens))
    for part in (slice(0, cut), slice(cut, tokens)):
        piece = one.encode(vectors[part])
        assert np.array_equal(piece.angles, whole.angles[part])
        assert np.array_equal(piece.radii, whole.radii[part])
        assert np.array_equal(piece.qjl_signs, whole.qjl_signs[part])
        assert np.array_equal(piece.residual_norms, whole.residual_norms[part])


def test_seed_layer_stream_and_head_change_the_codes():
    vectors = draw(20)
    vectors[:, 1] = vectors[:, 0]
    codes = [
        codec(**place).encode(vectors).angles
        for place in ({}, {"seed": 4}, {"layer": 1}, {"stream": "value"}, {"first_kv_head": 5})
    ]
    codes.append(codes[0][:, ::-1])
    for i in range(len(codes)):
        for j in range(i):
            assert not np.array_equal(codes[i], codes[j])


def test_seed_offset_is_added_to_the_seed_and_wraps():
    vectors = draw(5)
    shifted = codec(seed=2**64 - 1, seed_offset=6, mode="polar_qjl").encode(vectors)
    assert same(shifted, codec(seed=5, mode="polar_qjl").encode(vectors))


def test_rank_encodes_its_heads_like_the_whole_model():
    vectors = draw(10, 6)
    whole = codec(heads=6, mode="polar_qjl").encode(vectors)
    part = codec(heads=2, first_kv_head=3, mode="polar_qjl").encode(vectors[:, 3:5])
    assert np.array_equal(part.angles, whole.angles[:, 3:5])
    assert np.array_equal(part.qjl_signs, whole.qjl_signs[:, 3:5])


@pytest.mark.parametrize(
    ("rotation", "dim", "dense"),
    [
        ("auto", 64, False),
        ("auto", 80, True),
        ("auto", 10, True),
        ("hadamard", 64, False),
        ("hadamard", 80, False),
        ("dense", 64, True),
    ],
)
def test_rotation_is_what_was_asked_for(rotation, dim, dense):
    one = codec(dim=dim, rotation=rotation, bits=8)
    assert one.rotation.dense is dense
    assert relative_error(one, draw(20, dim=dim)) < 1e-4


# -- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 0}, r"bits must be in \[1, 16\], got 0"),
        ({"bits": 17}, r"bits must be in \[1, 16\], got 17"),
        ({"bits": 1, "mode": "polar_qjl"}, r"bits must be in \[2, 16\], got 1"),
        ({"mode": "qjl"}, "mode must be one of polar, polar_qjl"),
        ({"rotation": "none"}, "rotation must be one of auto, hadamard, dense"),
        ({"radii": "bf16"}, "radii must be one of f16, f32"),
        ({"projections": 4}, 'projections need mode "polar_qjl"'),
        ({"projections": 0, "mode": "polar_qjl"}, "projections must be in"),
        ({"seed_offset": -1}, "seed_offset must be in"),
    ],
)
def test_contradicting_field_is_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        Polar(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": 63}, "Polar needs an even head_dim, got 63"),
        ({"dim": 10, "rotation": "hadamard"}, "head_dim 10 has no Hadamard rotation"),
        ({"stream": "value", "mode": "polar_qjl"}, "values cannot use mode"),
        ({"stream": "query"}, 'stream must be "key" or "value"'),
    ],
)
def test_codec_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        codec(**fields)


def test_vectors_that_cannot_be_stored_are_refused():
    vectors = draw(3)
    vectors[2, 1, 5] = math.inf
    with pytest.raises(NonFiniteError, match="at token 2, head 1, channel 5"):
        codec().validate(vectors)
    vectors[2, 1, 5] = 1e5
    with pytest.raises(OverflowingError, match="at most 32752"):
        codec().validate(vectors)
    codec(radii="f32").validate(vectors)
    assert (
        np.abs(
            codec(radii="f32", bits=16).decode(codec(radii="f32", bits=16).encode(vectors))
            - vectors
        ).max()
        < 20
    )
    vectors[2, 1, 5] = 2e38
    with pytest.raises(OverflowingError, match=r"at most 1e\+38"):
        codec(radii="f32").validate(vectors)
