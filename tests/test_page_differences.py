"""How two pools differ: codes by their order, norms by their last bit, nothing diluted."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.gpu import page_differences
from benchmarks.gpu.page_differences import Differences, compare_pages
from pagedtq.backends.host import HostBackend
from tests.parity.cases import CODECS, HEADS, make_config

COUNT = 40


def stored(form, dim=64):
    """A backend with tokens in two and a half of its pages."""
    backend = HostBackend(make_config(form, dim, 16, num_layers=1, window=0, num_pages=64))
    drawn = np.random.default_rng(1).standard_normal((2, COUNT, HEADS, dim))
    backend.store(0, *drawn.astype(np.float16), np.arange(16, 16 + COUNT))
    return backend


@pytest.mark.parametrize("form", [*CODECS])
def test_equal_pools_count_what_was_written_and_no_more(form):
    backend = stored(form)
    pool = backend.pool
    found = compare_pages(backend.layout, pool, pool.copy())
    planes = backend.layout.extents[0].planes
    coded = sum(name in planes for name in ("key_norms", "value_norms"))
    prod = "key_qjl_signs" in planes
    assert found.codes == (coded + prod) * COUNT * HEADS * 64
    assert found.norms == (coded + prod) * COUNT * HEADS
    assert found.within_bounds and found._replace(codes=0, norms=0) == Differences()


@pytest.mark.parametrize("stream", ["key", "value"])
@pytest.mark.parametrize("form", ["k4v4", "k3v3", "k2v2", "k8v8", "k1v6"])
def test_ranks_order_codes_by_what_they_stand_for(form, stream):
    backend = stored(form)
    codec = backend.config.keys if stream == "key" else backend.config.values
    ranks = page_differences._ranks(backend.layout, backend.pool, 0, stream, codec)
    pages = np.arange(1, 3)
    for head in range(HEADS):
        tile = getattr(backend.layers[0].attention, stream + "s").tile(pages, head)
        order = np.argsort(tile.transpose(1, 0, 2).reshape(-1), kind="stable")
        values = tile.transpose(1, 0, 2).reshape(-1)[order]
        places = ranks[pages, head].reshape(-1)[order]
        assert ((np.diff(values) > 0) == (np.diff(places) > 0)).all()
        assert (np.diff(places) >= 0).all()


def flip(backend, name, byte, mask):
    """The pool with some bits of one byte of a plane turned."""
    pool = backend.pool.copy()
    plane = backend.layout.plane_view(pool, 0, name).view(np.uint8)
    plane[1, 0].reshape(-1)[byte] ^= mask
    return pool


def test_a_code_may_move_to_its_neighbour_rarely_and_no_further(monkeypatch):
    backend = stored("k8v8")
    codes = backend.layout.plane_view(backend.pool, 0, "key_codes")
    monkeypatch.setattr(page_differences, "CODES", 1e-3)
    pool = backend.pool.copy()
    view = backend.layout.plane_view(pool, 0, "key_codes")
    view[1, 0, 3, 5] = codes[1, 0, 3, 5] ^ 1
    found = compare_pages(backend.layout, backend.pool, pool)
    assert (found.codes_differ, found.codes_apart, found.within_bounds) == (1, 0, True)
    # Across zero: the smallest positive magnitude and the smallest negative one are neighbours.
    first, second = backend.pool.copy(), backend.pool.copy()
    backend.layout.plane_view(first, 0, "key_codes")[1, 0, 3, 5] = 0
    backend.layout.plane_view(second, 0, "key_codes")[1, 0, 3, 5] = 128
    assert compare_pages(backend.layout, first, second).codes_apart == 0
    view[1, 0, 3, 5] = codes[1, 0, 3, 5] ^ 2
    found = compare_pages(backend.layout, backend.pool, pool)
    assert (found.codes_differ, found.codes_apart, found.within_bounds) == (1, 1, False)
    view[1, 0, 3] = codes[1, 0, 3] ^ 1
    assert not compare_pages(backend.layout, backend.pool, pool).within_bounds


def test_a_norm_may_move_by_its_last_bit_and_no_further(monkeypatch):
    backend = stored("k4v4")
    monkeypatch.setattr(page_differences, "NORMS", 1e-2)
    for mask, apart in ((1, 0), (2, 1)):
        found = compare_pages(backend.layout, backend.pool, flip(backend, "value_norms", 0, mask))
        step = found.norms_differ, found.norms_apart
        assert step == (1, apart) and found.within_bounds is (not apart)


def test_an_exact_byte_may_not_differ():
    backend = stored("exact")
    found = compare_pages(backend.layout, backend.pool, flip(backend, "values", 7, 1))
    assert found.exact_bytes == 1 and not found.within_bounds
