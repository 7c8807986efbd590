"""The seam between the CUDA backend and whatever runs its kernels.

`CudaBackend` talks to a `Device` and to nothing else: `CupyDevice` is the one that exists outside
tests, and the only place that imports CuPy's run time. The tests' twin runs the same launches
through the kernels' own source on a CPU, so that all of the backend runs without a GPU.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import numpy.typing as npt

from ..config import Dtype
from ..paging import fences
from .page_launches import Launch

#: An array in device memory: shape, dtype and strides as NumPy's, never mixed with NumPy's.
DeviceArray = Any
Shape = tuple[int, ...]


class Event(fences.Event, Protocol):
    """A mark in a stream, which opens fences as well: it is done when all before it has run."""

    def synchronize(self) -> None:
        """Wait until everything before the mark has run."""
        ...


class Graph(Protocol):
    """Captured work."""

    def launch(self) -> None:
        """Run it once more, on the current stream."""
        ...


class Adopted(NamedTuple):
    """A foreign array seen as one of the device's.

    ``kind`` is ``"bf16"`` where the array holds bfloat16 as bits, else None: its dtype tells.
    """

    array: DeviceArray
    kind: Dtype | None


class Device(Protocol):
    """Memory, copies, streams and launches of one device.

    Work goes to the current stream of the calling thread. While ``capturing``, whatever would
    allocate, wait or copy from the host raises ``StepError``: a captured graph holds launches only.

    Attributes
    ----------
    name : str
        Of the hardware.
    arch : int
        Compute capability without the dot: 80, 90, 120.
    multiprocessors : int
        Blocks that run side by side, in multiples.
    xp : module
        NumPy's functions for this device's arrays.
    """

    name: str
    arch: int
    multiprocessors: int
    xp: Any

    @property
    def capturing(self) -> bool:
        """Whether the current stream records launches instead of running them."""
        ...

    def active(self) -> AbstractContextManager[Any]:
        """Make this device the current one inside, as expressions of its arrays need it."""
        ...

    def empty(self, shape: Shape, dtype: npt.DTypeLike) -> DeviceArray:
        """Allocate an array."""
        ...

    def zeros(self, shape: Shape, dtype: npt.DTypeLike) -> DeviceArray:
        """Allocate an array of zeros."""
        ...

    def pinned(self, shape: Shape, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Allocate host memory that copies reach without a detour."""
        ...

    def upload(self, array: npt.NDArray[Any]) -> DeviceArray:
        """Copy a host array into a new one; it may be changed at once."""
        ...

    def copy_in(self, target: DeviceArray, source: npt.NDArray[Any], pinned: bool = False) -> None:
        """Copy a contiguous host array into a device array of its size, without waiting.

        ``pinned``: the source came from `pinned` and stays as it is until the copy has run.
        Otherwise it may be changed at once.
        """
        ...

    def copy_out(self, target: npt.NDArray[Any], source: DeviceArray) -> None:
        """Copy a contiguous device array into pinned memory, without waiting."""
        ...

    def download(self, array: DeviceArray) -> npt.NDArray[Any]:
        """Copy to the host and wait for it."""
        ...

    def adopt(self, array: Any, name: str) -> Adopted | None:
        """See a foreign array on this device as one of its own, without a copy.

        None for host arrays. The producer's stream is waited for by the current one, as the DLPack
        protocol arranges.

        Raises
        ------
        ArgumentTypeError
            For what is no array, or one on another device.
        """
        ...

    def launch(self, launch: Launch) -> None:
        """Run a kernel, built first where this specialisation is new; empty grids do nothing.

        Raises
        ------
        KernelCompileError
            Naming the specialisation.
        """
        ...

    def record(self) -> Event:
        """Mark the current stream."""
        ...

    def synchronize(self) -> None:
        """Wait for the current stream."""
        ...

    def capture(self) -> AbstractContextManager[Graph]:
        """Capture what is launched inside, on a stream of its own."""
        ...
