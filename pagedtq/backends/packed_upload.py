"""Small host arrays that travel to the device together, into bytes that never move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .device import Device, DeviceArray, Shape

_ALIGN = 16


class PackedUpload:
    """Named arrays in one device buffer, and their mirror on the host.

    Parameters
    ----------
    device : Device
        Where the buffer lies.
    fields : mapping of str to (shape, dtype)
        The arrays.

    Attributes
    ----------
    host : dict of str to ndarray
        To be written to; `send` brings all of it to the device in one copy.
    device : dict of str to array
        The same on the device, at addresses that stay.
    """

    def __init__(self, device: Device, fields: Mapping[str, tuple[Shape, npt.DTypeLike]]) -> None:
        ends = [0]
        for shape, dtype in fields.values():
            size = int(np.prod(shape)) * np.dtype(dtype).itemsize
            ends.append(ends[-1] + -(-size // _ALIGN) * _ALIGN)
        self._device = device
        self._mirror = np.zeros(ends[-1], np.uint8)
        self._sent: npt.NDArray[np.uint8] | None = None
        self._bytes = device.zeros(self._mirror.shape, np.uint8)
        self.host: dict[str, npt.NDArray[Any]] = {}
        self.device: dict[str, DeviceArray] = {}
        for (name, (shape, dtype)), begin in zip(fields.items(), ends):
            end = begin + int(np.prod(shape)) * np.dtype(dtype).itemsize
            self.host[name] = self._mirror[begin:end].view(dtype).reshape(shape)
            self.device[name] = self._bytes[begin:end].view(dtype).reshape(shape)

    def changed(self) -> bool:
        """Whether the mirror differs from what was sent last."""
        return self._sent is None or not np.array_equal(self._sent, self._mirror)

    def send(self) -> None:
        """Copy the mirror to the device."""
        self._device.copy_in(self._bytes, self._mirror)
        self._sent = self._mirror.copy()
