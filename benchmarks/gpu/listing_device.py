"""A device that runs nothing: it builds every argument and notes what would be launched.

It says which kernels a run needs, so that they can be compiled side by side before the first one is
timed, and walks every stage where there is no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np

from pagedtq.backends.device import Adopted
from pagedtq.backends.page_launches import Launch


class _Done:
    done = True

    def synchronize(self) -> None:
        """Return at once."""

    def launch(self) -> None:
        """Run nothing."""


class ListingDevice:
    """See `pagedtq.backends.device.Device`; arrays are NumPy's, of the right size, and stay as is.

    Attributes
    ----------
    launches : dict
        One launch of every specialisation, in order of first use.
    """

    xp = np
    capturing = False

    def __init__(self, arch: int = 90, multiprocessors: int = 132) -> None:
        self.name, self.arch, self.multiprocessors = "no device", arch, multiprocessors
        self.launches: dict[tuple[Any, ...], Launch] = {}

    def active(self) -> nullcontext[None]:
        """Nothing to choose from."""
        return nullcontext()

    def empty(self, shape: Any, dtype: Any) -> Any:
        """Allocate."""
        return np.zeros(shape, dtype).view(_OnDevice)

    zeros = empty

    def pinned(self, shape: Any, dtype: Any) -> Any:
        """Allocate."""
        return np.empty(shape, dtype)

    def upload(self, array: Any) -> Any:
        """Copy."""
        return np.array(array, order="C").view(_OnDevice)

    def copy_in(self, target: Any, source: Any, pinned: bool = False) -> None:
        """Check the sizes."""
        assert target.nbytes == source.nbytes

    def copy_out(self, target: Any, source: Any) -> None:
        """Check the sizes."""
        assert target.nbytes == source.nbytes

    def download(self, array: Any) -> Any:
        """Copy."""
        return np.array(array).view(np.ndarray)

    def adopt(self, array: Any, name: str) -> Adopted | None:
        """Know its own arrays."""
        return Adopted(array, None) if isinstance(array, _OnDevice) else None

    def launch(self, launch: Launch) -> None:
        """Note a kernel."""
        key = (launch.file, launch.kernel, tuple(launch.macros.items()))
        if 0 not in launch.grid:
            self.launches.setdefault(key, launch)

    def record(self) -> _Done:
        """Mark nothing."""
        return _Done()

    def synchronize(self) -> None:
        """Return at once."""

    @contextmanager
    def capture(self) -> Iterator[_Done]:
        """Capture nothing."""
        yield _Done()


class _OnDevice(np.ndarray):
    """Marks what lies on the device."""
