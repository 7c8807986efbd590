"""Small host arrays that travel to the device together, into bytes that never move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .device import Device, DeviceArray, Shape

_ALIGN = 16
_WORD = 8
# Unchanged bytes between two changes travel along up to here: another copy costs the host about as
# much as so many bytes do (some ten microseconds of calls, a few gigabytes a second).
_GAP = 64 << 10

#: Bytes ``begin, end`` of the buffer.
Span = tuple[int, int]


class PackedUpload:
    """Named arrays in one device buffer, and their mirror on the host.

    Only what changed is sent, so that large page tables cost what their changed rows do; as long as
    everything is small, or has changed, that is one copy.

    Parameters
    ----------
    device : Device
        Where the buffer lies.
    fields : mapping of str to (shape, dtype)
        The arrays.

    Attributes
    ----------
    host : dict of str to ndarray
        To be written to; `send` brings what changed to the device.
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
        # What the device holds, which begins as zeros too.
        self._sent = np.zeros(ends[-1], np.uint8)
        self._bytes = device.zeros(self._mirror.shape, np.uint8)
        self.host: dict[str, npt.NDArray[Any]] = {}
        self.device: dict[str, DeviceArray] = {}
        for (name, (shape, dtype)), begin in zip(fields.items(), ends):
            end = begin + int(np.prod(shape)) * np.dtype(dtype).itemsize
            self.host[name] = self._mirror[begin:end].view(dtype).reshape(shape)
            self.device[name] = self._bytes[begin:end].view(dtype).reshape(shape)

    def changed(self) -> list[Span]:
        """Return what differs from what the device holds, in spans far from each other."""
        words = np.flatnonzero(self._mirror.view(np.uint64) != self._sent.view(np.uint64))
        if not words.size:
            return []
        apart = np.flatnonzero(np.diff(words) > _GAP // _WORD)
        begins = words[np.concatenate(([0], apart + 1))] * _WORD
        ends = words[np.concatenate((apart, [-1]))] * _WORD + _WORD
        return list(zip(begins.tolist(), ends.tolist()))

    def send(self, spans: list[Span]) -> None:
        """Copy spans of the mirror to the device."""
        for begin, end in spans:
            part = self._mirror[begin:end]
            self._device.copy_in(self._bytes[begin:end], part)
            self._sent[begin:end] = part
