"""`AttendPlan`: one step's read ranges in device buffers that never move, and attention over them.

What a captured graph launches has fixed addresses and a fixed grid. So a plan allocates for a step
*shape* (sequences, query tokens, blocks) once; `update` copies page tables and read ranges into the
same bytes every step, and the split planner reads lengths on the device. A graph that was captured
around `attend` therefore replays after lengths grew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..config import Dtype
from ..errors import ArgumentError, ArgumentTypeError
from ..paging.table_views import Reads
from .attend_buffers import QueryRows, State, Units
from .attend_kernel import AttendKernel, attend_kernel, refuse_cap
from .attend_launches import AttentionLaunches
from .cuda_exact import ExactParts
from .cuda_operands import DeviceTokens
from .cuda_reads import StepReads, WorkArrays
from .cuda_units import GridUnits
from .device import DeviceArray
from .dtypes import check_shape
from .queries import check_query_shapes, check_scale
from .stream_formats import stream_format, takes_int8_values

if TYPE_CHECKING:
    from .cuda import CudaBackend

Array = npt.NDArray[Any]


class AttendPlan:
    """Read ranges of a batch on the device, and what attention over them needs to work.

    Made by `CudaBackend.plan`. One stream at a time may use a plan; plans do not share memory.

    Parameters
    ----------
    backend : CudaBackend
        Whose pages are read.
    batch, tokens, max_blocks : int
        Sequences, query tokens of all of them, and blocks of the longest that will come.
    chunk_tokens : int
        Most query tokens of one sequence whose own keys and values are passed along; 0 for never.
    """

    def __init__(
        self, backend: CudaBackend, batch: int, tokens: int, max_blocks: int, chunk_tokens: int = 0
    ) -> None:
        config = backend.config
        self._backend, self._device = backend, backend.device
        self._step = StepReads(backend.device, config, batch, tokens, max_blocks, chunk_tokens)
        self._work = WorkArrays(backend.device)
        self._units = GridUnits(
            backend.device, self._step, config.page_size, config.num_kv_heads, backend.split_tokens
        )
        self._exact = ExactParts(backend, self._step, self._work)

    def update(
        self,
        block_table: Array,
        reads: Reads,
        q_lens: Array | None = None,
        window: tuple[Array, Array] | None = None,
    ) -> None:
        """Bring a step's tables and ranges to the device; what did not change is not sent.

        Parameters
        ----------
        block_table : ndarray of int32 ``[batch, n]``, n <= max_blocks
            Page of each block; 0 where evicted.
        reads : Reads
            Which positions are read.
        q_lens : ndarray of int ``[batch]``, optional
            Query tokens per sequence, one each by default; they add up to ``tokens``.
        window : tuple of ndarray of int32 ``[batch]``, optional
            ``window_slots, sink_records``; without it no exact window is read.

        Raises
        ------
        ArgumentError
            For another shape than the plan's, counts that are negative, ranges that reach a block
            that the table does not have, or a page that the pool does not have, and window slots
            that do not hold what is read.
        ArgumentTypeError
            For tables, ranges, counts or slots that are not integers.
        """
        self._step.update(block_table, reads, q_lens, window)
        self._exact.update()

    def attend(
        self,
        layer: int,
        queries: Any,
        sm_scale: float,
        keys: Any = None,
        values: Any = None,
        *,
        soft_cap: float | None = None,
        sink_logits: Any = None,
        window_left: int | None = None,
        dtype: Dtype | None = None,
        out: Any = None,
        lse: Any = None,
    ) -> tuple[DeviceArray, DeviceArray]:
        """Attend as `CudaBackend.attend` does, over what `update` brought.

        Parameters
        ----------
        layer, queries, sm_scale, keys, values, soft_cap, sink_logits, window_left
            As `CudaBackend.attend`. The exact window is read where ``update`` was given one and the
            layer has one.
        dtype : {"f16", "bf16", "f32"}, optional
            Declares the type of queries, keys and values (needed for bfloat16 bits in uint16).
        out, lse : array of float32, optional
            Where results go; needed inside a captured graph, where nothing is allocated.

        Returns
        -------
        out : array of float32 ``[tokens, num_q_heads, head_dim]``
        lse : array of float32 ``[tokens, num_q_heads]``
        """
        backend, one = self._backend, self._backend.layer(layer)
        config = backend.config
        lens = self._step.q_lens
        check_query_shapes(
            queries, self._current(), self._step.counts, config.num_kv_heads, config.head_dim,
            window_left,
        )  # fmt: skip
        check_scale(sm_scale, soft_cap)
        refuse_cap(soft_cap)
        num_q_heads = queries.shape[1]
        group = num_q_heads // config.num_kv_heads
        chunk = self._chunk(layer, keys, values, dtype)
        sinks = None
        if sink_logits is not None:
            sinks = backend.operands.sink_logits(sink_logits, num_q_heads)
        into = self._results(out, lse, num_q_heads)
        if not into.lse.size:
            return into.out, into.lse
        array, kind = backend.operands.queries(queries, dtype)
        rows = int(lens.max()) * group
        kernel = self._kernel(layer, rows, soft_cap is not None)
        reads = "reads" if chunk is None else "body_reads"
        buffers, units = self._step.buffers(reads), self._units.plan(kernel, group, layer, reads)
        prepared = self._rotate(one.attention, array, kind, sm_scale, num_q_heads)
        parts = self._parts(units, kernel)
        launch = self._device.launch
        launch(
            one.attention.attend(
                kernel, buffers, prepared, units, parts, group, window_left, soft_cap
            )
        )
        other = self._exact.attend(layer, array, kind, sm_scale, chunk, window_left, soft_cap)
        launch(one.attention.merge(parts, kernel.columns, buffers, units, other, sinks, into))
        return into.out, into.lse

    def score(self, layer: int, queries: Any, starts: Array, block_starts: Array) -> DeviceArray:
        """Write the scores of keys in pages into a new ``float32[num_q_heads, starts[-1]]``.

        ``starts`` (``int64[batch + 1]``) and ``block_starts`` (``int64[batch, n]``, from the
        sequence's start) say where they go; what lies elsewhere in the result is not written.
        """
        backend, one = self._backend, self._backend.layer(layer)
        num_q_heads = queries.shape[1]
        group = num_q_heads // backend.config.num_kv_heads
        array, kind = backend.operands.queries(queries)
        kernel = self._kernel(layer, group, False)
        buffers = self._step.buffers("reads")
        units = self._units.plan(kernel, group, layer, "reads")
        prepared = self._rotate(one.attention, array, kind, 1.0, num_q_heads)
        scores = self._device.empty((num_q_heads, int(starts[-1])), np.float32)
        padded = np.zeros(buffers.table.shape, np.int64)
        padded[:, : block_starts.shape[1]] = block_starts
        places = self._device.upload(starts), self._device.upload(padded)
        launch = one.attention.score(kernel, buffers, prepared, units, places, group, scores)
        self._device.launch(launch)
        return scores

    # -- parts -------------------------------------------------------------------------------

    def _kernel(self, layer: int, rows: int, soft_cap: bool) -> AttendKernel:
        layout, arch = self._backend.layout, self._device.arch
        int8_values = self._backend.int8_values
        if int8_values:
            values = stream_format(layout.config.layer_codecs(layer)[1])
            int8_values = arch >= 80 and takes_int8_values(layout.config.head_dim, values)
        return attend_kernel(layout, layer, rows, soft_cap, arch=arch, int8_values=int8_values)

    def _current(self) -> Reads:
        if self._step.reads is None:
            raise ArgumentError("this plan has nothing to read yet; call update first")
        return self._step.reads

    def _chunk(
        self, layer: int, keys: Any, values: Any, dtype: Dtype | None
    ) -> DeviceTokens | None:
        if keys is None and values is None:
            return None
        if keys is None or values is None:
            raise ArgumentError("keys and values of the chunk come together, got only one")
        if not self._step.chunk_tokens:
            raise ArgumentError("this plan was made for steps without keys and values of the chunk")
        check_shape(keys, "keys", (self._step.tokens, None, None), "one row per query token")
        return self._backend.check(layer, keys, values, dtype)

    def _results(self, out: Any, lse: Any, num_q_heads: int) -> State:
        shape = (self._step.tokens, num_q_heads, self._backend.config.head_dim)
        arrays = []
        for name, given, wanted in (("out", out, shape), ("lse", lse, shape[:2])):
            if given is None:
                if self._device.capturing:
                    raise ArgumentError("pass out and lse: a captured graph allocates nothing")
                arrays.append(self._device.empty(wanted, np.float32))
                continue
            adopted = self._device.adopt(given, name)
            check_shape(given, name, wanted, "tokens, query heads, and head_dim of out")
            if adopted is None or adopted.array.dtype != np.float32:
                raise ArgumentTypeError(f"{name} must be float32 on the device")
            if not adopted.array.flags.c_contiguous:
                raise ArgumentError(f"{name} must be contiguous")
            arrays.append(adopted.array)
        return State(*arrays)

    def _rotate(
        self,
        launches: AttentionLaunches,
        queries: DeviceArray,
        kind: Dtype,
        sm_scale: float,
        num_q_heads: int,
    ) -> QueryRows:
        count, dim = self._step.tokens * num_q_heads, self._backend.config.head_dim
        rows = QueryRows(
            self._work.get("rows", (count, dim), np.uint16),
            self._work.get("scales", (count,), np.float32),
            self._work.get("sketches", (count, dim), np.uint16) if launches.has_sketches else None,
            self._work.get("offsets", (count,), np.float32) if launches.has_offsets else None,
        )
        self._device.launch(launches.rotate(queries, kind, sm_scale, rows))
        return rows

    def _parts(self, units: Units, kernel: AttendKernel) -> State:
        config = self._backend.config
        shape = (len(units.sequences), config.num_kv_heads, kernel.columns)
        out = self._work.get("part_outs", (*shape, config.head_dim), np.float32)
        return State(out, self._work.get("part_lses", shape, np.float32))
