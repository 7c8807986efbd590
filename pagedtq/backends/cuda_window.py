"""Rings and sink records of one layer in device memory; twin of `host_window`."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import CacheConfig
from .cuda_operands import DeviceTokens, Operands
from .device import DeviceArray
from .dtypes import STORAGE
from .page_launches import LayerLaunches

Array = npt.NDArray[Any]


class CudaWindow:
    """Rings and sinks of one layer.

    Parameters
    ----------
    config : CacheConfig
        Shape, ``kv_dtype`` and number of slots.
    operands : Operands
        Brings indices to the device.
    launches : LayerLaunches
        Of the layer.

    Attributes
    ----------
    ring, sink : array ``[slots, num_kv_heads, 2, rows, head_dim]``
        On the device, in the storage type of ``kv_dtype``; axis 2 is keys, values.
    """

    def __init__(self, config: CacheConfig, operands: Operands, launches: LayerLaunches) -> None:
        self.config, self._operands, self._launches = config, operands, launches
        self._device = operands.device
        self.rows, self.sinks = config.window_tokens, config.num_sinks
        shape = (config.num_window_slots, config.num_kv_heads, 2)
        dtype = STORAGE[config.kv_dtype]
        self.ring = self._device.zeros((*shape, self.rows, config.head_dim), dtype)
        self.sink = self._device.zeros((*shape, self.sinks, config.head_dim), dtype)

    def write(self, batch: DeviceTokens, ring_mapping: Any, sink_mapping: Any) -> None:
        """Write tokens to the rows they map to (-1: nowhere)."""
        if len(batch):
            rows, records = map(self._operands.index, (ring_mapping, sink_mapping))
            launch = self._launches.store_window(
                *batch.arrays, batch.kind, rows, records, self.ring, self.sink
            )
            self._device.launch(launch)

    def read_positions(
        self, slot: int, record: int, sinks: Array, ring: Array
    ) -> tuple[tuple[DeviceArray, DeviceArray], tuple[DeviceArray, DeviceArray]]:
        """Return exact ``(keys, values)`` of sink positions and of ring positions, float32.

        Each is ``[n, num_kv_heads, head_dim]``; the owner of no positions may be -1.
        """
        exact = self.positions(False, np.full(len(sinks), record), sinks)
        recent = self.positions(True, np.full(len(ring), slot), ring)
        return exact, recent

    def positions(
        self, ring: bool, owners: Array, positions: Array
    ) -> tuple[DeviceArray, DeviceArray]:
        """Return float32 keys and values ``[n, num_kv_heads, head_dim]`` of rows of any owners."""
        rows = self._rows(ring, owners, positions)
        with self._device.active():
            both = self._widen(self._flat(ring)[rows])
        both = both.reshape(len(positions), self.config.num_kv_heads, 2, self.config.head_dim)
        return both[:, :, 0], both[:, :, 1]

    def take_rows(self, ring: bool, owner: int, rows: Array) -> Array:
        """Return rows of a slot's ring or of a sink record as they lie, as a NumPy array.

        Returns
        -------
        ndarray ``[num_kv_heads, 2, len(rows), head_dim]``
        """
        index = self._rows(ring, np.full(len(rows), owner), rows)
        with self._device.active():
            taken = self._flat(ring)[index]
        shape = (len(rows), self.config.num_kv_heads, 2, self.config.head_dim)
        return self._device.download(taken).reshape(shape).transpose(1, 2, 0, 3)

    def put_rows(self, ring: bool, owner: int, rows: Array, data: Array) -> None:
        """Write what `take_rows` returned, here or elsewhere."""
        flat = np.ascontiguousarray(data.transpose(2, 0, 1, 3)).reshape(-1, self.config.head_dim)
        index = self._rows(ring, np.full(len(rows), owner), rows)
        content = self._device.upload(flat)
        with self._device.active():
            self._flat(ring)[index] = content

    def copy_slots(self, src: Array, dst: Array) -> None:
        """Copy whole rings."""
        self._copy(self.ring, src, dst)

    def copy_records(self, src: Array, dst: Array) -> None:
        """Copy whole sink records."""
        self._copy(self.sink, src, dst)

    def _copy(self, store: DeviceArray, src: Array, dst: Array) -> None:
        if len(src):
            old, new = map(self._operands.index, (src, dst))
            with self._device.active():
                store[new] = store[old]

    def _flat(self, ring: bool) -> DeviceArray:
        store = self.ring if ring else self.sink
        return store.reshape(-1, self.config.head_dim)

    def _rows(self, ring: bool, owners: Array, positions: Array) -> DeviceArray:
        """Return the rows of `_flat` that hold positions: ``int64[n * num_kv_heads * 2]``."""
        size = max(1, self.rows if ring else self.sinks)
        planes = np.arange(2 * self.config.num_kv_heads)
        first = np.asarray(owners, np.int64)[:, None] * len(planes) + planes
        rows = first * size + np.asarray(positions, np.int64)[:, None] % size
        return self._device.upload(rows.reshape(-1))

    def _widen(self, rows: DeviceArray) -> DeviceArray:
        if self.config.kv_dtype == "bf16":
            return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return rows.astype(np.float32)
