"""The seam's CuPy is the installed one: every name it uses exists there. Needs no device."""

from __future__ import annotations

import os

import numpy as np
import pytest

from pagedtq.backends.cupy_device import CupyDevice, missing_cuda
from pagedtq.errors import BackendUnavailable

NAMES = (
    "ndarray.set",
    "ndarray.data",
    "ndarray.flags",
    "ndarray.view",
    "empty",
    "zeros",
    "asnumpy",
    "from_dlpack",
    "cuda.Device",
    "cuda.Event.record",
    "cuda.Event.done",
    "cuda.Event.synchronize",
    "cuda.Stream.begin_capture",
    "cuda.Stream.end_capture",
    "cuda.Stream.is_capturing",
    "cuda.Stream.wait_event",
    "cuda.Stream.from_external",
    "cuda.Graph.launch",
    "cuda.MemoryPointer.copy_from_host_async",
    "cuda.MemoryPointer.copy_to_host_async",
    "cuda.alloc_pinned_memory",
    "cuda.get_current_stream",
    "cuda.Module.load",
    "cuda.Module.get_function",
    "cuda.nvrtc.getPTX",
    "cuda.nvrtc.getSupportedArchs",
    "cuda.runtime.getDeviceCount",
    "cuda.runtime.getDeviceProperties",
)


@pytest.fixture
def cupy():
    if os.environ.get("PAGEDTQ_REQUIRE_GATE") != "1":
        pytest.importorskip("cupy", reason="CuPy is not installed")
    import cupy

    return cupy


@pytest.mark.parametrize("name", NAMES)
def test_cupy_has_what_the_seam_uses(cupy, name):
    found = cupy
    for part in name.split("."):
        found = getattr(found, part)


def test_arrays_of_structures_travel_as_one_element(cupy):
    record = np.zeros((), [("a", "<i8"), ("b", "<f4", 3)])[()]
    assert np.asarray(record).size == 1


def test_a_machine_without_a_device_is_refused_with_the_reason(cupy):
    if missing_cuda() is None:
        pytest.skip("there is a device")
    with pytest.raises(BackendUnavailable, match="CuPy finds no device"):
        CupyDevice()
