"""Kernels find every plane where the layout puts it, whatever the page size."""

from __future__ import annotations

import pytest

from pagedtq.config import CacheConfig, Exact, TurboQuant
from pagedtq.paging.layout import PageLayout
from pagedtq.paging.span_tables import layer_spans, norm_spans

PLANES = {
    "CODES_AT": ("{}_codes", "{}s"),
    "SIGNS_AT": ("{}_code_signs",),
    "NORMS_AT": ("{}_norms",),
    "QJL_AT": ("{}_qjl_signs",),
    "RESIDUAL_NORMS_AT": ("{}_residual_norms",),
}
FORMATS = [
    (TurboQuant(bits=4), TurboQuant(bits=4)),
    (TurboQuant(bits=3), TurboQuant(bits=3)),
    (TurboQuant(bits=4, estimator="prod"), TurboQuant(bits=5)),
    (Exact(dtype="f32"), TurboQuant(bits=1)),
    (TurboQuant(bits=7), Exact(dtype="bf16")),
]


def layout_of(keys, values, head_dim=80, page_size=16, **options):
    shape = {"num_layers": 1, "num_kv_heads": 2, "num_pages": 3}
    return PageLayout(
        CacheConfig(
            keys=keys,
            values=values,
            head_dim=head_dim,
            page_size=page_size,
            **{**shape, **options},
        )
    )


@pytest.mark.parametrize("page_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("head_dim", [5, 72, 128])
@pytest.mark.parametrize(("keys", "values"), FORMATS)
def test_a_plane_starts_at_its_macro_times_the_page_size(keys, values, head_dim, page_size):
    layout = layout_of(keys, values, head_dim, page_size)
    macros, planes = layout.kernel_macros(0), layout.extents[0].planes
    found = set()
    for stream in ("key", "value"):
        for macro, names in PLANES.items():
            for name in (pattern.format(stream) for pattern in names):
                if name in planes:
                    found.add(name)
                    at = macros[f"{stream.upper()}_{macro}"]
                    assert at * page_size == planes[name].offset, name
    assert found == set(planes)


@pytest.mark.parametrize("page_size", [16, 256])
def test_key_bounds_start_at_their_macro_times_the_page_size(page_size):
    layout = layout_of(*FORMATS[2], page_size=page_size, key_bounds=True)
    at = layout.kernel_macros(0)["KEY_BOUNDS_AT"]
    assert at * page_size == layout.extents[0].planes["key_bounds"].offset > 0


def test_the_macros_do_not_depend_on_the_page_size_or_the_number_of_heads():
    small = layout_of(*FORMATS[1], page_size=16)
    large = layout_of(*FORMATS[1], page_size=256, num_kv_heads=7)
    assert small.kernel_macros(0) == large.kernel_macros(0)


def test_layers_of_different_codecs_have_macros_of_their_own():
    exact, coded = (layout_of(*form).kernel_macros(0) for form in (FORMATS[3], FORMATS[0]))
    assert exact.keys() == coded.keys()
    assert (exact["KEY_EXACT"], exact["KEY_BITS"]) == (3, 0)
    assert (coded["KEY_EXACT"], coded["KEY_BITS"]) == (0, 4)


@pytest.mark.parametrize("order", ["layer_major", "page_major"])
def test_span_tables_tile_the_pool(order):
    layout = layout_of(*FORMATS[2], num_layers=3, pool_order=order)
    covered = []
    for offset, stride, _, size in layer_spans(layout).tolist():
        covered += [(offset + page * stride, size) for page in range(3)]
    end = 0
    for start, size in sorted(covered):
        assert start == end
        end = start + size
    assert end == layout.pool_bytes
    spans = norm_spans(layout)
    assert len(spans) == 3 * 3  # layers, and key, value and residual norms
    assert (spans[:, 3] == 2 * 16).all()
