"""Steps of attention by the kernels' source against float64, over a pairwise matrix.

Every pair of values of any two factors occurs in some row; a test says so. A step is what a backend
launches: the planner, rotation, attention over pages and over the exact window, and the merge.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from tests.parity.matrix import ALL_EXACT, FACTORS, ROWS
from tests.reference import softmax_attention
from tests.simt.test_attend import BOUND, HEADS, make_cache
from tests.simt.test_attend_step import step

#: Other page sizes; the pairs are those of the sizes above.
OTHER_SIZES = [
    (32, 5, 3, 4, 2, 1, "k4v4"), (32, 8, 1, 1, 0, 1, "exact"), (256, 8, 1, 4, 1, 0, "k3v3"),
    (256, 4, 3, 1, 0, 1, "prod4v4"),
]  # fmt: skip

SCALE = 0.15


@pytest.mark.parametrize(
    ("page_size", "group", "queries", "parts", "window", "holes", "codecs"), [*ROWS, *OTHER_SIZES]
)
def test_a_step_equals_float64(page_size, group, queries, parts, window, holes, codecs):
    rng = np.random.default_rng(page_size + 1000 * group)
    dim = 64
    means = None
    if codecs not in (*ALL_EXACT, "exactv4"):
        # Twenty times the spread: the ring keeps true keys, pages centred ones, and an lse that
        # lost the offset on either side shows.
        means = 20 * rng.standard_normal((1, HEADS, dim)).astype(np.float32)
    cache = make_cache(
        codecs, dim, page_size, means, window=window * page_size, num_window_slots=6,
        sinks=4 if window else 0,
    )  # fmt: skip
    lengths = (1, page_size - 1, 2 * page_size + 1, 3 * page_size, 4 * page_size + 5)
    ids = []
    for length in lengths:
        ids.append(cache.open())
        keys, values = rng.standard_normal((2, 1, length, HEADS, dim)).astype(np.float32)
        # Value norms over six orders of magnitude, each half of the channels its own.
        values *= 10.0 ** rng.uniform(-3, 3, (1, length, HEADS, 1)).astype(np.float32) / 8
        cache.append(ids[-1], keys if means is None else keys + means[:, None], values)
    if holes:
        cache.tables.evict(ids[4], [1])
        if window < 2:
            cache.tables.evict(ids[3], [0])
    q_lens = tuple(min(queries, length) for length in lengths)
    q = rng.standard_normal((sum(q_lens), HEADS * group, dim)).astype(np.float32)
    # The last tile of the longest sequence is cut when there are more units than column tiles.
    columns = 8 if max(q_lens) * group <= 8 else 16
    units = sum(-(-n * group // columns) for n in q_lens)
    out, lse, _ = step(cache, q, ids, q_lens, SCALE, max_units=units * parts, overlay=bool(window))
    at = 0
    for seq, count in zip(ids, q_lens):
        part = slice(at, at + count)
        keys, values, positions = cache.load(0, seq)
        ends = np.arange(cache.length(seq) - count, cache.length(seq))
        want, want_lse = softmax_attention(q[part], keys, values, positions, ends, SCALE)
        # Every head by itself, and each half of the channels: the bound is of the whole row.
        size = np.linalg.norm(want, axis=-1)
        for half in (slice(0, dim // 2), slice(dim // 2, dim)):
            error = np.linalg.norm(out[part, :, half] - want[..., half], axis=-1)
            assert (error <= BOUND * size).all(), (seq, (error / size).max())
            assert (np.linalg.norm(want[..., half], axis=-1) > 0.05 * size).all()
        np.testing.assert_allclose(lse[part], want_lse, rtol=0, atol=BOUND * 4)
        at += count


def test_every_pair_of_values_occurs_in_some_row():
    names = tuple(FACTORS)
    assert len(set(ROWS)) == len(ROWS)
    seen = {(a, row[a], b, row[b]) for row in ROWS for a, b in itertools.combinations(range(7), 2)}
    for a, b in itertools.combinations(range(7), 2):
        for x, y in itertools.product(FACTORS[names[a]], FACTORS[names[b]]):
            impossible = names[a] == "window" and x and y in ALL_EXACT
            assert ((a, x, b, y) in seen) is not impossible, (names[a], x, names[b], y)
