"""As much of CuPy as the seam uses, made of NumPy: to run the seam itself without a device."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import ClassVar

import numpy as np


class ndarray(np.ndarray):
    """A device array; its memory is the host's."""

    @property
    def device(self):
        return SimpleNamespace(id=0)

    @property
    def data(self):
        return SimpleNamespace(
            copy_from_host_async=lambda address, size, stream: _move(
                self.ctypes.data, address, size, stream
            ),
            copy_to_host_async=lambda address, size, stream: _move(
                address, self.ctypes.data, size, stream
            ),
        )

    def set(self, source, stream):
        self.view(np.ndarray)[...] = source


def _move(target, source, size, stream):
    stream.copies.append(size)
    ctypes.memmove(target, source, size)


class Stream:
    """Records what it was asked for."""

    current: Stream

    def __init__(self, non_blocking=False):
        self.copies, self.waited, self.capture = [], [], None

    def is_capturing(self):
        return self.capture is not None

    def begin_capture(self):
        self.capture = []

    def end_capture(self):
        work, self.capture = self.capture, None
        return SimpleNamespace(launch=lambda: [kernel(*args) for kernel, *args in work])

    def wait_event(self, event):
        self.waited.append(event)

    def synchronize(self):
        pass

    def __enter__(self):
        self.before, Stream.current = Stream.current, self
        return self

    def __exit__(self, *error):
        Stream.current = self.before


class Event:
    """Passed when a test says so."""

    all_done = True

    def __init__(self, disable_timing):
        self.stream = None

    def record(self, stream=None):
        self.stream = stream or Stream.current

    @property
    def done(self):
        return Event.all_done

    def synchronize(self):
        pass


class CompileException(Exception):
    """What CuPy raises with the compiler's log."""


class RawModule:
    """Compiles nothing; ``broken`` files fail as a compiler would."""

    built: ClassVar[list] = []
    broken = ""
    launched: ClassVar[list] = []

    def __init__(self, *, code, options):
        self.code, self.options = code, options
        RawModule.built.append(self)

    def get_function(self, name):
        if RawModule.broken and RawModule.broken in self.code:
            raise CompileException("kernel.cu(3): error: expected a ';'")

        def kernel(grid, block, arguments):
            if Stream.current.capture is not None:
                Stream.current.capture.append((kernel, grid, block, arguments))
            else:
                RawModule.launched.append((name, grid, block, arguments))

        return kernel


class Device:
    """A device by number."""

    def __init__(self, index=None):
        self.id = index or 0

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


def from_dlpack(array):
    return np.asarray(array.memory).view(ndarray)


def make():
    """Return a fresh module."""
    Stream.current = Stream()
    RawModule.built, RawModule.launched, RawModule.broken = [], [], ""
    Event.all_done = True
    properties = {"name": b"Fake 1", "multiProcessorCount": 7, "major": 9, "minor": 0}
    return SimpleNamespace(
        ndarray=ndarray,
        RawModule=RawModule,
        from_dlpack=from_dlpack,
        asnumpy=lambda array: array.view(np.ndarray).copy(),
        empty=lambda shape, dtype: np.empty(shape, dtype).view(ndarray),
        zeros=lambda shape, dtype: np.zeros(shape, dtype).view(ndarray),
        cuda=SimpleNamespace(
            Device=Device,
            Stream=Stream,
            Event=Event,
            alloc_pinned_memory=bytearray,
            get_current_stream=lambda: Stream.current,
            compiler=SimpleNamespace(CompileException=CompileException),
            runtime=SimpleNamespace(
                getDeviceCount=lambda: 1, getDeviceProperties=lambda index: properties
            ),
        ),
    )
