"""Attention's other ways to multiply: keys as bytes, and without matrix instructions."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.backends.attend_kernel import attend_kernel
from pagedtq.errors import UnsupportedError
from tests.reference import relative_error, softmax_attention
from tests.simt.device_attention import DeviceAttention
from tests.simt.test_attend import BOUND, HEADS, check, fill, make_cache


@pytest.mark.parametrize("int8_keys", [False, True], ids=["f16", "int8"])
@pytest.mark.parametrize("group", [4, 16])
@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        ("k2v2", 64),
        ("k3v3", 128),
        ("k4v4", 128),
        ("k2v3", 128),
        ("k4v4", 96),
        ("k3v3", 96),
        ("k2v2", 96),
    ],
)
def test_keys_as_bytes_and_as_halves_both_meet_the_bound(name, head_dim, group, int8_keys):
    rng = np.random.default_rng(17)
    cache = make_cache(name, head_dim, 64)
    ids = fill(cache, [150, 65], rng)
    check(cache, ids, [1, 2], group, 2, rng, int8_keys=int8_keys)
    check(cache, ids, [1, 1], group, 1, rng, int8_keys=int8_keys, soft_cap=5.0)


@pytest.mark.parametrize(
    ("name", "head_dim", "page_size", "group"),
    [
        ("k2v2", 128, 64, 4), ("k3v3", 128, 64, 4), ("k3v3", 64, 16, 5), ("k4v4", 96, 32, 3),
        ("k3v3", 96, 64, 4), ("k2v2", 96, 16, 16), ("k4v3", 192, 64, 16), ("exactv4", 64, 64, 2),
    ],
)  # fmt: skip
def test_values_as_bytes_meet_the_bound(name, head_dim, page_size, group):
    rng = np.random.default_rng(19)
    cache = make_cache(name, head_dim, page_size)
    ids = fill(cache, [150, 65], rng)
    cache.tables.evict(ids[0], [1])
    check(cache, ids, [1, 2], group, 2, rng, int8_values=True, seed=5)


def test_values_of_two_bits_are_multiplied_as_bytes_where_that_costs_less():
    def chosen(name, page_size=64, rows=8, **options):
        layout = make_cache(name, 128, page_size).backend.layout
        return attend_kernel(layout, 0, rows, False, **options).int8_values

    assert chosen("k2v2", arch=90) and chosen("k2v2", page_size=128, arch=120)
    assert not chosen("k2v2", arch=80) and not chosen("k2v2", page_size=16, arch=90)
    assert not chosen("k2v2", rows=9, arch=90) and not chosen("k3v3", arch=90)
    assert not chosen("k2v2", arch=90, int8_keys=False)
    assert chosen("k3v3", rows=16, arch=80, int8_values=True)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_values_as_bytes_take_norms_of_any_size(scale):
    rng = np.random.default_rng(9)
    cache = make_cache("k3v3", 128, 64)
    ids = fill(cache, [200, 65], rng, scale)
    check(cache, ids, [1, 1], 4, 1, rng, int8_values=True, window_left=90)


def test_values_as_bytes_keep_small_norms_beside_large_ones():
    # Weights fall as norms grow, over six orders of magnitude within every tile: all parts count.
    rng = np.random.default_rng(20)
    cache = make_cache("k3v3", 64, 64)
    seq, length = cache.open(), 200
    sizes = 10 ** rng.uniform(-3, 3, (1, length, 1, 1)).astype(np.float32)
    values = rng.standard_normal((1, length, HEADS, 64)).astype(np.float32) * sizes
    direction = rng.standard_normal(64).astype(np.float32)
    direction /= np.linalg.norm(direction)
    keys = np.broadcast_to(-np.log(sizes) * direction, values.shape)
    cache.append(seq, np.ascontiguousarray(keys), values)
    queries = np.broadcast_to(direction, (1, 4 * HEADS, 64)).astype(np.float32)
    table, reads = cache.tables.block_table([seq]), cache.tables.reads([seq], False)
    decoded = cache.load(0, seq)
    want, want_lse = softmax_attention(queries, *decoded, np.array([length - 1]), 1.0)
    device = DeviceAttention(cache.backend)
    out, lse = device.attend(queries, table, reads, 1.0, int8_values=True)
    assert relative_error(out, want) <= BOUND
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=BOUND)


@pytest.mark.parametrize(
    ("name", "head_dim", "group", "q_lens"),
    [("k4v4", 128, 1, (1, 1)), ("k3v3", 64, 9, (1, 2)), ("prod4v4", 64, 1, (1, 3))],
)
def test_products_without_matrix_instructions_meet_the_bound(name, head_dim, group, q_lens):
    rng = np.random.default_rng(18)
    cache = make_cache(name, head_dim, 64)
    ids = fill(cache, [130, 41], rng)
    check(cache, ids, q_lens, group, 2, rng, arch=70)
    with pytest.raises(UnsupportedError, match="from sm_80 on, got sm_75"):
        attend_kernel(cache.backend.layout, 0, 4, False, int8_keys=True, arch=75)


@pytest.mark.parametrize("signs", ["equal", "alternating"])
def test_rows_of_the_largest_bytes_do_not_overflow_their_sums(signs):
    # Every rotated element of the query at its largest, every code at its largest magnitude.
    cache = make_cache("k3v3", 256, 16)
    rotation = cache.backend.layers[0].codecs[0].rotation
    pattern = np.ones((1, HEADS, 256))
    if signs == "alternating":
        pattern[..., ::2] = -1
    vectors = rotation.inverse(pattern).astype(np.float32)
    seq = cache.open()
    keys = np.concatenate([vectors, -vectors] * 10)[None].astype(np.float32)
    cache.append(seq, keys, np.random.default_rng(1).standard_normal(keys.shape).astype("f4"))
    table, reads = cache.tables.block_table([seq]), cache.tables.reads([seq], False)
    decoded, values, positions = cache.load(0, seq)
    ends = np.array([cache.length(seq) - 1])
    for scale in (1.0, 0.999, 0.9999):  # the last one rounds up to a power of two
        queries = scale * vectors.repeat(2, axis=1)
        out, lse = DeviceAttention(cache.backend).attend(queries, table, reads, 1e-4)
        want, want_lse = softmax_attention(queries, decoded, values, positions, ends, 1e-4)
        assert relative_error(out, want) <= BOUND
        np.testing.assert_allclose(lse, want_lse, rtol=0, atol=BOUND)


def test_streams_that_no_byte_table_describes_are_refused():
    supported = "2 to 4 bits in head dims that are multiples of 32"
    for name in ("k8v8", "prod4v4", "exact"):
        with pytest.raises(UnsupportedError, match=f"keys .*{supported}"):
            attend_kernel(make_cache(name, 64, 16).backend.layout, 0, 4, False, int8_keys=True)
    for name in ("k8v8", "k4exact"):
        with pytest.raises(UnsupportedError, match=f"values .*{supported}"):
            attend_kernel(make_cache(name, 64, 16).backend.layout, 0, 4, False, int8_values=True)
    layout = make_cache("k3v3", 64, 16).backend.layout
    with pytest.raises(UnsupportedError, match=r"values .*from sm_80 on, got sm_75"):
        attend_kernel(layout, 0, 4, False, arch=75, int8_values=True)
