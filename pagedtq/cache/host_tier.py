"""The bytes of sequences on the host: slabs of pages, ring rows and sinks."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..backends import Backend
from ..config import CacheConfig
from ..paging.swap_plan import HostPool, SwapPlan

Array = npt.NDArray[Any]

#: Bytes of slabs moved at a time: their pages are not side by side as a rule.
_CHUNK_BYTES = 8 << 20


class Ring(NamedTuple):
    """Rows of one ring from position ``begin`` on, layer by layer (``WindowStore.take_rows``)."""

    begin: int
    layers: list[Array]


class HostTier:
    """What `SwapPlan`s copy to and from.

    Parameters
    ----------
    config : CacheConfig
        Shape, and ``num_host_pages``.
    backend : Backend
        Holds the pages and windows of the device.
    pool : HostPool
        Says what is still owned.

    Notes
    -----
    The slabs ``uint8[num_host_pages, page_bytes]`` are allocated by the first swap, by the backend
    (`HostBackend.host_memory`): a device wants memory it can copy from and to by itself.
    """

    def __init__(self, config: CacheConfig, backend: Backend, pool: HostPool) -> None:
        self._config, self._backend, self._pool = config, backend, pool
        self._page_bytes = backend.layout.page_bytes
        layers = range(config.num_layers)
        self._windows = [layer for layer in layers if config.has_overlay(layer)]
        self._slabs: Array | None = None
        self._rings: dict[int, Ring] = {}
        # By page of the host: rows of its sinks, layer by layer.
        self._sinks: dict[int, list[Array]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes allocated: the slabs, once something was swapped, and rows of exact windows."""
        slabs = 0 if self._slabs is None else self._slabs.nbytes
        return slabs + self._window_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes that sequences hold."""
        return self._pool.num_used * self._page_bytes + self._window_bytes

    def copy(self, plan: SwapPlan) -> None:
        """Move the bytes of a swap; nothing else is touched, so others may step meanwhile."""
        if plan.direction == "out":
            self._copy_out(plan)
        else:
            self._copy_in(plan)

    def slabs(self, host_pages: Array) -> Array:
        """Return the slabs of pages of the host, ``uint8[n, page_bytes]``."""
        return self._storage()[_rows_of(host_pages)]

    def drop_unowned(self) -> None:
        """Let go of rings and sinks whose sequences have left the host."""
        refs, rings = self._pool.ref_counts, self._pool.rings.ref_counts
        for ring in [ring for ring in list(self._rings) if not rings[ring]]:
            del self._rings[ring]
        for page in [page for page in list(self._sinks) if not refs[page]]:
            del self._sinks[page]

    def _copy_out(self, plan: SwapPlan) -> None:
        pages = self._backend.pages
        for device, host in self._chunks(plan):
            rows = _rows_of(host)
            if isinstance(rows, slice):
                pages.gather(device, self._storage()[rows])
            else:
                slabs = np.empty((len(device), self._page_bytes), np.uint8)
                self._storage()[rows] = pages.gather(device, slabs)
        for slot, ring, (begin, end) in _listed(plan.window_slots, plan.rings, plan.ring_spans):
            rows = np.arange(begin, end) % max(1, self._config.window_tokens)
            taken = [self._window(layer).take_rows(True, slot, rows) for layer in self._windows]
            self._rings[ring] = Ring(begin, [np.array(part) for part in taken])
        width = self._config.num_sinks
        for record, page, count in _listed(plan.sink_records, plan.sink_host_pages, plan.num_sinks):
            kept = self._sinks.get(page, [])
            for at, layer in enumerate(self._windows):
                rows = self._window(layer).take_rows(False, record, np.arange(count))
                if at == len(kept):
                    kept.append(np.zeros((*rows.shape[:2], width, rows.shape[3]), rows.dtype))
                kept[at][:, :, :count] = rows
            self._sinks[page] = kept

    def _copy_in(self, plan: SwapPlan) -> None:
        pages = self._backend.pages
        for device, host in self._chunks(plan):
            pages.scatter(self.slabs(host), device)
        for slot, ring, (begin, end) in _listed(plan.window_slots, plan.rings, plan.ring_spans):
            rows = np.arange(begin, end) % max(1, self._config.window_tokens)
            first, layers = self._rings[ring]
            for layer, data in zip(self._windows, layers):
                part = data[:, :, begin - first : end - first]
                self._window(layer).put_rows(True, slot, rows, part)
        for record, page, count in _listed(plan.sink_records, plan.sink_host_pages, plan.num_sinks):
            for layer, data in zip(self._windows, self._sinks[page]):
                self._window(layer).put_rows(False, record, np.arange(count), data[:, :, :count])

    def _storage(self) -> Array:
        if self._slabs is None:
            shape = (self._config.num_host_pages, self._page_bytes)
            self._slabs = self._backend.host_memory(shape)
        return self._slabs

    def _chunks(self, plan: SwapPlan) -> list[tuple[Array, Array]]:
        step = max(1, _CHUNK_BYTES // self._page_bytes)
        return [
            (plan.pages[at : at + step], plan.host_pages[at : at + step])
            for at in range(0, plan.pages.size, step)
        ]

    def _window(self, layer: int) -> Any:
        return self._backend.window(layer)

    @property
    def _window_bytes(self) -> int:
        rings = sum(part.nbytes for ring in self._rings.values() for part in ring.layers)
        return rings + sum(part.nbytes for rows in self._sinks.values() for part in rows)


def _rows_of(host_pages: Array) -> Array | slice:
    """Return the rows of pages, which are numbered from 1: a slice where they follow each other."""
    if len(host_pages) and (np.diff(host_pages) == 1).all():
        return slice(int(host_pages[0]) - 1, int(host_pages[-1]))
    return np.asarray(host_pages - 1)


def _listed(*arrays: Array) -> zip[tuple[Any, ...]]:
    return zip(*(array.tolist() for array in arrays), strict=True)
