"""`CupyDevice`: memory, streams and launches through CuPy. Nothing else imports CuPy's runtime."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentTypeError, BackendUnavailable, StepError
from . import kernel_source
from .device import Adopted, DeviceArray, Graph, Shape
from .kernel_cache import load_image
from .page_launches import BLOCK, Launch

Array = npt.NDArray[Any]

_CUDA, _CUDA_MANAGED = 2, 13  # DLPack device types

# Larger arrays are not worth pinned memory of their own.
_STAGED_BYTES = 4 << 20


@cache
def missing_cuda() -> str | None:
    """Say why there is no CUDA device here; None if there is one. Imports CuPy if installed."""
    if find_spec("cupy") is None:
        return "CuPy is not installed (pip install 'pagedtq[cu13]')"
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except (ImportError, RuntimeError, OSError) as error:
        return f"CuPy finds no device: {error}"
    return None if count else "CuPy finds no device"


class CupyDevice:
    """A CUDA device behind CuPy.

    Parameters
    ----------
    index : int, optional
        Which device; the current one by default.

    Raises
    ------
    BackendUnavailable
        Without CuPy or a device.

    Notes
    -----
    Work goes to CuPy's current stream. To run on another library's stream, make it current:
    ``with cupy.cuda.Stream.from_external(torch.cuda.current_stream()): ...``.
    """

    def __init__(self, index: int | None = None) -> None:
        missing = missing_cuda()
        if missing is not None:
            raise BackendUnavailable(f"the CUDA backend needs CuPy and a device: {missing}")
        import cupy

        self.xp: Any = cupy
        self._device = cupy.cuda.Device(index)
        properties = cupy.cuda.runtime.getDeviceProperties(self._device.id)
        self.name: str = properties["name"].decode()
        self.arch: int = 10 * properties["major"] + properties["minor"]
        self.multiprocessors: int = properties["multiProcessorCount"]
        self._kernels: dict[tuple[Any, ...], Any] = {}
        self._staging = _Staging(cupy)

    @property
    def capturing(self) -> bool:
        """Whether the current stream records launches instead of running them."""
        # Every device has a current stream of its own.
        with self._device:
            return bool(self.xp.cuda.get_current_stream().is_capturing())

    def active(self) -> AbstractContextManager[Any]:
        """Make this device the current one inside, as expressions of its arrays need it."""
        device: AbstractContextManager[Any] = self._device
        return device

    def empty(self, shape: Shape, dtype: npt.DTypeLike) -> DeviceArray:
        """Allocate an array."""
        self._refuse_capture("allocate")
        with self._device:
            return self.xp.empty(shape, dtype)

    def zeros(self, shape: Shape, dtype: npt.DTypeLike) -> DeviceArray:
        """Allocate an array of zeros."""
        self._refuse_capture("allocate")
        with self._device:
            return self.xp.zeros(shape, dtype)

    def pinned(self, shape: Shape, dtype: npt.DTypeLike) -> Array:
        """Allocate host memory that copies reach without a detour."""
        kind = np.dtype(dtype)
        count = int(np.prod(shape))
        memory = self.xp.cuda.alloc_pinned_memory(max(1, count * kind.itemsize))
        pinned: Array = np.frombuffer(memory, kind, count).reshape(shape)
        return pinned

    def upload(self, array: Array) -> DeviceArray:
        """Copy a host array into a new one; it may be changed at once."""
        source = np.ascontiguousarray(array)
        target = self.empty(source.shape, source.dtype)
        self.copy_in(target, source)
        return target

    def copy_in(self, target: DeviceArray, source: Array, pinned: bool = False) -> None:
        """Copy a contiguous host array into a device array of its size, without waiting."""
        self._refuse_capture("copy from the host")
        assert target.nbytes == source.nbytes and target.flags.c_contiguous
        if not source.nbytes:
            return
        with self._device:
            stream = self.xp.cuda.get_current_stream()
            if pinned:
                target.data.copy_from_host_async(source.ctypes.data, source.nbytes, stream)
            elif source.nbytes <= _STAGED_BYTES:
                self._staging.send(target, source, stream)
            else:
                # The driver stages it, and returns when it has read all of it.
                target.set(source, stream)

    def copy_out(self, target: Array, source: DeviceArray) -> None:
        """Copy a contiguous device array into pinned memory, without waiting."""
        self._refuse_capture("copy to the host")
        assert target.nbytes == source.nbytes and source.flags.c_contiguous
        if not source.nbytes:
            return
        with self._device:
            stream = self.xp.cuda.get_current_stream()
            source.data.copy_to_host_async(target.ctypes.data, source.nbytes, stream)

    def download(self, array: DeviceArray) -> Array:
        """Copy to the host and wait for it."""
        self._refuse_capture("copy to the host")
        with self._device:
            host: Array = self.xp.asnumpy(array)
        return host

    def adopt(self, array: Any, name: str) -> Adopted | None:
        """See a foreign array on this device as one of its own, without a copy."""
        if isinstance(array, self.xp.ndarray):
            self._refuse_other_device(name, array.device.id)
            return Adopted(array, None)
        if isinstance(array, np.ndarray):
            return None
        if not hasattr(array, "__dlpack__"):
            raise ArgumentTypeError(f"{name} must be an array, got {type(array).__name__}")
        place = tuple(int(part) for part in array.__dlpack_device__())
        if place[0] not in (_CUDA, _CUDA_MANAGED):
            raise ArgumentTypeError(
                f"{name} must be a NumPy array or lie on a CUDA device, got {type(array).__name__} "
                f"on DLPack device {place}"
            )
        if place[0] == _CUDA:
            self._refuse_other_device(name, place[1])
        if str(array.dtype) == "torch.bfloat16":
            # CuPy has no such dtype of its own: the bits travel, and the kind beside them.
            bits = array.detach().view(sys.modules["torch"].uint16)
            return Adopted(self.xp.from_dlpack(bits), "bf16")
        if hasattr(array, "detach"):
            array = array.detach()
        return Adopted(self.xp.from_dlpack(array), None)

    def launch(self, launch: Launch) -> None:
        """Run a kernel, built first where this specialisation is new; empty grids do nothing."""
        if 0 in launch.grid:
            return
        with self._device:
            kernel = self._built(launch)
            kernel(launch.grid, (BLOCK,), tuple(map(_argument, launch.arguments)))

    def build(self, launch: Launch) -> None:
        """Build a kernel ahead of its first launch; threads may do so side by side.

        Raises
        ------
        KernelCompileError
            Naming the specialisation.
        """
        with self._device:
            self._built(launch)

    def record(self) -> Any:
        """Mark the current stream."""
        with self._device:
            event = self.xp.cuda.Event(disable_timing=True)
            event.record()
            return event

    def synchronize(self) -> None:
        """Wait for the current stream."""
        with self._device:
            self.xp.cuda.get_current_stream().synchronize()

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Capture what is launched inside, on a stream of its own."""
        with self._device:
            stream = self.xp.cuda.Stream(non_blocking=True)
            # What was launched before must not race with the first replay's stream.
            stream.wait_event(self.record())
            graph = _Captured(self._device)
            with stream:
                stream.begin_capture()
                try:
                    yield graph
                finally:
                    # A capture that is left open would poison the stream for good.
                    graph.graph = stream.end_capture()

    def _built(self, launch: Launch) -> Any:
        key = (launch.file, launch.kernel, tuple(launch.macros.items()))
        kernel = self._kernels.get(key)
        if kernel is None:
            self._refuse_capture("build a kernel")
            kernel = self._kernels[key] = self._build(launch)
        return kernel

    def _build(self, launch: Launch) -> Any:
        # The compiler is called here and not through CuPy, which adds options of its own: what runs
        # is the machine code that is checked without a device.
        special = kernel_source.specialise(launch.file, launch.macros)
        module = self.xp.cuda.Module()
        module.load(load_image(special, kernel_source.pick_architecture(self.arch)))
        return module.get_function(launch.kernel)

    def _refuse_other_device(self, name: str, index: int) -> None:
        if index != self._device.id:
            raise ArgumentTypeError(
                f"{name} must lie on device {self._device.id}, got one on device {index}"
            )

    def _refuse_capture(self, what: str) -> None:
        if self.capturing:
            raise StepError(
                f"cannot {what} inside a captured graph; run the same calls once before capturing"
            )


