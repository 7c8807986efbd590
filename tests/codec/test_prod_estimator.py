"""TurboQuant Prod: unbiased inner products from the sign sketch of the residual."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pagedtq.codec import Projection, TurboQuantCodec
from pagedtq.codec.bitpack import unpack
from pagedtq.config import TurboQuant


def unit(tokens, heads, head_dim, seed):
    vectors = np.random.default_rng(seed).standard_normal((tokens, heads, head_dim))
    return (vectors / np.linalg.norm(vectors, axis=2, keepdims=True)).astype(np.float32)


def build(head_dim, heads, bits, projection="gaussian", **fields):
    config = TurboQuant(bits=bits, estimator="prod", projection=projection, **fields)
    return TurboQuantCodec(config, head_dim, heads)


@pytest.mark.parametrize("projection", ["gaussian", "orthogonal"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_estimates_are_unbiased(bits, projection):
    # Every head has its own S: 32 draws of it.
    codec = build(64, 32, bits, projection)
    keys, queries = unit(250, 32, 64, 1), unit(250, 32, 64, 2)
    estimates = codec.inner_products(queries, codec.encode(keys))
    exact = np.einsum("bhd,thd->bht", queries, keys)
    slope = np.sum(estimates * exact) / np.sum(exact**2)
    assert slope == pytest.approx(1.0, abs=0.006)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_gaussian_distortion_is_the_predicted_one(head_dim, bits):
    codec = build(head_dim, 16, bits)
    keys, queries = unit(200, 16, head_dim, 3), unit(200, 16, head_dim, 4)
    exact = np.einsum("bhd,thd->bht", queries, keys)
    error = codec.inner_products(queries, codec.encode(keys)) - exact
    predicted = (math.pi / 2 - 1 / head_dim) * codec.book.distortion / head_dim
    assert np.mean(error**2) == pytest.approx(predicted, rel=0.03)


@pytest.mark.parametrize("bits", [2, 4])
def test_an_orthogonal_projection_has_less_than_half_the_variance(bits):
    keys, queries = unit(100, 8, 128, 5), unit(100, 8, 128, 6)
    exact = np.einsum("bhd,thd->bht", queries, keys)
    variance = []
    for projection in ("gaussian", "orthogonal"):
        codec = build(128, 8, bits, projection)
        variance.append(np.mean((codec.inner_products(queries, codec.encode(keys)) - exact) ** 2))
    assert variance[1] < 0.45 * variance[0]


@pytest.mark.parametrize("projection", ["gaussian", "orthogonal"])
@pytest.mark.filterwarnings("ignore::pagedtq.codec.DenseRotationWarning")
@pytest.mark.parametrize("head_dim", [7, 33, 64, 80])
def test_signs_and_residual_norm_are_those_of_a_float64_encoder(head_dim, projection):
    rotation = "dense" if head_dim == 33 else "hadamard"
    codec = build(head_dim, 2, 4, projection, rotation=rotation)
    vectors = unit(30, 2, head_dim, 7) * np.float32(4)
    encoded = codec.encode(vectors)
    rotated = codec.rotation.forward(vectors.astype(np.float64))
    residual = rotated - codec.decode_rotated(encoded, np.float64)
    gamma = np.linalg.norm(residual, axis=2)
    assert encoded.residual_norms == pytest.approx(gamma, rel=2.0**-11 * 1.01)
    projected = codec.projection.project(residual)
    clear = np.abs(projected) > 1e-4
    bits = unpack(encoded.qjl_signs, 1, head_dim)
    assert np.array_equal(bits[clear], projected[clear] >= 0)
    assert clear.mean() > 0.98


@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_the_factor_undoes_the_mean_of_the_sign_sketch(kind, head_dim):
    # E[<S q, sign(S r)>] * factor = <q, r> / |r|, here with q = r.
    heads = 400
    projection = Projection(head_dim, heads, 0, 0, kind=kind)
    r = unit(1, heads, head_dim, 8).astype(np.float64)
    estimates = np.sum(np.abs(projection.project(r)), axis=2) * projection.factor
    assert np.mean(estimates) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_project_back_is_the_transpose(kind):
    projection = Projection(64, 2, 0, 0, kind=kind)
    x = unit(3, 4, 64, 9).astype(np.float64)
    y = unit(3, 4, 64, 10).astype(np.float64)
    left = np.sum(projection.project(x) * y, axis=2)
    right = np.sum(x * projection.project_back(y), axis=2)
    assert left == pytest.approx(right, abs=1e-7)


@pytest.mark.parametrize("projection", ["gaussian", "orthogonal"])
def test_the_decoded_vector_gives_the_estimates(projection):
    mean = unit(1, 2, 64, 11)[0]
    config = TurboQuant(bits=3, estimator="prod", projection=projection)
    codec = TurboQuantCodec(config, 64, 2, mean=mean)
    keys, queries = unit(20, 2, 64, 12), unit(5, 4, 64, 13).astype(np.float64)
    encoded = codec.encode(keys)
    decoded = np.repeat(codec.decode(encoded, np.float64), 2, axis=1)
    expected = np.einsum("bhd,thd->bht", queries, decoded)
    assert codec.inner_products(queries, encoded) == pytest.approx(expected, abs=1e-6)


def test_the_mse_stage_is_one_bit_narrower_and_unscaled():
    keys = unit(20, 2, 128, 14)
    prod = build(128, 2, 4, scale="norm_corrected").encode(keys)
    mse = TurboQuantCodec(TurboQuant(bits=3, scale="none"), 128, 2).encode(keys)
    assert np.array_equal(prod.codes, mse.codes)
    assert np.array_equal(prod.norms, mse.norms)


def test_zero_vectors_have_no_residual():
    codec = build(64, 2, 4)
    keys = unit(3, 2, 64, 15)
    keys[1] = 0
    encoded = codec.encode(keys)
    assert not encoded.norms[1].any()
    assert not encoded.residual_norms[1].any()
    assert not codec.decode(encoded)[1].any()
    assert not codec.inner_products(unit(4, 2, 64, 16), encoded)[..., 1].any()
