"""Rotations: orthogonal, the documented transform, independent of batch, head split and layout."""

from __future__ import annotations

import subprocess
import sys
import weakref

import numpy as np
import pytest

from pagedtq.codec.random_streams import random_signs, stream_key
from pagedtq.codec.rotation import DenseRotationWarning, Rotation
from pagedtq.errors import ArgumentError

FAST = (4, 8, 16, 64, 80, 96, 112, 128, 160, 192, 256)
DENSE = (3, 5, 6, 7, 9, 11, 12, 48, 100)


def build(head_dim, heads=2, seed=1, first=0, kind="hadamard", stream="key"):
    if head_dim in DENSE:
        kind = "dense"
    return Rotation(head_dim, heads, seed, 0, stream, first, kind)


def matrix(rotation, head=0, dtype=np.float64):
    """The matrix of one head, column by column."""
    eye = np.eye(rotation.head_dim, dtype=dtype)
    return rotation.forward(np.repeat(eye[:, None], rotation.num_heads, axis=1))[:, head].T


@pytest.mark.parametrize("kind", ["hadamard", "dense"])
@pytest.mark.parametrize("head_dim", FAST + DENSE)
def test_rotations_are_orthogonal_and_the_inverse_undoes_them(head_dim, kind):
    rotation = build(head_dim, kind=kind)
    for head in range(2):
        r = matrix(rotation, head)
        assert np.abs(r @ r.T - np.eye(head_dim)).max() < 2e-7
    for dtype, bound in ((np.float32, 3e-6), (np.float64, 1e-6)):
        x = np.random.default_rng(0).standard_normal((5, 2, head_dim)).astype(dtype)
        y = rotation.forward(x)
        assert y.dtype == dtype
        assert np.abs(rotation.inverse(y) - x).max() < bound
        assert np.sum(y.astype(np.float64) ** 2) == pytest.approx(np.sum(x**2.0), rel=1e-6)


@pytest.mark.parametrize("head_dim", FAST)
def test_the_fast_transform_is_hartley_times_hadamard_times_signs(head_dim):
    power = head_dim & -head_dim
    odd = head_dim // power
    i = np.arange(head_dim)
    parity = np.array([[bin(a & b).count("1") % 2 for b in range(power)] for a in range(power)])
    angle = 2 * np.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
    transform = np.kron(np.cos(angle) + np.sin(angle), 1.0 - 2.0 * parity) / np.sqrt(head_dim)
    rotation = build(head_dim, seed=5, first=3)
    for head in range(2):
        signs = random_signs(stream_key(5, 0, "key", 3 + head), head_dim)
        expected = transform[:, i] * signs
        assert matrix(rotation, head) == pytest.approx(expected, abs=1e-7)


def test_a_constant_vector_is_spread_because_of_the_signs():
    for head_dim in (64, 80, 128):
        rotated = build(head_dim, heads=1).forward(np.ones((1, 1, head_dim), np.float32))
        # Without signs all of its norm would be in one coordinate, sqrt(d).
        assert np.abs(rotated).max() < 4.5


def test_dense_rotations_are_different_per_head_and_not_axis_aligned():
    rotation = build(100)
    assert np.abs(matrix(rotation, 0) - matrix(rotation, 1)).max() > 0.1
    assert np.abs(matrix(rotation)).max() < 0.6


@pytest.mark.parametrize("head_dim", [80, 100, 128])
def test_query_heads_of_a_group_turn_like_their_kv_head(head_dim):
    rotation = build(head_dim, heads=2)
    queries = np.random.default_rng(1).standard_normal((7, 6, head_dim)).astype(np.float32)
    turned = rotation.forward(queries)
    for head in range(6):
        alone = build(head_dim, heads=1, first=head // 3).forward(queries[:, head : head + 1])
        assert np.array_equal(alone[:, 0], turned[:, head])
    back = rotation.inverse(turned.astype(np.float64))
    assert back == pytest.approx(queries.astype(np.float64), abs=2e-6)


@pytest.mark.parametrize("head_dim", [7, 64, 80, 100, 128])
def test_results_do_not_depend_on_the_batch(head_dim):
    rotation = build(head_dim, heads=2)
    tokens = 3 if head_dim == 100 else 3000
    x = np.random.default_rng(2).standard_normal((tokens, 2, head_dim)).astype(np.float32)
    whole = rotation.forward(x)
    for rows in (slice(0, 1), slice(1, 3), slice(tokens - 1, tokens), slice(None, None, -1)):
        assert np.array_equal(rotation.forward(x[rows]), whole[rows])
    assert np.array_equal(rotation.inverse(whole[1:2]), rotation.inverse(whole)[1:2])


def test_more_axes_mean_more_vectors():
    rotation = build(64, heads=2)
    x = np.random.default_rng(3).standard_normal((3, 5, 4, 64)).astype(np.float32)
    assert np.array_equal(rotation.forward(x)[1, 2], rotation.forward(x[1, 2]))
    assert rotation.forward(x[:0]).shape == (0, 5, 4, 64)


def test_a_dimension_without_fast_transform_warns_exactly_once():
    # In a fresh process: the warning may have been given here already.
    program = (
        "import warnings\n"
        "from pagedtq.codec import DenseRotationWarning, Rotation\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    for d in (100, 100, 48, 100, 48, 80, 128):\n"
        "        Rotation(d, 1, 0, 0, 'key')\n"
        "    Rotation(52, 1, 0, 0, 'key', kind='dense')\n"
        "assert [w.category for w in seen] == [DenseRotationWarning] * 2, seen\n"
        "assert ['100' in str(w.message) for w in seen] == [True, False]\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert issubclass(DenseRotationWarning, UserWarning)


def test_wrong_shapes_and_types_are_refused():
    rotation = build(64, heads=2)
    with pytest.raises(ArgumentError, match="at least 3"):
        Rotation(2, 1, 0, 0, "key")
    for shape in ((4, 2, 63), (4, 3, 64), (64,)):
        with pytest.raises(ArgumentError, match="expects"):
            rotation.forward(np.zeros(shape, np.float32))
    with pytest.raises(ArgumentError, match="float32 or float64"):
        rotation.forward(np.zeros((1, 2, 64), np.float16))


def test_equal_dense_rotations_hold_one_matrix_as_long_as_one_of_them_lives():
    first, second = build(48), build(48)
    assert first.matrices is second.matrices
    assert not first.matrices.flags.writeable
    assert build(48, seed=2).matrices is not first.matrices
    assert build(48, first=1).matrices is not first.matrices
    held = weakref.ref(first.matrices)
    del first
    assert held() is second.matrices
    del second
    assert held() is None
