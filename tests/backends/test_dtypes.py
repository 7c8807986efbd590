import numpy as np
import pytest

from pagedtq.backends.dtypes import LIMITS, as_float32, check_range, round_to, to_storage, widen
from pagedtq.errors import ArgumentTypeError, NonFiniteError, OverflowingError

F16 = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def test_every_float16_widens_to_the_float32_numpy_gives():
    with np.errstate(invalid="ignore"):
        expected = F16.astype(np.float32)
    got = as_float32(F16, "x")
    nan = np.isnan(expected)
    np.testing.assert_array_equal(got.view(np.uint32)[~nan], expected.view(np.uint32)[~nan])
    assert np.isnan(got[nan]).all()


def test_rounding_to_float16_is_numpys_on_every_value_and_every_tie():
    finite = F16[np.isfinite(F16)].astype(np.float64)
    finite.sort()
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    just = np.concatenate([np.nextafter(ties, np.float32(s)) for s in (-np.inf, np.inf)])
    values = np.concatenate([ties, just, finite.astype(np.float32)]).astype(np.float32)
    np.testing.assert_array_equal(
        round_to(values, "f16"), values.astype(np.float16).astype(np.float32)
    )


@pytest.mark.parametrize("decade", range(-12, 5))
def test_rounding_to_float16_is_numpys_at_every_magnitude(decade):
    values = np.random.default_rng(decade + 50).standard_normal(20_000).astype(np.float32)
    values = np.clip(values * np.float32(10.0**decade), -65500, 65500)
    np.testing.assert_array_equal(
        round_to(values, "f16"), values.astype(np.float16).astype(np.float32)
    )


def test_what_rounds_to_zero_keeps_its_sign():
    values = np.array([0.0, -0.0, 1e-9, -1e-9, 1e-45, -1e-45], np.float32)
    for kv_dtype in ("f16", "bf16"):
        assert np.signbit(round_to(values, kv_dtype)).tolist() == [False, True] * 3


def test_rounding_to_bfloat16_is_to_nearest_with_ties_to_even():
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.1415927], np.float32)
    expected = np.array([1.0, 1.0, 1 + 2**-6, 1 + 2**-7, -3.140625], np.float32)
    np.testing.assert_array_equal(round_to(values, "bf16"), expected)


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16", "f32"])
def test_storage_round_trips_what_was_rounded(kv_dtype):
    values = np.random.default_rng(0).standard_normal(5000).astype(np.float32)
    rounded = round_to(values, kv_dtype)
    stored = to_storage(rounded, kv_dtype)
    assert stored.itemsize == {"f16": 2, "bf16": 2, "f32": 4}[kv_dtype]
    np.testing.assert_array_equal(widen(stored, kv_dtype), rounded)


def test_bfloat16_bits_are_never_guessed():
    bits = np.zeros(4, np.uint16)
    with pytest.raises(ArgumentTypeError, match="uint16"):
        as_float32(bits, "keys")
    assert as_float32(bits, "keys", "bf16").dtype == np.float32


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.int8, np.complex64])
def test_other_types_are_refused(dtype):
    with pytest.raises(ArgumentTypeError, match=np.dtype(dtype).name):
        as_float32(np.zeros(3, dtype), "keys")


def test_a_declared_type_must_be_the_one_that_comes():
    with pytest.raises(ArgumentTypeError, match="must be f16, got float32"):
        as_float32(np.zeros(3, np.float32), "keys", "f16")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_are_refused_with_their_place(bad):
    values = np.zeros((2, 3), np.float32)
    values[1, 2] = bad
    with pytest.raises(NonFiniteError, match=r"\(1, 2\)"):
        check_range(values, "keys", "f16")


def test_values_that_float16_would_round_to_infinity_are_refused():
    check_range(np.array([65519.0], np.float32), "keys", "f16")
    for bad in (65520.0, -65520.0):
        with pytest.raises(OverflowingError, match="f16"):
            check_range(np.array([0.0, bad], np.float32), "keys", "f16")
    with pytest.raises(OverflowingError, match="bf16"):
        check_range(np.array([3.4e38], np.float32), "keys", "bf16")


def test_every_float16_value_is_stored_with_its_own_bits():
    finite = F16[np.isfinite(F16)]
    stored = to_storage(as_float32(finite, "x"), "f16")
    np.testing.assert_array_equal(stored.view(np.uint16), finite.view(np.uint16))


@pytest.mark.parametrize("kv_dtype", ["f16", "bf16"])
def test_the_limit_is_the_first_value_that_rounds_to_infinity(kv_dtype):
    limit = np.float32(LIMITS[kv_dtype])
    below = np.nextafter(limit, np.float32(0))
    check_range(np.array([below], np.float32), "keys", kv_dtype)
    assert np.isfinite(widen(to_storage(round_to(np.array([below]), kv_dtype), kv_dtype), kv_dtype))
    with pytest.raises(OverflowingError):
        check_range(np.array([limit], np.float32), "keys", kv_dtype)
