"""The page layout: every byte has one place, and views find it."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedtq.config import CacheConfig, Exact, LayerOverride, TurboQuant, preset
from pagedtq.paging.layout import EXTENT_ALIGN, PLANE_ALIGN, PageLayout, code_rows

exact = st.builds(Exact, dtype=st.sampled_from(["f16", "bf16", "f32"]))
mse = st.builds(TurboQuant, bits=st.integers(1, 8))
prod = st.builds(TurboQuant, bits=st.integers(2, 8), estimator=st.just("prod"))
keys, values = st.one_of(mse, prod, exact), st.one_of(mse, exact)


@st.composite
def configs(draw: st.DrawFn) -> CacheConfig:
    num_layers = draw(st.integers(1, 4))
    layers = draw(st.sets(st.integers(0, num_layers - 1), max_size=2))
    override = LayerOverride(layers=tuple(layers), keys=draw(keys), values=draw(values))
    return CacheConfig(
        num_layers=num_layers,
        num_kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([3, 16, 31, 64, 80, 96, 128])),
        num_pages=draw(st.integers(2, 4)),
        page_size=draw(st.sampled_from([16, 32, 64])),
        keys=draw(keys),
        values=draw(values),
        overrides=(override,) if layers else (),
        key_bounds=draw(st.booleans()),
        pool_order=draw(st.sampled_from(["layer_major", "page_major"])),
    )


def extents_of(layout: PageLayout) -> dict[tuple[int, int, int], tuple[int, int]]:
    """Start and end of the bytes of every (page, layer, head), by the documented formula."""
    config, spans = layout.config, {}
    for layer in range(config.num_layers):
        size = layout.extents[layer].nbytes
        for page in range(config.num_pages):
            for head in range(config.num_kv_heads):
                start = layout.layer_offsets[layer] + page * layout.page_strides[layer]
                spans[page, layer, head] = (start + head * size, start + (head + 1) * size)
    return spans


@settings(max_examples=60, derandomize=True, deadline=None)
@given(configs())
def test_planes_lie_inside_their_extent_aligned_and_apart(config):
    for extent in PageLayout(config).extents:
        end = 0
        for plane in extent.planes.values():
            assert plane.offset % PLANE_ALIGN == 0
            assert end <= plane.offset < end + PLANE_ALIGN
            assert plane.nbytes > 0
            end = plane.offset + plane.nbytes
        assert end <= extent.nbytes < end + EXTENT_ALIGN
        assert extent.nbytes % EXTENT_ALIGN == 0
        assert extent.payload_bytes <= extent.nbytes


@settings(max_examples=60, derandomize=True, deadline=None)
@given(configs())
def test_extents_tile_the_pool_in_either_order(config):
    layouts = [PageLayout(config.replace(pool_order=o)) for o in ("layer_major", "page_major")]
    for layout in layouts:
        spans = sorted(extents_of(layout).values())
        assert spans[0][0] == 0
        assert all(left[1] == right[0] for left, right in pairwise(spans))
        assert spans[-1][1] == layout.pool_bytes == config.num_pages * layout.page_bytes
    # The order of the pool never changes the bytes inside a page.
    first, second = layouts
    assert [e.planes for e in first.extents] == [e.planes for e in second.extents]
    assert first.slab_offsets == second.slab_offsets


@settings(max_examples=60, derandomize=True, deadline=None)
@given(configs())
def test_layers_follow_each_other_in_a_slab(config):
    layout = PageLayout(config)
    ends = [a + b for a, b in zip(layout.slab_offsets, layout.layer_page_bytes)]
    assert [0, *ends] == [*layout.slab_offsets, layout.page_bytes]
    assert layout.token_bytes * config.page_size == layout.page_bytes
    if config.pool_order == "page_major":
        assert layout.layer_offsets == layout.slab_offsets


@settings(max_examples=60, derandomize=True, deadline=None)
@given(configs(), st.randoms(use_true_random=False))
def test_a_plane_view_writes_where_the_layer_view_reads(config, random):
    layout = PageLayout(config)
    pool = np.zeros(layout.pool_bytes, np.uint8)
    layer = random.randrange(config.num_layers)
    name = random.choice(list(layout.extents[layer].planes))
    plane = layout.extents[layer].planes[name]
    shape = (config.num_pages, config.num_kv_heads, *plane.shape)
    written = np.random.default_rng(0).integers(1, 256, (*shape[:2], plane.nbytes), np.uint8)
    view = layout.plane_view(pool, layer, name)
    assert view.shape == shape
    view[...] = written.view(plane.dtype).reshape(shape)
    read = layout.layer_view(pool, layer)
    where = slice(plane.offset, plane.offset + plane.nbytes)
    assert np.array_equal(read[:, :, where], written)
    # Nothing else was touched, neither by the view nor elsewhere in the pool.
    assert np.count_nonzero(pool) == written.size
    for (page, of_layer, head), (start, end) in extents_of(layout).items():
        if of_layer == layer:
            assert np.array_equal(pool[start:end], read[page, head])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("head_dim", [3, 16, 80, 96, 128, 256])
@pytest.mark.parametrize("stream", ["key", "value"])
def test_a_row_has_room_for_its_codes_and_no_byte_to_spare(bits, head_dim, stream):
    rows = code_rows(bits, head_dim, stream)
    exact_bytes = -(-bits * head_dim // 8)
    group = (4 if stream == "key" else 2) if rows.signs else 1
    assert exact_bytes <= rows.codes + rows.signs < exact_bytes + group
    assert bool(rows.signs) == (bits == 3 and head_dim % 16 == 0)


def test_the_default_extent_is_the_documented_one():
    layout = PageLayout(CacheConfig(num_layers=2, num_kv_heads=8, head_dim=128, num_pages=4))
    planes = layout.extents[0].planes
    assert list(planes) == ["key_codes", "value_codes", "key_norms", "value_norms"]
    assert [plane.offset for plane in planes.values()] == [0, 4096, 8192, 8320]
    assert layout.extents[0].nbytes == 8448
    assert layout.token_bytes / (2 * 8) == 132


def test_value_bytes_of_a_token_pair_alternate():
    layout = PageLayout(
        preset("k4v4", num_layers=1, num_kv_heads=1, head_dim=16, num_pages=2, page_size=16)
    )
    pool = np.zeros(layout.pool_bytes, np.uint8)
    codes = layout.plane_view(pool, 0, "value_codes")
    row = codes.shape[3]
    token, byte = 5, 3
    codes[1, 0, token // 2, byte, token % 2] = 9
    offset = layout.extents[0].planes["value_codes"].offset
    place = layout.page_strides[0] + offset + (token // 2) * 2 * row + 2 * byte + token % 2
    assert np.flatnonzero(pool).tolist() == [place]


def test_only_layers_with_an_overlay_cost_window_bytes():
    config = CacheConfig(
        num_layers=4,
        num_kv_heads=2,
        head_dim=128,
        num_pages=4,
        overrides=(LayerOverride(layers=(0, -1), keys=Exact(), values=Exact()),),
    )
    layout = PageLayout(config)
    assert layout.window_row_bytes == 2 * 128 * 2
    assert layout.window_slot_bytes == 2 * 2 * (64 + 4) * 512
    assert PageLayout(config.replace(window=0)).window_slot_bytes == 0
