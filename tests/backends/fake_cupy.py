"""As much of CuPy as the seam uses, made of NumPy: to run the seam itself without a device."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import ClassVar

import numpy as np


class ndarray(np.ndarray):
    """An array on the device that was current when it was made; its memory is the host's."""

    def __array_finalize__(self, source):
        self.place = getattr(source, "place", Device.current)

    def __setitem__(self, index, value):
        assert self.place == Device.current, "an expression of another device's array"
        super().__setitem__(index, value)

    @property
    def device(self):
        return SimpleNamespace(id=self.place)

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
    """Of the device that is current; records what it was asked for."""

    #: Every device has a current stream of its own.
    current: ClassVar[dict[int, Stream]] = {}

    def __init__(self, non_blocking=False):
        self.copies, self.waited, self.capture = [], [], None
        self.synchronized, self.launched, self.place = 0, 0, Device.current

    def is_capturing(self):
        return self.capture is not None

    def begin_capture(self):
        self.capture = []

    def end_capture(self):
        work, self.capture = self.capture, None
        return SimpleNamespace(launch=lambda: [kernel(*args) for kernel, *args in work])

    @staticmethod
    def now():
        """Return the current stream of the current device."""
        return Stream.current.setdefault(Device.current, Stream())

    def wait_event(self, event):
        self.waited.append(event)

    def synchronize(self):
        self.synchronized += 1

    def __enter__(self):
        self.before = Stream.current.get(self.place)
        Stream.current[self.place] = self
        return self

    def __exit__(self, *error):
        Stream.current[self.place] = self.before


class Event:
    """Passed when a test says so."""

    all_done = True

    def __init__(self, disable_timing):
        self.stream = None

    def record(self, stream=None):
        self.stream = stream or Stream.now()

    @property
    def done(self):
        return Event.all_done

    def synchronize(self):
        pass


class NVRTCError(Exception):
    """What the compiler's binding raises."""


class Program(SimpleNamespace):
    """A source that was handed to the compiler."""


class Compiler:
    """Compiles nothing; ``broken`` files fail. Machine code is the name of its program."""

    NVRTCError = NVRTCError
    compiled: ClassVar[list[Program]] = []
    open: ClassVar[list[Program]] = []
    broken = ""

    @staticmethod
    def createProgram(source, name, headers, includes):
        Compiler.open.append(Program(name=name, options=None))
        return Compiler.open[-1]

    @staticmethod
    def compileProgram(program, options):
        program.options = options
        Compiler.compiled.append(program)
        if Compiler.broken and Compiler.broken in program.name:
            raise NVRTCError("NVRTC_ERROR_COMPILATION")

    @staticmethod
    def getProgramLog(program):
        return "kernel.cu(3): error: expected a ';'"

    @staticmethod
    def getCUBIN(program):
        return program.name.encode()

    @staticmethod
    def destroyProgram(program):
        Compiler.open.remove(program)

    @staticmethod
    def getSupportedArchs():
        return (80, 89, 90)


class Module:
    """Machine code that was loaded."""

    loaded: ClassVar[list[bytes]] = []
    launched: ClassVar[list] = []

    def load(self, image):
        Module.loaded.append(image)

    def get_function(self, name):
        def kernel(grid, block, arguments):
            stream = Stream.now()
            if stream.capture is not None:
                stream.capture.append((kernel, grid, block, arguments))
            else:
                stream.launched += 1
                Module.launched.append((name, grid, block, arguments))

        return kernel


class Device:
    """A device by number; the current one by default."""

    current: ClassVar[int] = 0
    entered: ClassVar[list[int]] = []

    def __init__(self, index=None):
        self.id = Device.current if index is None else index

    def __enter__(self):
        Device.entered.append(Device.current)
        Device.current = self.id
        return self

    def __exit__(self, *error):
        Device.current = Device.entered.pop()


def from_dlpack(array):
    return np.asarray(array.memory).view(ndarray)


def make():
    """Return a fresh module."""
    Device.current, Device.entered, Stream.current = 0, [], {}
    Compiler.compiled, Compiler.open, Compiler.broken = [], [], ""
    Module.loaded, Module.launched = [], []
    Event.all_done = True
    properties = {"name": b"Fake 1", "multiProcessorCount": 7, "major": 9, "minor": 0}
    return SimpleNamespace(
        ndarray=ndarray,
        from_dlpack=from_dlpack,
        asnumpy=lambda array: array.view(np.ndarray).copy(),
        empty=lambda shape, dtype: np.empty(shape, dtype).view(ndarray),
        zeros=lambda shape, dtype: np.zeros(shape, dtype).view(ndarray),
        cuda=SimpleNamespace(
            Device=Device,
            Stream=Stream,
            Event=Event,
            alloc_pinned_memory=bytearray,
            get_current_stream=Stream.now,
            Module=Module,
            nvrtc=Compiler,
            runtime=SimpleNamespace(
                getDeviceCount=lambda: 2, getDeviceProperties=lambda index: properties
            ),
        ),
    )
