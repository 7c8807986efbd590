"""Moving whole pages in device memory: copies, clearing, slabs, and swapping them out."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ArgumentTypeError
from ..paging.layout import PageLayout
from ..paging.span_tables import layer_spans, norm_spans
from . import page_launches
from .cuda_operands import Operands
from .device import DeviceArray, Event
from .dtypes import check_shape
from .host_pages import SlabRules

Array = npt.NDArray[Any]


class SwappedPages(NamedTuple):
    """Pages on their way out of device memory.

    Attributes
    ----------
    slabs : ndarray of uint8 ``[n, page_bytes]``
        In pinned host memory; to be read after `wait`.
    event : Event
        Passed when the bytes have arrived.
    """

    slabs: Array
    event: Event

    def wait(self) -> Array:
        """Wait for the bytes and return the slabs."""
        self.event.synchronize()
        return self.slabs


class CudaPages(SlabRules):
    """Whole-page operations on a pool in device memory.

    Parameters
    ----------
    layout : PageLayout
        Where everything lies.
    pool : array of uint8
        The pool.
    operands : Operands
        Brings indices to the device.
    """

    def __init__(self, layout: PageLayout, pool: DeviceArray, operands: Operands) -> None:
        super().__init__(layout)
        self._pool, self._operands, self._device = pool, operands, operands.device
        self._layers = self._device.upload(layer_spans(layout))
        self._norms = self._device.upload(norm_spans(layout))
        self._largest = max(layout.layer_page_bytes)

    def copy(self, src: Array, dst: Array) -> None:
        """Copy pages: ``dst[i]`` becomes ``src[i]``; no page is both source and destination."""
        self.check(src)
        self.check(dst)
        if len(src) != len(dst):
            raise ArgumentError(f"src and dst must pair up, got {len(src)} and {len(dst)} pages")
        if len(src):
            old, new = map(self._operands.index, (src, dst))
            self._device.launch(
                page_launches.copy_pages(self._pool, self._layers, old, new, self._largest)
            )

    def clear_norms(self, pages: Array) -> None:
        """Zero norms and key bounds, so that no stale norm is ever NaN."""
        self.check(pages)
        if len(pages):
            heads, ids = self._layout.config.num_kv_heads, self._operands.index(pages)
            self._device.launch(page_launches.clear_norms(self._pool, self._norms, ids, heads))

    def fill(self, pages: Array, byte: int) -> None:
        """Fill pages with one byte (poison, in debug mode)."""
        self.check(pages)
        if len(pages):
            ids = self._operands.index(pages)
            with self._device.active():
                for layer in range(len(self._layout.extents)):
                    self._layout.layer_view(self._pool, layer)[ids] = byte

    def gather(self, pages: Array, out: Array | None = None) -> Any:
        """Copy pages into slabs ``uint8[len(pages), page_bytes]``.

        They stay on the device, or are copied into the host array ``out`` where given.
        """
        self.check(pages)
        shape = (len(pages), self._layout.page_bytes)
        slabs = self._device.empty(shape, np.uint8)
        if len(pages):
            self._move(page_launches.gather_slabs, pages, slabs)
        if out is None:
            return slabs
        check_shape(out, "out", shape, "pages, page bytes")
        out[...] = self._device.download(slabs)
        return out

    def scatter(self, slabs: Any, pages: Array) -> None:
        """Copy slabs ``uint8[len(pages), page_bytes]`` into pages.

        Host slabs have arrived when this returns; those on the device are read in stream order.
        """
        self.check(pages)
        check_shape(slabs, "slabs", (len(pages), self._layout.page_bytes), "pages, page bytes")
        adopted = self._device.adopt(slabs, "slabs")
        given = slabs if adopted is None else adopted.array
        if given.dtype != np.uint8:
            raise ArgumentTypeError(f"slabs must be uint8, got {given.dtype}")
        if not len(pages):
            return
        if adopted is not None:
            self._move(page_launches.scatter_slabs, pages, self._operands.contiguous(given))
            return
        self._move(page_launches.scatter_slabs, pages, self._device.upload(slabs))
        # The caller may be a thread whose stream nobody else waits for.
        self._device.synchronize()

    def swap_out(self, pages: Array) -> SwappedPages:
        """Copy pages into pinned host memory without waiting; the pages stay as they are.

        Returns
        -------
        SwappedPages
            Pages may be reused by later work on the same stream at once.
        """
        slabs = self.gather(pages)
        pinned = self._device.pinned(slabs.shape, np.uint8)
        self._device.copy_out(pinned, slabs)
        return SwappedPages(pinned, self._device.record())

    def swap_in(self, swapped: SwappedPages, pages: Array) -> Event:
        """Copy what `swap_out` returned into pages, any as many, without waiting.

        Returns
        -------
        Event
            Until it has passed the pinned slabs must stay as they are.
        """
        self.check(pages)
        shape = (len(pages), self._layout.page_bytes)
        check_shape(swapped.slabs, "slabs", shape, "pages, page bytes")
        if swapped.slabs.dtype != np.uint8:
            raise ArgumentTypeError(f"slabs must be uint8, got {swapped.slabs.dtype}")
        if not swapped.slabs.flags.c_contiguous:
            raise ArgumentError("slabs must be contiguous: their bytes are copied as they lie")
        slabs = self._device.empty(shape, np.uint8)
        # The copy out may have been issued on another stream.
        swapped.event.synchronize()
        self._device.copy_in(slabs, swapped.slabs, pinned=True)
        if len(pages):
            self._move(page_launches.scatter_slabs, pages, slabs)
        return self._device.record()

    def _move(self, launch: Any, pages: Array, slabs: DeviceArray) -> None:
        ids = self._operands.index(pages)
        self._device.launch(launch(self._pool, self._layers, ids, slabs, self._largest))