class _Captured:
    """A graph that was captured."""

    def __init__(self, device: Any) -> None:
        self._device = device
        self.graph: Any = None

    def launch(self) -> None:
        """Run it once more, on the current stream."""
        with self._device:
            self.graph.launch()


class _Staging:
    """Pinned buffers that copies to the device start from, used again once they have run."""

    def __init__(self, cupy: Any) -> None:
        self._cupy = cupy
        self._lock = threading.Lock()
        self._idle: list[Array] = []
        self._busy: list[tuple[Array, Any]] = []

    def send(self, target: DeviceArray, source: Array, stream: Any) -> None:
        """Copy an array into a buffer that no copy reads, and from there to the device."""
        buffer = self._take(source.nbytes)
        buffer[: source.nbytes] = source.reshape(-1).view(np.uint8)
        target.data.copy_from_host_async(buffer.ctypes.data, source.nbytes, stream)
        event = self._cupy.cuda.Event(disable_timing=True)
        event.record(stream)
        with self._lock:
            self._busy.append((buffer, event))

    def _take(self, size: int) -> Array:
        with self._lock:
            self._idle += [buffer for buffer, event in self._busy if event.done]
            idle = {id(buffer) for buffer in self._idle}
            self._busy = [pair for pair in self._busy if id(pair[0]) not in idle]
            for at, buffer in enumerate(self._idle):
                if buffer.size >= size:
                    return self._idle.pop(at)
        size = 1 << max(12, (size - 1).bit_length())
        return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(size), np.uint8, size)


def _argument(value: Any) -> Any:
    # CuPy passes arrays of one element by value; a structure must come as one.
    return np.asarray(value) if isinstance(value, np.void) else value
