"""Attention over what is exact: rings and sinks, and a chunk's own keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..config import Dtype
from ..paging.table_views import Reads
from .attend_buffers import NO_STATE, State
from .attend_launches import merge_dense
from .chunk_pages import chunk_layout, chunk_reads, chunk_table
from .cuda_operands import DeviceTokens
from .cuda_reads import StepReads, WorkArrays
from .device import DeviceArray
from .read_checks import Owners

if TYPE_CHECKING:
    from .cuda import CudaBackend


class ChunkPart:
    """Causal attention of chunks over their own keys and values, as exact pages of a scratch pool.

    Parameters
    ----------
    backend : CudaBackend
        The cache's.
    step : StepReads
        The step's shape.
    """

    def __init__(self, backend: CudaBackend, step: StepReads) -> None:
        from .cuda import CudaBackend

        self._table = chunk_table(step.batch, step.chunk_tokens)
        config = chunk_layout(backend.config, step.batch, step.chunk_tokens).config
        split = backend.split_tokens
        self._scratch = CudaBackend(
            config,
            device=backend.device,
            split_tokens=None if split is None else max(split, config.page_size),
        )
        self._plan = self._scratch.plan(step.batch, self._table.shape[1], step.tokens)

    def update(self, q_lens: npt.NDArray[np.int64]) -> None:
        """Bring the chunks' lengths to the device."""
        self._plan.update(self._table, chunk_reads(q_lens), q_lens)

    def attend(
        self, chunk: DeviceTokens, slots: DeviceArray, queries: DeviceArray, **options: Any
    ) -> None:
        """Store chunks into the scratch pages at ``slots``, and attend over them."""
        self._scratch.write(0, chunk, slots)
        self._plan.attend(0, queries, **options)


class WindowSpan(NamedTuple):
    """What is read of the exact windows of a batch, checked, on the host.

    Attributes
    ----------
    reads : Reads
        The read ranges, without the chunk where that is attended to apart.
    q_lens : ndarray of int64 ``[batch]``
        Query tokens of each sequence.
    owners : tuple of ndarray of int64 ``[batch]``
        Window slots and sink records.
    """

    reads: Reads
    q_lens: npt.NDArray[np.int64]
    owners: Owners


def attend_window(
    backend: CudaBackend,
    layer: int,
    queries: DeviceArray,
    kind: Dtype,
    span: WindowSpan,
    lengths: npt.NDArray[np.int64],
    sm_scale: float,
    window_left: int | None,
    soft_cap: float | None,
    into: State,
) -> None:
    """Attend over the exact windows of a batch alone; ``lengths`` are the sequences' own."""
    one, constant = backend.layer(layer), backend.operands.constant
    batch = len(lengths)
    starts = np.concatenate(([0], np.cumsum(span.q_lens)))
    # Two arrays, which the layers of a step have in common.
    places = constant(np.array([*span.reads, lengths], np.int64))
    small = constant(np.concatenate((starts, *span.owners)).astype(np.int32))
    owners = small[batch + 1 : 2 * batch + 1], small[2 * batch + 1 :]
    assert one.window is not None
    backend.device.launch(
        one.attention.attend_window(
            queries, kind, places[:5], places[5], small[: batch + 1], owners,
            (one.window.ring, one.window.sink), sm_scale, window_left, soft_cap, into,
        )
    )  # fmt: skip


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
        self._chunk = ChunkPart(backend, step) if step.chunk_tokens else None

    def update(self) -> None:
        """Follow an update of the step."""
        if self._chunk is not None:
            self._chunk.update(self._step.q_lens)

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

        states = []
        if self._step.has_window and one.window is not None:
            reads = "reads" if chunk is None else "window_reads"
            states.append(self._state("window", queries.shape))
            launch(
                one.attention.attend_window(
                    queries, kind, on[reads], on["reads"][0], on["query_starts"],
                    (on["window_slots"], on["sink_records"]), (one.window.ring, one.window.sink),
                    sm_scale, window_left, soft_cap, states[-1],
                )
            )  # fmt: skip
        if chunk is not None and self._chunk is not None:
            states.append(self._state("chunk", queries.shape))
            self._chunk.attend(
                chunk,
                on["chunk_slots"],
                queries,
                sm_scale=sm_scale,
                soft_cap=soft_cap,
                window_left=window_left,
                dtype=kind,
                out=states[-1].out,
                lse=states[-1].lse,
            )
        if len(states) < 2:
            return states[0] if states else NO_STATE
        into = self._state("merged", queries.shape)
        counts = np.arange(2 * self._step.tokens + 1, dtype=np.int32)
        counts[self._step.tokens + 1 :] = 1
        at = self._backend.operands.constant(counts)
        macros, dim = one.attention.macros, self._backend.config.head_dim
        launch(merge_dense(dim, macros, (states[0], states[1]), into, at))
        return into

    def _state(self, name: str, shape: tuple[int, ...]) -> State:
        out = self._work.get(name + "_out", shape, np.float32)
        return State(out, self._work.get(name + "_lse", shape[:2], np.float32))
