"""Which specialisation reads a layer, and the words in which another one is refused."""

from __future__ import annotations

import pytest

from pagedtq import TurboQuant
from pagedtq.backends.attend_kernel import attend_kernel, refuse_cap
from pagedtq.backends.stream_formats import takes_int8, takes_int8_values
from pagedtq.errors import UnsupportedError
from pagedtq.paging.layout import PageLayout
from tests.parity.cases import make_config

_BYTES = (
    "{stream} are multiplied as bytes for the MSE estimator of 2 to 4 bits in head dims that are "
    "multiples of 32 (below 4 bits from 64 on) up to 256{values}; got {codec} with head_dim 64"
)


@pytest.mark.parametrize("stream", ["keys", "values"])
def test_streams_that_are_not_multiplied_as_bytes_are_refused_with_those_that_are(stream):
    layout = PageLayout(make_config("k8v8", 64, 16))
    with pytest.raises(UnsupportedError) as caught:
        attend_kernel(layout, 0, 4, False, **{f"int8_{stream}": True})
    values = " (3 and 4 bits: 192)" if stream == "values" else ""
    expected = _BYTES.format(stream=stream, values=values, codec=TurboQuant(bits=8))
    assert str(caught.value) == expected


def test_the_refusals_list_is_what_is_multiplied_as_bytes():
    for dim in range(1, 513):
        for form in (*range(1, 9), 16, 17, 32):
            listed = form in (2, 3, 4) and dim % 32 == 0 and (form == 4 or dim >= 64)
            assert takes_int8(dim, form) == (listed and dim <= 256)
            assert takes_int8_values(dim, form) == (listed and dim <= (256 if form == 2 else 192))


def test_soft_caps_outside_the_kernels_range_are_refused_with_the_range():
    for cap in (1001, 1e5, 1e-7, 1e-46):
        with pytest.raises(
            UnsupportedError,
            match=rf"supports soft caps of 1e-06 to 1000, got {cap:g}: pass None .*backend='host'",
        ):
            refuse_cap(cap)
    for cap in (None, 1e-6, 30.0, 1000):
        refuse_cap(cap)
