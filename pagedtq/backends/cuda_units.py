"""How a step's attention is spread over the grid: units planned on the device, when stale."""

from __future__ import annotations

import math

import numpy as np

from .attend_buffers import ReadBuffers, Units
from .attend_kernel import AttendKernel
from .attend_launches import plan_splits
from .cuda_reads import StepReads
from .device import Device

# Blocks per multiprocessor that a grid aims at: enough that the last ones leave few idle. Not
# measured on a device yet.
_BLOCKS_PER_PROCESSOR = 12
# Tokens below which a part is not worth its partial state.
_MIN_PART_TOKENS = 256

_Key = tuple[int, int, int]


class GridUnits:
    """Plans of grids for one step shape.

    Parameters
    ----------
    device : Device
        Which device.
    step : StepReads
        What is read.
    page_size, num_kv_heads : int
        Of the cache.
    split_tokens : int or None
        Tokens of a part; None to fill the device.
    """

    def __init__(
        self,
        device: Device,
        step: StepReads,
        page_size: int,
        num_kv_heads: int,
        split_tokens: int | None,
    ) -> None:
        self._device, self._step = device, step
        self._page_size, self._heads, self._split_tokens = page_size, num_kv_heads, split_tokens
        self._units: dict[_Key, tuple[Units, int]] = {}
        self._planned: dict[_Key, tuple[int, str, bool, int]] = {}

    def plan(self, kernel: AttendKernel, group: int, layer: int, reads: str) -> Units:
        """Return the plan of a grid over one of the step's ranges, computed where it is stale.

        All layers of a step share it. While capturing, the graph must hold the planner itself; a
        pass over the layers goes upwards, so a layer at or below the last one begins a new pass.
        """
        key = (kernel.columns, kernel.tile_tokens, group)
        if key not in self._units:
            count, part_tiles = self._grid(kernel, group)
            shapes = ((count,), (self._step.batch,), (self._step.batch,))
            units = Units(*(self._device.empty(shape, np.int32) for shape in shapes))
            self._units[key] = (units, part_tiles)
        units, part_tiles = self._units[key]
        capturing = self._device.capturing
        wanted = (self._step.version, reads, capturing)
        *planned, last = self._planned.get(key, (-1, "", False, -1))
        if tuple(planned) != wanted or (capturing and layer <= last):
            buffers: ReadBuffers = self._step.buffers(reads)
            self._device.launch(
                plan_splits(buffers, units, group, kernel.columns, kernel.tile_tokens, part_tiles)
            )
        self._planned[key] = (*wanted, layer)
        return units

    def _grid(self, kernel: AttendKernel, group: int) -> tuple[int, int]:
        """Return the number of units, and the least tiles of a part."""
        step = self._step
        # However the query tokens fall on the sequences.
        column_tiles = step.batch + step.tokens * group // kernel.columns
        if self._split_tokens is None:
            wanted = _BLOCKS_PER_PROCESSOR * self._device.multiprocessors
            count = max(column_tiles, -(-wanted // self._heads))
            return count, -(-_MIN_PART_TOKENS // kernel.tile_tokens)
        part_tiles = -(-self._split_tokens // kernel.tile_tokens)
        part_tokens = part_tiles * kernel.tile_tokens
        parts = math.ceil(step.max_blocks * self._page_size / part_tokens)
        return column_tiles * max(1, parts), part_tiles
