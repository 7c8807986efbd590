"""Validation: what cannot be stored is named, with its place; everything else passes."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.codec import TurboQuantCodec
from pagedtq.config import TurboQuant
from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    NonFiniteError,
    NotUnitNormError,
    OverflowingError,
)


def vectors(tokens=6):
    return np.random.default_rng(0).standard_normal((tokens, 2, 64)).astype(np.float32)


def codec(**fields):
    mean = fields.pop("mean", None)
    return TurboQuantCodec(TurboQuant(**fields), 64, 2, mean=mean)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_last_element_is_found_and_named(bad):
    x = vectors()
    x[-1, -1, -1] = bad
    with pytest.raises(NonFiniteError, match="token 5, head 1, channel 63"):
        codec().validate(x)


def test_shapes_and_types_are_checked():
    for x in (vectors()[:, :1], vectors()[..., :63], vectors()[0], vectors()[None]):
        with pytest.raises(ArgumentError, match=r"must have shape \[T, 2, 64\]"):
            codec().validate(x)
    for x in (vectors().astype(np.float64), vectors().astype(np.float16), [[1.0]]):
        with pytest.raises(ArgumentTypeError, match="must be a float32 array"):
            codec().validate(x)


def test_norms_beyond_the_stored_type_are_refused():
    x = vectors()
    x[2, 1] *= 32753 / np.linalg.norm(x[2, 1])
    with pytest.raises(OverflowingError, match="at most 32752, got 32753 at token 2, head 1"):
        codec().validate(x)
    x[2, 1] *= 32751 / 32753
    codec().validate(x)


def test_one_huge_coordinate_is_no_overflow_as_long_as_the_norm_fits():
    x = np.zeros((1, 2, 64), np.float32)
    x[0, 0, 0] = 32000
    codec().validate(x)


def test_the_norm_that_counts_is_the_centred_one():
    mean = np.full((2, 64), 5000, np.float32)
    x = vectors() + mean
    codec(mean=mean).validate(x)
    with pytest.raises(OverflowingError):
        codec().validate(x)
    with pytest.raises(OverflowingError):
        codec(mean=-mean).validate(vectors())


def test_strict_unit_norm_mode_admits_only_unit_norms():
    strict = codec(unit_norm=True)
    x = vectors()
    x /= np.linalg.norm(x.astype(np.float64), axis=2, keepdims=True)
    x = x.astype(np.float32)
    strict.validate(x)
    for factor in (1 + 3e-5, 1 - 3e-5, 0.0):
        y = x.copy()
        y[3, 1] *= np.float32(factor)
        with pytest.raises(NotUnitNormError, match="token 3, head 1") as caught:
            strict.validate(y)
        assert caught.value.norm == pytest.approx(factor, abs=1e-6)


def test_strict_mode_changes_no_bytes():
    x = vectors()
    assert np.array_equal(codec(unit_norm=True).encode(x).codes, codec().encode(x).codes)


@pytest.mark.parametrize("mean", [np.zeros(64), np.zeros((1, 64)), np.zeros((2, 63))])
def test_a_mean_of_the_wrong_shape_is_refused(mean):
    with pytest.raises(ArgumentError, match=r"mean must have shape \[2, 64\]"):
        codec(mean=mean)


def test_a_mean_must_be_finite_and_is_copied():
    mean = np.zeros((2, 64), np.float32)
    mean[1, 3] = np.nan
    with pytest.raises(NonFiniteError, match="finite mean"):
        codec(mean=mean)
    mean[:] = 1
    built = codec(mean=mean)
    mean[:] = 7
    assert (built.mean == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        built.mean[0, 0] = 2
