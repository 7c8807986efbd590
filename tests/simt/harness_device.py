"""A device made of host memory: the seam of the CUDA backend over the harness.

`HarnessDevice` stands where `CupyDevice` stands, so that all of `CudaBackend` runs without a GPU.
Its arrays lie between guard pages and refuse to meet NumPy's in an expression, as CuPy's do; fresh
memory is poison. Copies and launches happen at once, so races between streams do not show here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from harness import _Guarded, _GuardedBase, compile_kernels

from pagedtq.backends.device import Adopted
from pagedtq.backends.page_launches import BLOCK, Launch
from pagedtq.errors import ArgumentTypeError, StepError


class DeviceArray(_GuardedBase):
    """An array that lies on the device."""

    __array_priority__ = 100

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        _refuse_host_arrays(ufunc.__name__, (*inputs, *kwargs.get("out", ())))
        return _map(getattr(ufunc, method), inputs, kwargs)

    def __array_function__(self, func, types, args, kwargs):
        _refuse_host_arrays(func.__name__, args)
        return _map(func, args, kwargs)

    def __getitem__(self, index):
        _refuse_host_arrays("indexing", index if isinstance(index, tuple) else (index,))
        return super().__getitem__(index)

    def __setitem__(self, index, value):
        parts = index if isinstance(index, tuple) else (index,)
        _refuse_host_arrays("assignment", (*parts, value))
        super().__setitem__(index, value)


def _refuse_host_arrays(where: str, arguments: Any) -> None:
    for argument in arguments:
        if isinstance(argument, list | tuple):
            _refuse_host_arrays(where, argument)
        elif isinstance(argument, np.ndarray) and not isinstance(argument, DeviceArray):
            raise TypeError(f"{where} mixes an array of the device with one of NumPy")


def _plain(value: Any) -> Any:
    if isinstance(value, DeviceArray):
        return value.view(np.ndarray)
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    return value


def _map(function: Any, args: Any, kwargs: Any) -> Any:
    result = function(*map(_plain, args), **{name: _plain(v) for name, v in kwargs.items()})
    return result.view(DeviceArray) if isinstance(result, np.ndarray) else result


class _Passed:
    """Everything before it has run: launches are over when they return."""

    done = True

    def synchronize(self) -> None:
        """Return at once."""


class HarnessGraph:
    """Launches that were recorded, to run again on whatever their arrays hold by then."""

    def __init__(self, device: HarnessDevice) -> None:
        self._device, self.launches = device, []

    def launch(self) -> None:
        """Run them once more."""
        for launch in self.launches:
            self._device.launch(launch)


class HarnessDevice:
    """The kernels' own source, run on the CPU; see `pagedtq.backends.device.Device`.

    Parameters
    ----------
    seed : int
        Order of threads; see `harness`.
    """

    name = "SIMT harness"
    arch = 90
    multiprocessors = 1
    xp = np

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.log: list[Launch] = []
        self.copies = 0
        self._graph: HarnessGraph | None = None

    @property
    def capturing(self) -> bool:
        return self._graph is not None

    def active(self):
        return nullcontext()

    def empty(self, shape, dtype):
        array = self._allocate(shape, dtype)
        array.reshape(-1).view(np.uint8).view(np.ndarray)[...] = 0xFF
        return array

    def zeros(self, shape, dtype):
        array = self._allocate(shape, dtype)
        array.view(np.ndarray)[...] = 0
        return array

    def pinned(self, shape, dtype):
        return np.empty(shape, dtype)

    def upload(self, array):
        target = self.empty(np.shape(array), array.dtype)
        self.copy_in(target, np.ascontiguousarray(array))
        return target

    def copy_in(self, target, source, pinned=False):
        self._refuse_capture("copy from the host")
        assert isinstance(target, DeviceArray) and type(source) is np.ndarray
        assert target.flags.c_contiguous and target.nbytes == source.nbytes
        self.copies += 1
        target.reshape(-1).view(np.ndarray).view(np.uint8)[...] = source.reshape(-1).view(np.uint8)

    def copy_out(self, target, source):
        self._refuse_capture("copy to the host")
        target[...] = source.view(np.ndarray)

    def download(self, array):
        self._refuse_capture("copy to the host")
        return array.view(np.ndarray).copy()

    def adopt(self, array, name):
        if isinstance(array, DeviceArray):
            return Adopted(array, None)
        if isinstance(array, np.ndarray):
            return None
        raise ArgumentTypeError(f"{name} must be an array, got {type(array).__name__}")

    def launch(self, launch: Launch) -> None:
        if 0 in launch.grid:
            return
        if self._graph is not None:
            self._graph.launches.append(launch)
            return
        for argument in launch.arguments:
            assert not isinstance(argument, np.ndarray) or isinstance(argument, DeviceArray), (
                f"{launch.kernel} got an array of the host"
            )
        self.log.append(launch._replace(arguments=()))
        kernels = compile_kernels(launch.file, launch.macros)
        kernels.launch(launch.kernel, launch.grid, BLOCK, *launch.arguments, seed=self.seed)

    def record(self):
        return _Passed()

    def synchronize(self) -> None:
        self._refuse_capture("wait")

    @contextmanager
    def capture(self) -> Iterator[HarnessGraph]:
        self._graph = graph = HarnessGraph(self)
        try:
            yield graph
        finally:
            self._graph = None

    def _allocate(self, shape, dtype):
        self._refuse_capture("allocate")
        return _Guarded(tuple(shape), np.dtype(dtype)).array.view(DeviceArray)

    def _refuse_capture(self, what: str) -> None:
        if self.capturing:
            raise StepError(f"cannot {what} inside a captured graph")
