"""The seam to CuPy, over a stand-in for CuPy: what it asks for, and what it refuses."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import fake_cupy
import numpy as np
import pytest

from pagedtq import CacheConfig, PagedKVCache, Polar
from pagedtq.backends import cupy_device, kernel_cache, why_not_cuda
from pagedtq.backends.cuda import CudaBackend
from pagedtq.backends.cuda_operands import Operands
from pagedtq.backends.cupy_device import CupyDevice
from pagedtq.backends.page_launches import Launch
from pagedtq.errors import (
    ArgumentTypeError,
    BackendUnavailable,
    KernelCompileError,
    OutOfPages,
    StepError,
    UnsupportedError,
)
from pagedtq.paging import PageTables


@pytest.fixture
def cupy(monkeypatch):
    module = fake_cupy.make()
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setitem(sys.modules, "cupy.cuda", module.cuda)
    monkeypatch.setattr(cupy_device, "missing_cuda", lambda: None)
    monkeypatch.setenv(kernel_cache.FOLDER, "")
    return module


@pytest.fixture
def device(cupy):
    return CupyDevice()


def launch(grid=(2, 1), **macros) -> Launch:
    return Launch("copy_pages.cu", "copy_pages", macros, grid, (None, np.int32(3)))


def test_without_cupy_or_a_device_the_reason_is_said(monkeypatch):
    cupy_device.missing_cuda.cache_clear()
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(cupy_device, "find_spec", lambda name: None)
    assert "CuPy is not installed" in cupy_device.missing_cuda()
    with pytest.raises(BackendUnavailable, match=r"pip install 'pagedtq\[cu13\]'"):
        CupyDevice()
    cupy_device.missing_cuda.cache_clear()

    def no_driver():
        raise RuntimeError("cudaErrorInsufficientDriver")

    runtime = SimpleNamespace(getDeviceCount=no_driver)
    broken = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", broken)
    monkeypatch.setattr(cupy_device, "find_spec", lambda name: object())
    assert "cudaErrorInsufficientDriver" in cupy_device.missing_cuda()
    cupy_device.missing_cuda.cache_clear()


def test_a_specialisation_is_built_once_with_the_digest_of_the_sources(device, cupy):
    for _ in range(3):
        device.launch(launch(A=1))
    device.launch(launch(A=2))
    first, second = cupy.cuda.nvrtc.compiled
    assert any("PAGEDTQ_SOURCE_DIGEST" in option for option in first.options)
    assert "--gpu-architecture=sm_90" in first.options
    assert "-DA=1" in first.options and "-DA=2" in second.options
    assert not cupy.cuda.nvrtc.open
    # The binding leaves out the last byte.
    assert cupy.cuda.Module.loaded == [one.name.encode() + b"\0" for one in (first, second)]
    launched = cupy.cuda.Module.launched
    assert launched[0] == ("copy_pages", (2, 1), (128,), (None, np.int32(3)))
    device.launch(launch((0, 1), A=1))
    assert len(launched) == 4


def test_a_compile_error_names_the_specialisation_and_holds_the_log(device, cupy):
    cupy.cuda.nvrtc.broken = "copy_pages"
    with pytest.raises(
        KernelCompileError, match=r"(?s)copy_pages.cu \[A=1 B=2\].* sm_90: .*expected a"
    ):
        device.launch(launch(B=2, A=1))
    assert not cupy.cuda.nvrtc.open and not cupy.cuda.Module.loaded


def test_structures_are_passed_by_value(device, cupy):
    shape = np.zeros((), [("a", "<i8"), ("b", "<i4")])[()]
    device.launch(launch()._replace(arguments=(shape,)))
    (passed,) = cupy.cuda.Module.launched[0][3]
    assert isinstance(passed, np.ndarray) and passed.shape == () and passed.dtype == shape.dtype


def test_a_staging_buffer_is_used_again_once_its_copy_has_run(device, cupy):
    source = np.arange(100, dtype=np.int64)
    first = device.upload(source)
    source[:] = 0
    assert first[99] == 99
    buffers = device._staging
    device.upload(source)
    assert len(buffers._busy) + len(buffers._idle) == 1
    fake_cupy.Event.all_done = False
    device.upload(source), device.upload(source)
    assert len(buffers._busy) == 3 and not buffers._idle
    large = np.ones(5 << 20, np.uint8)
    assert np.array_equal(device.upload(large), large)
    assert len(buffers._busy) == 3


@pytest.mark.parametrize("kind", ["a mark of the device", "an event of CuPy"])
def test_pages_freed_behind_a_mark_in_the_stream_wait_until_it_has_run(device, cupy, kind):
    tables = PageTables(page_size=4, num_pages=9)
    one, other = tables.open(), tables.open()
    tables.commit(tables.reserve([one], 12))
    fake_cupy.Event.all_done = False
    if kind == "a mark of the device":
        event = device.record()
    else:
        event = cupy.cuda.Event(disable_timing=True)
        event.record()
    assert event.stream is cupy.cuda.get_current_stream()
    tables.fences.open(event)
    tables.close(one)
    assert tables.fences.poll().tolist() == []
    assert tables.pool.parked_ids().tolist() == [3, 2, 1]
    with pytest.raises(OutOfPages):
        tables.reserve([other], 24)
    fake_cupy.Event.all_done = True
    assert tables.fences.poll().tolist() == [3, 2, 1]
    assert (tables.fences.num_open, tables.pool.num_free) == (0, 8)
    tables.commit(tables.reserve([other], 24))


def test_pinned_memory_is_copied_from_and_to_directly(device, cupy):
    pinned = device.pinned((3, 4), np.float32)
    pinned[...] = 5
    array = device.empty((3, 4), np.float32)
    device.copy_in(array, pinned, pinned=True)
    back = device.pinned((3, 4), np.float32)
    device.copy_out(back, array)
    assert (back == 5).all() and not device._staging._busy


def test_arrays_of_other_libraries_are_adopted_where_they_lie(device, cupy, monkeypatch):
    def tensor(place, dtype="torch.float16"):
        made = SimpleNamespace(
            memory=np.ones(3, np.float16), dtype=dtype, __dlpack__=None, detach=lambda: made,
            view=lambda kind: SimpleNamespace(memory=made.memory.view(np.uint16)),
            __dlpack_device__=lambda: place,
        )  # fmt: skip
        return made

    got = device.adopt(tensor((2, 0)), "keys")
    assert got.kind is None and isinstance(got.array, cupy.ndarray)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(uint16="uint16"))
    got = device.adopt(tensor((2, 0), "torch.bfloat16"), "keys")
    assert got.kind == "bf16" and got.array.dtype == np.uint16
    assert device.adopt(np.ones(3), "keys") is None
    with pytest.raises(ArgumentTypeError, match="keys must be a NumPy array or lie on a CUDA"):
        device.adopt(tensor((1, 0)), "keys")
    with pytest.raises(ArgumentTypeError, match="device 0, got one on device 1"):
        device.adopt(tensor((2, 1)), "keys")
    with pytest.raises(ArgumentTypeError, match="keys must be an array, got list"):
        device.adopt([1.0], "keys")


def test_a_capture_holds_launches_and_refuses_everything_else(device, cupy):
    array = device.zeros((4,), np.int32)
    device.launch(launch())
    with device.capture() as graph:
        device.launch(launch())
        calls = (
            lambda: device.empty((1,), np.int8),
            lambda: device.upload(np.ones(1)),
            lambda: device.copy_in(array, np.zeros(4, np.int32)),
            lambda: device.download(array),
            lambda: device.launch(launch(NEW=1)),
        )
        for call in calls:
            with pytest.raises(StepError, match="inside a captured graph"):
                call()
    assert len(cupy.cuda.Module.launched) == 1
    graph.launch(), graph.launch()
    assert len(cupy.cuda.Module.launched) == 3
    assert not device.capturing


def test_a_device_that_is_not_the_current_one_works_on_its_own_stream(cupy):
    device = CupyDevice(1)
    here = cupy.cuda.get_current_stream()
    with cupy.cuda.Device(1):
        there = cupy.cuda.get_current_stream()
    assert here is not there
    array = device.upload(np.arange(12.0).reshape(3, 4))
    back = device.pinned((3, 4), np.float64)
    device.copy_out(back, array)
    assert (here.copies, there.copies) == ([], [96, 96]) and back[2, 3] == 11
    assert device.record().stream is there
    device.synchronize()
    assert (here.synchronized, there.synchronized) == (0, 1)
    device.launch(launch())
    # What another device records is no business of this one.
    here.begin_capture()
    assert not device.capturing
    device.upload(np.ones(3))
    here.end_capture()
    there.begin_capture()
    assert device.capturing
    with pytest.raises(StepError, match="inside a captured graph"):
        device.upload(np.ones(3))
    there.end_capture()
    with device.capture() as graph:
        device.launch(launch())
    graph.launch()
    assert (here.launched, there.launched) == (0, 2)
    assert cupy.cuda.Device().id == 0


def test_expressions_of_arrays_are_computed_on_their_own_device(cupy):
    device = CupyDevice(1)
    config = CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=64, num_pages=4, window=16, page_size=16
    )
    operands = Operands(device, config, False)
    array = device.upload(np.arange(12.0).reshape(3, 4))
    assert np.array_equal(operands.contiguous(array[:, ::2]), [[0, 2], [4, 6], [8, 10]])
    backend = CudaBackend(config, device=device)
    backend.fill_pages(np.array([2]), 7)
    window = backend.window(0)
    rows = np.full((1, 2, 1, 64), 3, window.ring.dtype)
    window.put_rows(True, 4, np.array([5]), rows)
    window.copy_slots(np.array([4]), np.array([6]))
    assert np.array_equal(window.take_rows(True, 6, np.array([5])), rows)
    assert cupy.cuda.Device().id == 0


def test_auto_picks_cuda_where_there_is_a_device_and_kernels(cupy, monkeypatch):
    config = CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=64, num_pages=4, window=0, page_size=16
    )
    assert why_not_cuda(config) is None
    monkeypatch.setenv("PAGEDTQ_BACKEND", "auto")
    assert "cuda on Fake 1" in repr(PagedKVCache(config))
    assert PagedKVCache(config, accumulate="float64").backend.name == "host"
    polar = config.replace(keys=Polar(), values=Polar())
    assert PagedKVCache(polar).backend.name == "host"
    assert "4-bit" not in (why_not_cuda(polar) or "") and "polar" in (why_not_cuda(polar) or "")
    monkeypatch.setenv("PAGEDTQ_BACKEND", "host")
    assert PagedKVCache(config).backend.name == "host"
    with pytest.raises(UnsupportedError, match="accumulates in float32"):
        PagedKVCache(config, "cuda", accumulate="float64")
    with pytest.raises(UnsupportedError, match="keys of layer 0 are 8-bit polar"):
        PagedKVCache(polar, "cuda")
