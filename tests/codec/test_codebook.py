"""Codebooks: optimal for the density, and what is shipped is representable and nearly as good."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest

from pagedtq.codec.codebook import codebook, density, distortion, lloyd_max
from pagedtq.errors import ArgumentError

#: Exact Lloyd-Max distortions of the density, by dimension, widths 1 to 8.
EXACT = {
    64: (0.35839, 0.11453, 0.03339, 0.00913, 2.399e-3, 6.160e-4, 1.5615e-4, 3.932e-5),
    128: (0.36089, 0.11600, 0.03397, 0.00932, 2.4515e-3, 6.300e-4, 1.598e-4, 4.024e-5),
    256: (0.36214, 0.11674, 0.03426, 0.00941, 2.478e-3, 6.371e-4, 1.616e-4, 4.071e-5),
}
#: In so high a dimension the density is a normal one to six digits.
NORMAL = 1 << 24
NORMAL_DISTORTIONS = (0.363380, 0.117482, 0.034548, 0.009501, 0.002505, 0.000644, 1.63e-4, 4.1e-5)
MAX_1960 = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1519),
    4: (0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326),
}
FIVE_BITS = (
    0.0659, 0.1981, 0.3314, 0.4667, 0.6049, 0.7471, 0.8946, 1.0488,
    1.2118, 1.3863, 1.5762, 1.7872, 2.0287, 2.3177, 2.6911, 3.2607,
)  # fmt: skip


@pytest.mark.parametrize("head_dim", EXACT)
@pytest.mark.parametrize("width", range(1, 9))
def test_the_optimum_has_the_known_distortion(head_dim, width):
    known = EXACT[head_dim][width - 1]
    digit = 6e-6 if width <= 4 else known * 3e-4
    assert codebook(head_dim, width).optimal_distortion == pytest.approx(known, abs=digit)


@pytest.mark.parametrize("width", range(1, 9))
def test_in_high_dimension_the_distortion_is_that_of_a_normal(width):
    known = NORMAL_DISTORTIONS[width - 1]
    assert distortion(NORMAL, lloyd_max(NORMAL, width)) == pytest.approx(known, abs=5.1e-7)


@pytest.mark.parametrize("width", MAX_1960)
def test_in_high_dimension_the_centroids_are_those_of_max(width):
    assert lloyd_max(NORMAL, width) == pytest.approx(MAX_1960[width], abs=6e-5)


def test_wide_normal_codebooks_match_known_centroids():
    assert lloyd_max(NORMAL, 5) == pytest.approx(FIVE_BITS, abs=6e-5)
    for width, low, high in ((6, 0.03341, 3.7441), (7, 0.01683, 4.1897), (8, 0.00844, 4.6035)):
        assert lloyd_max(NORMAL, width)[[0, -1]] == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("width", range(1, 9))
def test_the_normal_optimum_meets_the_closed_form_condition(width):
    # The mean of a normal variable between a and b is (phi(a) - phi(b)) / (Q(a) - Q(b)).
    levels = lloyd_max(NORMAL, width)
    edges = np.concatenate(([0.0], (levels[1:] + levels[:-1]) / 2, [np.inf]))
    tail = np.array([0.5 * math.erfc(edge / math.sqrt(2)) for edge in edges])
    height = np.exp(-(edges**2) / 2) / math.sqrt(2 * math.pi)
    assert levels == pytest.approx(-np.diff(height) / -np.diff(tail), abs=1e-6)


@pytest.mark.parametrize(
    ("head_dim", "width", "centroids"),
    [
        (128, 2, (0.4525, 1.5052)),
        (128, 3, (0.2444, 0.7533, 1.3366, 2.1315)),
        (128, 4, (0.1279, 0.3864, 0.6536, 0.9371, 1.2478, 1.6043, 2.0459, 2.6889)),
        (64, 3, (0.2438, 0.7507, 1.3293, 2.1113)),
        (64, 4, (0.1274, 0.3847, 0.6505, 0.9319, 1.2394, 1.5908, 2.0233, 2.6464)),
    ],
)
def test_the_optimum_of_common_dimensions_has_the_known_centroids(head_dim, width, centroids):
    assert codebook(head_dim, width).optimum == pytest.approx(centroids, abs=6e-5)


def test_three_dimensions_give_the_uniform_quantizer():
    # A coordinate of a random unit vector in space is uniform (Archimedes).
    for width in range(1, 9):
        count = 1 << (width - 1)
        expected = (np.arange(count) + 0.5) / count * np.sqrt(3)
        assert codebook(3, width).optimum == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("head_dim", [3, 4, 5, 64, 80, 128, 200, 256, 4096])
@pytest.mark.parametrize("width", range(1, 9))
def test_each_magnitude_of_the_optimum_is_the_mean_of_its_cell(head_dim, width):
    levels = lloyd_max(head_dim, width)
    edges = np.concatenate(([0.0], (levels[1:] + levels[:-1]) / 2))
    # An independent rule on the inner cells: composite Simpson.
    for low, high, level in list(zip(edges[:-1], edges[1:], levels))[:16]:
        u = np.linspace(low, high, 201)
        weight = np.ones(201)
        weight[1:-1:2], weight[2:-1:2] = 4, 2
        mass = weight * density(head_dim, u)
        assert np.sum(mass * u) / np.sum(mass) == pytest.approx(level, rel=1e-6)


@pytest.mark.parametrize("head_dim", [3, 4, 7, 64, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize("width", range(1, 9))
def test_rounding_the_table_costs_little(head_dim, width):
    book = codebook(head_dim, width)
    limit = 1.0008 if width <= 7 else 1.0013
    assert book.optimal_distortion <= book.distortion <= limit * book.optimal_distortion


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_narrow_tables_are_half_integers_that_fit_eight_bits(head_dim, width):
    book = codebook(head_dim, width)
    steps = book.table.astype(np.float64) * 2.0**book.exponent - 0.5
    steps[1 << (width - 1) :] = -(steps[1 << (width - 1) :] + 1)
    assert np.array_equal(steps, np.rint(steps))
    assert steps.min() >= 0
    assert steps.max() <= 127
    assert np.array_equal(book.table, book.table.astype(np.float16))


@pytest.mark.parametrize("head_dim", [64, 128, 100])
@pytest.mark.parametrize("width", [5, 6, 7, 8])
def test_wide_tables_are_fp16_numbers(head_dim, width):
    table = codebook(head_dim, width).table
    assert np.array_equal(table, table.astype(np.float16))


@pytest.mark.parametrize("head_dim", [3, 64, 80, 128, 256])
@pytest.mark.parametrize("width", range(1, 9))
def test_factor_times_table_is_a_magnitude_over_root_d(head_dim, width):
    book = codebook(head_dim, width)
    half = 1 << (width - 1)
    assert 0.5 <= book.factor < 1
    assert book.factor.dtype == np.float32
    assert np.array_equal(book.table[half:], -book.table[:half])
    decoded = book.table[:half].astype(np.float64) * book.factor * np.sqrt(head_dim)
    assert decoded == pytest.approx(book.magnitudes, rel=1e-7)
    between = (book.magnitudes[1:] + book.magnitudes[:-1]) / 2
    assert np.array_equal(book.midpoints.astype(np.float64), between)


def test_arrays_are_read_only_and_books_are_shared():
    book = codebook(128, 4)
    assert codebook(128, 4) is book
    with pytest.raises(ValueError, match="read-only"):
        book.table[0] = 1


@pytest.mark.parametrize(("head_dim", "width"), [(2, 4), (128, 0), (128, 9)])
def test_impossible_codebooks_are_refused(head_dim, width):
    with pytest.raises(ArgumentError):
        codebook(head_dim, width)


#: First half of SHA-256 over table, midpoints and factor, widths 1 to 8.
DIGESTS = {
    64: (
        "70fbbe514680dd24",
        "d9b164f2d95e6167",
        "73b89a21cc0c3f06",
        "62fcd59b4016dcb7",
        "4e607bbc3cafcdbd",
        "40904c6f8750bc4b",
        "b33aaa1968384031",
        "8fe25bb599e3633e",
    ),
    128: (
        "cbdda2d8e2044970",
        "1b1ff1e57d55d9de",
        "a868e93807230602",
        "eb7a311ab4a40b87",
        "b9b400ef40fb1057",
        "bbbb5741174e00d9",
        "673ce8b328acdbd8",
        "e7aa9c0cf74e1353",
    ),
    256: (
        "003a531205f57d67",
        "27503e3c79b0333d",
        "d5d990387747cbea",
        "94bfbec3169cb2b9",
        "cba0083f6f87bff6",
        "beda465dc114a5b2",
        "10167cdb71483dd9",
        "3caed47aeb1ff751",
    ),
}


@pytest.mark.parametrize("head_dim", DIGESTS)
def test_tables_are_the_same_on_every_platform(head_dim):
    digests = []
    for width in range(1, 9):
        book = codebook(head_dim, width)
        parts = (book.table, book.midpoints, np.array([book.factor]))
        data = b"".join(part.astype("<f4").tobytes() for part in parts)
        digests.append(hashlib.sha256(data).hexdigest()[:16])
    assert tuple(digests) == DIGESTS[head_dim]
