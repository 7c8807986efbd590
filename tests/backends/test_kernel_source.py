"""Compiling kernels: what goes into the options, and what failures say."""

import sys

import pytest

from pagedtq.backends import kernel_source
from pagedtq.errors import BackendUnavailable


def test_the_order_of_macros_does_not_make_another_specialisation():
    one = kernel_source.specialise("attend.cu", {"B": 2, "A": "1"})
    assert one == kernel_source.specialise("attend.cu", {"A": 1, "B": 2})
    assert str(one) == "attend.cu [A=1 B=2]"


def test_options_hold_the_digest_of_all_sources_so_that_caches_see_changed_headers(monkeypatch):
    special = kernel_source.specialise("attend.cu", {"A": 1})
    before = kernel_source.compile_options(special)
    assert "-DA=1" in before
    monkeypatch.setattr(kernel_source, "source_digest", lambda: "f" * 64)
    after = kernel_source.compile_options(special)
    changed = [a for a, b in zip(after, before) if a != b]
    assert changed == ["-DPAGEDTQ_SOURCE_DIGEST=0xffffffffffffffffull"]


def test_without_cupy_compiling_is_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    special = kernel_source.specialise("attend.cu", {"NEVER": 1})
    with pytest.raises(BackendUnavailable, match="CuPy and NVRTC"):
        kernel_source.compile_cubin(special, 90)
