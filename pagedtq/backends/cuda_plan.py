"""`AttendPlan`: one step's read ranges in device buffers that never move, and attention over them.

What a captured graph launches has fixed addresses and a fixed grid. So a plan allocates for a step
*shape* (sequences, query tokens, blocks) once; `update` copies page tables and read ranges into the
same bytes every step, and the split planner reads lengths on the device. A graph that was captured
around `attend` therefore replays after lengths grew.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..config import Dtype
from ..errors import ArgumentError, ArgumentTypeError, NonFiniteError
from ..paging.table_views import Reads
from .attend_arguments import AttendKernel, attend_kernel
from .attend_launches import (
    NO_STATE,
    AttentionLaunches,
    QueryRows,
    ReadBuffers,
    State,
    Units,
    merge_dense,
    plan_splits,
)
from .cuda_operands import DeviceTokens
from .device import DeviceArray
from .dtypes import STORAGE, check_shape
from .host import without_chunk
from .packed_upload import PackedUpload
from .queries import check_query_shapes, check_scale

if TYPE_CHECKING:
    from .cuda import CudaBackend

Array = npt.NDArray[Any]

# Blocks per multiprocessor that a grid aims at: enough that the last ones leave few idle. Not
# measured on a device yet.
_BLOCKS_PER_PROCESSOR = 12
# Tokens below which a part is not worth its partial state.
_MIN_PART_TOKENS = 256


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
        self._backend, self._device = backend, backend.device
        self.batch, self.tokens, self.max_blocks = batch, tokens, max_blocks
        self.chunk_tokens = chunk_tokens
        fields: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {
            "table": ((batch, max_blocks), np.int32),
            "query_starts": ((batch + 1,), np.int32),
            "window_slots": ((batch,), np.int32),
            "sink_records": ((batch,), np.int32),
            "reads": ((5, batch), np.int64),
        }
        if chunk_tokens:
            fields |= {
                "body_reads": ((5, batch), np.int64),
                "window_reads": ((5, batch), np.int64),
                "chunk_reads": ((5, batch), np.int64),
                "chunk_rows": ((tokens,), np.int64),
                "nowhere": ((tokens,), np.int64),
                "chunk_slots": ((batch,), np.int32),
                "no_records": ((batch,), np.int32),
            }
        self._packed = PackedUpload(self._device, fields)
        self._work: dict[str, DeviceArray] = {}
        self._outgrown: list[DeviceArray] = []
        self._units: dict[tuple[int, int, int], tuple[Units, int]] = {}
        self._planned: dict[tuple[int, int, int], tuple[int, bool, int]] = {}
        self._version = 0
        self.reads: Reads | None = None
        self.q_lens: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._has_window = False

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
            For another shape than the plan's, or ranges that reach a block that the table does not
            have, or a page that the pool does not have.
        """
        lens = np.ones(self.batch, np.int64) if q_lens is None else np.asarray(q_lens, np.int64)
        shape = (len(reads.kv_lens), int(lens.sum()))
        if shape != (self.batch, self.tokens) or block_table.shape[1] > self.max_blocks:
            raise ArgumentError(
                f"this plan is for {self.batch} sequences, {self.tokens} query tokens and at most "
                f"{self.max_blocks} blocks, got {shape[0]}, {shape[1]} and {block_table.shape[1]}"
            )
        if self.chunk_tokens and lens.max(initial=0) > self.chunk_tokens:
            raise ArgumentError(
                f"this plan is for chunks of at most {self.chunk_tokens} tokens, got {lens.max()}"
            )
        blocks = block_table.shape[1]
        host = self._packed.host
        table = host["table"]
        table[:, :blocks], table[:, blocks:] = block_table, 0
        starts = host["query_starts"]
        np.cumsum(lens, out=starts[1:])
        host["reads"][...] = reads
        host["window_slots"][...], host["sink_records"][...] = (
            (-1, -1) if window is None else window
        )
        if self.chunk_tokens:
            self._chunk_fields(host, reads, lens)
        if self._packed.changed():
            self._refuse_wild_pages(block_table, reads)
            self._packed.send()
            self._version += 1
        self.reads, self.q_lens, self._has_window = reads, lens, window is not None

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
        reads = self._current()
        check_query_shapes(
            queries, reads, self.q_lens, config.num_kv_heads, config.head_dim, window_left
        )
        check_scale(sm_scale, soft_cap)
        num_q_heads = queries.shape[1]
        group = num_q_heads // config.num_kv_heads
        chunk = self._chunk(layer, keys, values, dtype)
        sinks = self._sink_logits(sink_logits, num_q_heads)
        into = self._results(out, lse, num_q_heads)
        if not into.lse.size:
            return into.out, into.lse
        array, kind = backend.operands.queries(queries, dtype)
        rows = int(self.q_lens.max()) * group
        kernel = attend_kernel(backend.layout, layer, rows, soft_cap is not None)
        buffers = self._buffers("reads" if chunk is None else "body_reads")
        units = self._plan_units(kernel, group, layer, buffers)
        prepared = self._rotate(one.attention, array, kind, sm_scale, num_q_heads)
        parts = self._parts(units, kernel)
        launch = self._device.launch
        launch(
            one.attention.attend(
                kernel, buffers, prepared, units, parts, group, window_left, soft_cap
            )
        )
        other = self._exact(layer, array, kind, sm_scale, chunk, window_left, soft_cap)
        launch(one.attention.merge(parts, kernel.columns, buffers, units, other, sinks, into))
        return into.out, into.lse

    def score(
        self, layer: int, queries: Any, starts: tuple[DeviceArray, DeviceArray], total: int
    ) -> DeviceArray:
        """Write the scores of keys in pages into a new ``float32[num_q_heads, total]``.

        ``starts`` say where each sequence's and each block's scores begin; what lies elsewhere in
        the result is not written.
        """
        backend, one = self._backend, self._backend.layer(layer)
        num_q_heads = queries.shape[1]
        group = num_q_heads // backend.config.num_kv_heads
        array, kind = backend.operands.queries(queries)
        kernel = attend_kernel(backend.layout, layer, group, False)
        buffers = self._buffers("reads")
        units = self._plan_units(kernel, group, layer, buffers)
        prepared = self._rotate(one.attention, array, kind, 1.0, num_q_heads)
        scores = self._device.empty((num_q_heads, total), np.float32)
        launch = one.attention.score(kernel, buffers, prepared, units, starts, group, scores)
        self._device.launch(launch)
        return scores

    # -- parts -------------------------------------------------------------------------------

    def _chunk_fields(self, host: dict[str, Array], reads: Reads, lens: Array) -> None:
        """Say what is read where, when the chunk is attended apart.

        The pages' kernel takes the query tokens' positions from ``kv_lens``, so only its ranges
        shrink; the window's kernel has the lengths apart. The chunk is a ring without sinks.
        """
        apart = without_chunk(reads, lens)
        host["body_reads"][...] = apart._replace(kv_lens=reads.kv_lens)
        host["window_reads"][...] = apart
        nothing = np.zeros(self.batch, np.int64)
        host["chunk_reads"][...] = (reads.kv_lens, nothing, apart.kv_lens, nothing, nothing)
        owners = np.repeat(np.arange(self.batch), lens)
        within = np.arange(self.tokens) - host["query_starts"][owners]
        position = apart.kv_lens[owners] + within
        host["chunk_rows"][...] = owners * self.chunk_tokens + position % self.chunk_tokens
        host["nowhere"][...] = -1
        host["chunk_slots"][...] = np.arange(self.batch)
        host["no_records"][...] = -1

    def _refuse_wild_pages(self, table: Array, reads: Reads) -> None:
        """Refuse what would make a kernel read outside the page table or the pool."""
        size, pages = self._backend.config.page_size, self._backend.config.num_pages
        longest = int(np.minimum(reads.stop, reads.kv_lens).max(initial=0))
        if longest > table.shape[1] * size:
            raise ArgumentError(
                f"block_table must have {-(-longest // size)} blocks for {longest} tokens, "
                f"got {table.shape[1]}"
            )
        begin = np.arange(table.shape[1]) * size
        end = begin + size
        touched = (begin < reads.stop[:, None]) & (end > reads.first[:, None])
        touched &= (begin < reads.keep[:, None]) | (end > reads.start[:, None])
        bad = table[touched & ((table < 0) | (table >= pages))]
        if bad.size:
            raise ArgumentError(f"pages must be in [0, {pages - 1}], got {bad[0]} in block_table")

    def _current(self) -> Reads:
        if self.reads is None:
            raise ArgumentError("this plan has nothing to read yet; call update first")
        return self.reads

    def _buffers(self, reads: str) -> ReadBuffers:
        on = self._packed.device
        return ReadBuffers(on["table"], on[reads], on["query_starts"])

    def _chunk(
        self, layer: int, keys: Any, values: Any, dtype: Dtype | None
    ) -> DeviceTokens | None:
        if keys is None and values is None:
            return None
        if keys is None or values is None:
            raise ArgumentError("keys and values of the chunk come together, got only one")
        if not self.chunk_tokens:
            raise ArgumentError("this plan was made for steps without keys and values of the chunk")
        check_shape(keys, "keys", (self.tokens, None, None), "one row per query token")
        return self._backend.check(layer, keys, values, dtype)

    def _sink_logits(self, sink_logits: Any, num_q_heads: int) -> DeviceArray | None:
        if sink_logits is None:
            return None
        check_shape(sink_logits, "sink_logits", (num_q_heads,), "one per query head")
        adopted = self._device.adopt(sink_logits, "sink_logits")
        if adopted is not None:
            if adopted.array.dtype != np.float32:
                raise ArgumentTypeError(
                    f"sink_logits on the device must be float32, got {adopted.array.dtype}"
                )
            return adopted.array
        if sink_logits.dtype.kind != "f":
            raise ArgumentTypeError(f"sink_logits must be floats, got {sink_logits.dtype}")
        if not (sink_logits < np.inf).all():
            raise NonFiniteError(f"sink_logits must be finite or -inf, got {sink_logits}")
        return self._backend.operands.constant(sink_logits.astype(np.float32))

    def _results(self, out: Any, lse: Any, num_q_heads: int) -> State:
        shape = (self.tokens, num_q_heads, self._backend.config.head_dim)
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

    def _plan_units(
        self, kernel: AttendKernel, group: int, layer: int, buffers: ReadBuffers
    ) -> Units:
        """Return the plan of the grid, computed on the device where it is stale.

        All layers of a step share it. While capturing, the graph must hold the planner itself; a
        pass over the layers goes upwards, so a layer at or below the last one begins a new pass.
        """
        key = (kernel.columns, kernel.tile_tokens, group)
        if key not in self._units:
            count, part_tiles = self._grid(kernel, group)
            shapes = ((count,), (self.batch,), (self.batch,))
            units = Units(*(self._device.empty(shape, np.int32) for shape in shapes))
            self._units[key] = (units, part_tiles)
        units, part_tiles = self._units[key]
        capturing = self._device.capturing
        # Chunks and whole reads are different ranges of one step.
        version = self._version * 2 + (buffers.reads is not self._packed.device["reads"])
        version_before, captured_before, last = self._planned.get(key, (-1, False, -1))
        stale = (version, capturing) != (version_before, captured_before)
        if stale or (capturing and layer <= last):
            self._device.launch(
                plan_splits(buffers, units, group, kernel.columns, kernel.tile_tokens, part_tiles)
            )
        self._planned[key] = (version, capturing, layer)
        return units

    def _grid(self, kernel: AttendKernel, group: int) -> tuple[int, int]:
        """Return the number of units, and the least tiles of a part."""
        config, fixed = self._backend.config, self._backend.split_tokens
        # However the query tokens fall on the sequences.
        column_tiles = self.batch + self.tokens * group // kernel.columns
        if fixed is None:
            wanted = _BLOCKS_PER_PROCESSOR * self._device.multiprocessors
            count = max(column_tiles, -(-wanted // config.num_kv_heads))
            return count, -(-_MIN_PART_TOKENS // kernel.tile_tokens)
        part_tiles = -(-fixed // kernel.tile_tokens)
        parts = math.ceil(self.max_blocks * config.page_size / (part_tiles * kernel.tile_tokens))
        return column_tiles * max(1, parts), part_tiles

    def _rotate(
        self,
        launches: AttentionLaunches,
        queries: DeviceArray,
        kind: Dtype,
        sm_scale: float,
        num_q_heads: int,
    ) -> QueryRows:
        count, dim = self.tokens * num_q_heads, self._backend.config.head_dim
        rows = QueryRows(
            self._array("rows", (count, dim), np.uint16),
            self._array("scales", (count,), np.float32),
            self._array("sketches", (count, dim), np.uint16) if launches.has_sketches else None,
            self._array("offsets", (count,), np.float32) if launches.has_offsets else None,
        )
        self._device.launch(launches.rotate(queries, kind, sm_scale, rows))
        return rows

    def _parts(self, units: Units, kernel: AttendKernel) -> State:
        config = self._backend.config
        shape = (len(units.sequences), config.num_kv_heads, kernel.columns)
        out = self._array("part_outs", (*shape, config.head_dim), np.float32)
        return State(out, self._array("part_lses", shape, np.float32))

    def _exact(
        self,
        layer: int,
        queries: DeviceArray,
        kind: Dtype,
        sm_scale: float,
        chunk: DeviceTokens | None,
        window_left: int | None,
        soft_cap: float | None,
    ) -> State:
        """Attend over what is exact: the window, the chunk, or both merged."""
        on, one = self._packed.device, self._backend.layer(layer)
        lengths = on["reads"][0]

        def attend(name: str, reads: str, owners: tuple[Any, Any], rows: tuple[Any, Any]) -> State:
            into = self._state(name, queries.shape)
            self._device.launch(
                one.attention.attend_window(
                    queries, kind, on[reads], lengths, on["query_starts"], owners, rows, sm_scale,
                    window_left, soft_cap, into,
                )
            )  # fmt: skip
            return into

        states = []
        if self._has_window and one.window is not None:
            reads = "reads" if chunk is None else "window_reads"
            owners = on["window_slots"], on["sink_records"]
            states.append(attend("window", reads, owners, (one.window.ring, one.window.sink)))
        if chunk is not None:
            config = self._backend.config
            shape = (self.batch, config.num_kv_heads, 2, self.chunk_tokens, config.head_dim)
            ring = self._array("chunk_ring", shape, STORAGE[config.kv_dtype])
            none = self._array("no_sinks", (*shape[:3], 0, config.head_dim), ring.dtype)
            self._device.launch(
                one.tokens.store_window(
                    *chunk.arrays, chunk.kind, on["chunk_rows"], on["nowhere"], ring, none
                )
            )
            owners = on["chunk_slots"], on["no_records"]
            states.append(attend("chunk", "chunk_reads", owners, (ring, none)))
        if len(states) < 2:
            return states[0] if states else NO_STATE
        into = self._state("merged", queries.shape)
        counts = np.arange(2 * self.tokens + 1, dtype=np.int32)
        counts[self.tokens + 1 :] = 1
        macros, dim = one.attention.macros, self._backend.config.head_dim
        at = self._backend.operands.constant(counts)
        self._device.launch(merge_dense(dim, macros, (states[0], states[1]), into, at))
        return into

    def _state(self, name: str, shape: tuple[int, ...]) -> State:
        out = self._array(name + "_out", shape, np.float32)
        return State(out, self._array(name + "_lse", shape[:2], np.float32))

    def _array(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """Return a work array; one allocation serves all shapes up to the largest that came."""
        kind = np.dtype(dtype)
        count = math.prod(shape)
        held = self._work.get(name)
        if held is None or held.size < count:
            # Graphs captured around the old one may still replay: it stays.
            self._outgrown.append(held)
            held = self._work[name] = self._device.empty((count,), kind)
        return held[:count].reshape(shape)
