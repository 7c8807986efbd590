"""What the kernels of an attention step are launched with; the counterpart of `page_launches`.

Plain data again: the same launches run on a device and in the tests' harness.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..config import Dtype
from ..paging.kernel_macros import DTYPE_NUMBERS
from ..paging.layout import PageLayout
from .attend_buffers import QueryRows, ReadBuffers, State, Units
from .attend_kernel import AttendKernel
from .attend_shape import attend_shape
from .kernel_tables import StreamTables
from .page_launches import BLOCK, Launch, lanes_of

_WARP = 32


def plan_splits(
    buffers: ReadBuffers,
    units: Units,
    group: int,
    columns: int,
    tile_tokens: int,
    min_part_tiles: int,
) -> Launch:
    """Share a batch out among the units of a grid; see ``kernels/plan_splits.cu``."""
    numbers = (
        buffers.reads.shape[1],
        group,
        columns,
        tile_tokens,
        min_part_tiles,
        len(units.sequences),
    )
    arguments = (buffers.reads, buffers.query_starts, *map(np.int32, numbers), *units)
    return Launch("plan_splits.cu", "plan_splits", {"PLAN_THREADS": BLOCK}, (1,), arguments)


def merge_dense(
    head_dim: int, macros: dict[str, int], states: tuple[State, State], into: State, at: Any
) -> Launch:
    """Merge two states ``[tokens, num_q_heads(, head_dim)]`` into a third.

    ``at`` is int32 ``0, 1, ... tokens`` followed by ``tokens`` ones: every token is a unit of its
    own, whose columns are its query heads.
    """
    tokens, heads = into.lse.shape
    plain = {name: 0 if name.startswith(("KEY_", "VALUE_")) else macros[name] for name in macros}
    plain |= {"KEY_EXACT": DTYPE_NUMBERS["f32"], "VALUE_EXACT": DTYPE_NUMBERS["f32"]}
    plain |= {"KEY_ROW": 4 * head_dim, "VALUE_ROW": 4 * head_dim}
    numbers = (tokens, tokens * heads, heads, heads)
    return Launch(
        "merge.cu",
        "merge",
        plain,
        (_row_blocks(tokens * heads, head_dim),),
        (
            *states[0],
            np.int32(heads),
            at[: tokens + 1],
            at[:tokens],
            at[tokens + 1 :],
            *map(np.int32, numbers),
            None,
            *states[1],
            None,
            *into,
        ),
    )


class AttentionLaunches:
    """Launches of attention over one layer.

    Parameters
    ----------
    layout : PageLayout
        Where the planes lie.
    layer : int
        The layer.
    pages : array of uint8
        The pool from the layer's offset on.
    tables : tuple of StreamTables or None
        Of keys and values; None for an exact stream.
    entries : tuple of array of uint16
        Decoded values of the codes of keys and values (`attend_shape.table_entries`).
    qjl_factor : float
        Prod: the projection's factor.
    """

    def __init__(
        self,
        layout: PageLayout,
        layer: int,
        pages: Any,
        tables: tuple[StreamTables | None, StreamTables | None],
        entries: tuple[Any, Any],
        qjl_factor: float = 0.0,
    ) -> None:
        self.layout, self.layer = layout, layer
        self.macros = layout.kernel_macros(layer)
        self.heads, self.head_dim = layout.config.num_kv_heads, layout.config.head_dim
        self._pages, self._entries = pages, entries
        nothing = StreamTables(*[None] * len(StreamTables._fields))
        self._keys, self._values = (nothing if t is None else t for t in tables)
        self._qjl_factor = np.float32(qjl_factor)

    @property
    def has_sketches(self) -> bool:
        """Whether keys carry QJL signs."""
        return self._keys.projection is not None

    @property
    def has_offsets(self) -> bool:
        """Whether key means were subtracted."""
        return self._keys.mean is not None

    def rotate(self, queries: Any, kind: Dtype, sm_scale: float, into: QueryRows) -> Launch:
        """Bring ``[tokens, num_q_heads, head_dim]`` into the space of the stored keys."""
        tokens, num_q_heads = queries.shape[:2]
        count = tokens * num_q_heads
        return Launch(
            "rotate_queries.cu",
            "rotate_queries",
            {**self.macros, "INPUT_DTYPE": DTYPE_NUMBERS[kind]},
            (_row_blocks(count, self.head_dim),),
            (
                queries,
                *map(np.int32, (count, num_q_heads, num_q_heads // self.heads)),
                np.float32(sm_scale),
                self._keys.rotation,
                self._keys.mean,
                self._keys.projection,
                self._qjl_factor,
                *into,
            ),
        )

    def attend(
        self,
        kernel: AttendKernel,
        buffers: ReadBuffers,
        queries: QueryRows,
        units: Units,
        parts: State,
        group: int,
        window_left: int | None,
        soft_cap: float | None,
    ) -> Launch:
        """Attend over pages: one partial state per unit, KV head and column."""
        shape = self._shape(buffers, group, window_left, soft_cap, kernel.int8_values)
        return Launch(
            "attend.cu",
            "attend",
            kernel.macros(),
            (len(units.sequences), self.heads),
            (self._pages, shape, *buffers, *queries, *self._entries, *units, *parts),
        )

    def score(
        self,
        kernel: AttendKernel,
        buffers: ReadBuffers,
        queries: QueryRows,
        units: Units,
        starts: tuple[Any, Any],
        group: int,
        scores: Any,
    ) -> Launch:
        """Write inner products of one query token per sequence; ``starts`` say where."""
        shape = self._shape(buffers, group, None, None)
        return Launch(
            "score.cu",
            "score",
            kernel.macros(),
            (len(units.sequences), self.heads),
            (
                self._pages,
                shape,
                buffers.table,
                buffers.reads,
                *queries,
                self._entries[0],
                *units,
                *starts,
                scores,
            ),
        )

    def attend_window(
        self,
        queries: Any,
        kind: Dtype,
        reads: Any,
        lengths: Any,
        query_starts: Any,
        owners: tuple[Any, Any],
        rows: tuple[Any, Any],
        sm_scale: float,
        window_left: int | None,
        soft_cap: float | None,
        into: State,
    ) -> Launch:
        """Attend exactly over rows ``[owners, heads, 2, rows, head_dim]``: rings, then sinks.

        ``owners`` and ``rows`` are those of rings and of sink records.
        """
        tokens, num_q_heads = queries.shape[:2]
        ring, sinks = rows
        numbers = (reads.shape[1], tokens * num_q_heads, num_q_heads, self.heads)
        return Launch(
            "attend_window.cu",
            "attend_window",
            {**self.macros, "INPUT_DTYPE": DTYPE_NUMBERS[kind]},
            (-(-tokens * num_q_heads // (BLOCK // _WARP)),),
            (
                queries,
                reads,
                lengths,
                query_starts,
                *owners,
                ring,
                np.int32(ring.shape[3]),
                sinks,
                np.int32(sinks.shape[3]),
                *map(np.int32, numbers),
                np.float32(sm_scale),
                np.float32(0.0 if soft_cap is None else soft_cap),
                np.int32(-1 if window_left is None else window_left),
                *into,
            ),
        )

    def merge(
        self,
        parts: State,
        columns: int,
        buffers: ReadBuffers,
        units: Units,
        other: State,
        sink_logits: Any,
        into: State,
    ) -> Launch:
        """Merge all units of a row with another state and a learned sink, and un-rotate once."""
        tokens, num_q_heads = into.lse.shape
        count = tokens * num_q_heads
        numbers = (buffers.reads.shape[1], count, num_q_heads, num_q_heads // self.heads)
        return Launch(
            "merge.cu",
            "merge",
            self.macros,
            (_row_blocks(count, self.head_dim),),
            (
                *parts,
                np.int32(columns),
                buffers.query_starts,
                units.first,
                units.splits,
                *map(np.int32, numbers),
                self._values.inverse_rotation,
                *other,
                sink_logits,
                *into,
            ),
        )

    def _shape(
        self,
        buffers: ReadBuffers,
        group: int,
        window_left: int | None,
        soft_cap: float | None,
        int8_values: bool = False,
    ) -> np.void:
        batch, stride = buffers.table.shape
        return attend_shape(
            self.layout,
            self.layer,
            table_stride=stride,
            batch=batch,
            group=group,
            window_left=window_left,
            soft_cap=soft_cap,
            has_offsets=self.has_offsets,
            int8_values=int8_values,
        )


def _row_blocks(rows: int, head_dim: int) -> int:
    return -(-rows * lanes_of(head_dim) // BLOCK)
