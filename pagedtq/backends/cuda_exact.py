"""Attention over what is exact: rings and sinks, and a chunk's own keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import Dtype
from .attend_launches import NO_STATE, State, merge_dense
from .cuda_operands import DeviceTokens
from .cuda_reads import StepReads, WorkArrays
from .device import DeviceArray
from .dtypes import STORAGE

if TYPE_CHECKING:
    from .cuda import CudaBackend


class ExactParts:
    """The exact parts of attention over a step.

    Parameters
    ----------
    backend : CudaBackend
        Whose windows are read.
    step : StepReads
        What is read.
    work : WorkArrays
        Where states go.
    """

    def __init__(self, backend: CudaBackend, step: StepReads, work: WorkArrays) -> None:
        self._backend, self._step, self._work = backend, step, work

    def attend(
        self,
        layer: int,
        queries: DeviceArray,
        kind: Dtype,
        sm_scale: float,
        chunk: DeviceTokens | None,
        window_left: int | None,
        soft_cap: float | None,
    ) -> State:
        """Attend over the window, the chunk, or both merged; no state where there is neither."""
        on, one, launch = self._step.on, self._backend.layer(layer), self._backend.device.launch

        def part(name: str, reads: str, owners: tuple[Any, Any], rows: tuple[Any, Any]) -> State:
            into = self._state(name, queries.shape)
            launch(
                one.attention.attend_window(
                    queries, kind, on[reads], on["reads"][0], on["query_starts"], owners, rows,
                    sm_scale, window_left, soft_cap, into,
                )
            )  # fmt: skip
            return into

        states = []
        if self._step.has_window and one.window is not None:
            reads = "reads" if chunk is None else "window_reads"
            owners = on["window_slots"], on["sink_records"]
            states.append(part("window", reads, owners, (one.window.ring, one.window.sink)))
        if chunk is not None:
            ring, none = self._chunk_rows(layer, chunk)
            owners = on["chunk_slots"], on["no_records"]
            states.append(part("chunk", "chunk_reads", owners, (ring, none)))
        if len(states) < 2:
            return states[0] if states else NO_STATE
        into = self._state("merged", queries.shape)
        counts = np.arange(2 * self._step.tokens + 1, dtype=np.int32)
        counts[self._step.tokens + 1 :] = 1
        at = self._backend.operands.constant(counts)
        macros, dim = one.attention.macros, self._backend.config.head_dim
        launch(merge_dense(dim, macros, (states[0], states[1]), into, at))
        return into

    def _chunk_rows(self, layer: int, chunk: DeviceTokens) -> tuple[DeviceArray, DeviceArray]:
        """Write the chunk into a ring of its own; return it, and sinks without rows."""
        config, step = self._backend.config, self._step
        shape = (step.batch, config.num_kv_heads, 2, step.chunk_tokens, config.head_dim)
        dtype = STORAGE[config.kv_dtype]
        ring = self._work.get("chunk_ring", shape, dtype)
        none = self._work.get("no_sinks", (*shape[:3], 0, config.head_dim), dtype)
        launches = self._backend.layer(layer).tokens
        rows, nowhere = step.on["chunk_rows"], step.on["nowhere"]
        self._backend.device.launch(
            launches.store_window(*chunk.arrays, chunk.kind, rows, nowhere, ring, none)
        )
        return ring, none

    def _state(self, name: str, shape: tuple[int, ...]) -> State:
        out = self._work.get(name + "_out", shape, np.float32)
        return State(out, self._work.get(name + "_lse", shape[:2], np.float32))
