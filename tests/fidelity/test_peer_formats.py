"""Formats of other systems do what their definitions say, at the bytes they take."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedtq.errors import ArgumentError
from pagedtq.fidelity.peer_formats import (
    Kivi,
    float8_e4m3,
    gaussian_centroids,
    integer_format,
    peer_formats,
    uniform,
    vllm_preset,
)

SHAPE = (6, 2, 128)


def draw(tokens: int = 256, dim: int = 128, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, 2, dim)).astype(np.float32)


@pytest.mark.parametrize(
    ("preset", "slot"), [("k8v4", 196), ("4bit_nc", 134), ("k3v4_nc", 118), ("3bit_nc", 102)]
)
def test_vllm_slots_have_the_bytes_its_own_tests_assert(preset: str, slot: int) -> None:
    assert vllm_preset(preset, SHAPE).sequence_bytes(1) == slot * 6 * 2


def test_boundary_layers_count_as_sixteen_bits_and_come_back_unchanged() -> None:
    form = vllm_preset("4bit_nc", SHAPE, boundary_layers=2)
    assert form.sequence_bytes(10) == 10 * 2 * (2 * 134 + 4 * 512)
    x = draw()
    for layer in (0, 1, 4, 5):
        assert np.array_equal(form.roundtrip(layer, x, x)[0], x)
        assert form.spans(layer, np.array([7])).key_stop[0] == 0
    assert not np.array_equal(form.roundtrip(2, x, x)[0], x)


@pytest.mark.parametrize(
    ("bits", "positive"),
    [
        (2, [0.4528, 1.5104]),
        (3, [0.2451, 0.7560, 1.3439, 2.1519]),
        (4, [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326]),
    ],
)
def test_centroids_are_the_ones_of_max_1960(bits: int, positive: list[float]) -> None:
    centroids = gaussian_centroids(bits)
    assert centroids[len(centroids) // 2 :] == pytest.approx(positive, abs=1.5e-4)
    assert centroids == pytest.approx(-centroids[::-1], abs=1e-6)


@pytest.mark.parametrize(("preset", "error"), [("4bit_nc", 0.0095), ("3bit_nc", 0.0345)])
def test_rotated_keys_have_the_distortion_of_lloyd_max_codes(preset: str, error: float) -> None:
    x = draw(4000)
    keys, _ = vllm_preset(preset, SHAPE).roundtrip(0, x, x)
    assert np.square(keys - x).mean() / np.square(x).mean() == pytest.approx(error, rel=0.05)


def test_rotated_keys_keep_their_norm_to_half_precision() -> None:
    x = 50 * draw()
    keys, _ = vllm_preset("3bit_nc", SHAPE).roundtrip(0, x, x)
    assert np.linalg.norm(keys, axis=-1) == pytest.approx(np.linalg.norm(x, axis=-1), rel=6e-4)


def test_a_constant_vector_breaks_an_unsigned_rotation() -> None:
    # All of it lands in one coordinate, which the largest centroid cannot reach.
    x = np.ones((1, 2, 128), np.float32)
    keys, _ = vllm_preset("4bit_nc", SHAPE).roundtrip(0, x, x)
    assert np.square(keys - x).mean() > 20 * 0.0095


@given(st.integers(2, 8), st.integers(0, 100))
def test_uniform_codes_are_within_half_a_step(bits: int, seed: int) -> None:
    x = draw(4, 32, seed)
    step = (x.max(-1) - x.min(-1)) / (2**bits - 1)
    slack = 2e-3 * np.abs(x).max()
    assert (np.abs(uniform(x, bits, -1) - x) <= step[..., None] / 2 + slack).all()


def e4m3_values() -> np.ndarray:
    """Every finite positive value, from the definition: 4 bits of exponent, 3 of mantissa."""
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return np.array(subnormal + normal[:-1])  # the last pattern is NaN


def test_float8_is_the_nearest_representable_value() -> None:
    values = e4m3_values()
    assert values.max() == 448
    assert np.array_equal(float8_e4m3(values.astype(np.float32)), values)
    x = np.concatenate([draw(64).ravel() * s for s in (1e-3, 1e-2, 1, 40, 400)])
    nearest = np.abs(np.minimum(np.abs(x), 448)[:, None] - values).min(axis=1)
    got = np.abs(float8_e4m3(x) - np.clip(x, -448, 448))
    assert got == pytest.approx(nearest, abs=1e-7)


def test_integers_are_symmetric_with_one_scale_per_vector() -> None:
    x = draw()
    keys, _ = integer_format(4, SHAPE).roundtrip(0, x, x)
    steps = keys / (np.abs(keys).max(-1, keepdims=True) / 7)
    assert steps == pytest.approx(np.rint(steps), abs=1e-3)
    assert not integer_format(4, SHAPE).roundtrip(0, 0 * x, 0 * x)[0].any()


def test_kivi_absorbs_offsets_of_channels_that_a_vector_code_cannot() -> None:
    x = 0.1 * draw()
    x[..., 5] += 40
    keys, _ = Kivi(4, SHAPE).roundtrip(0, x, x)
    plain, _ = integer_format(4, SHAPE).roundtrip(0, x, x)
    assert np.square(keys - x).mean() < 0.01 * np.square(plain - x).mean()


def test_kivi_codes_keys_a_residual_at_a_time_and_values_as_they_leave_it() -> None:
    spans = Kivi(2, SHAPE).spans(0, np.array([1, 127, 128, 129, 255, 256, 300]))
    assert spans.key_stop.tolist() == [0, 0, 128, 128, 128, 256, 256]
    assert spans.value_stop.tolist() == [0, 0, 0, 1, 127, 128, 172]


def test_kivi_bytes_are_counted_stream_by_stream() -> None:
    # 300 tokens: 256 keys and 172 values in 2 bits with 4 bytes per 32 numbers, the rest in 16.
    per_head = (256 + 172) * 128 * (0.25 + 0.125) + (44 + 128) * 256
    assert Kivi(2, SHAPE).sequence_bytes(300) == 6 * 2 * per_head


def test_kivi_refuses_groups_that_do_not_fit() -> None:
    with pytest.raises(ArgumentError, match="groups of 32 must divide"):
        Kivi(2, (6, 2, 80))


def test_formats_that_need_a_power_of_two_are_left_out_elsewhere() -> None:
    names = [form.name for form in peer_formats((6, 2, 96))]
    assert "kivi2-r128" in names
    assert not any("bit_nc" in name for name in names)
    with pytest.raises(ArgumentError, match="power of two"):
        vllm_preset("4bit_nc", (6, 2, 96))
