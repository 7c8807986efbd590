"""Reading a cache: attention, scores, dense tensors, and reports. Nothing here changes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends import Backend
from ..backends.host_bounds import PageBounds
from ..backends.host_score import PageStats, Scores
from ..config import CacheConfig
from ..errors import ArgumentError, StepError
from ..paging.arguments import Int64, integer, integers
from ..paging.page_tables import PageTables
from ..paging.step_plan import SequenceState, StepPlan
from .host_tier import HostTier
from .reports import (
    CacheCounters,
    CacheStats,
    MemoryReport,
    cache_counters,
    cache_stats,
    memory_report,
)

Array = npt.NDArray[Any]
SeqIds = int | Sequence[int] | Array


class CacheReads:
    """The reading half of `PagedKVCache`."""

    def __init__(self, config: CacheConfig, backend: Backend, tables: PageTables) -> None:
        self.config = config
        self.backend = backend
        self.tables = tables
        self._step: StepPlan | None = None
        self._stored: set[int] = set()
        self._host = HostTier(config, backend, tables.host)

    def length(self, seq_id: int) -> int:
        """Return the number of tokens of a sequence, evicted ones included."""
        return int(self.tables.lengths(np.array([seq_id]))[0])

    def state(self, seq_id: int) -> SequenceState[int]:
        """Return the window state ``(L, c, r, s)`` of a sequence."""
        return self.tables.state(seq_id)

    def attend(
        self,
        layer: int,
        queries: Array,
        seq_ids: SeqIds,
        q_lens: Sequence[int] | Array | None = None,
        sm_scale: float | None = None,
        keys: Array | None = None,
        values: Array | None = None,
        *,
        soft_cap: float | None = None,
        sink_logits: Array | None = None,
        window_left: int | None = None,
        alibi_slopes: object = None,
    ) -> tuple[Array, Array]:
        """Attend over sequences: sinks and ring exactly, the body on its codes.

        Parameters
        ----------
        layer : int
            The layer; in an open step it must be stored.
        queries : ndarray ``[tokens, num_q_heads, head_dim]``
            Of the last ``q_lens[b]`` tokens of each sequence, in batch order.
        seq_ids : int or sequence of int
            The batch.
        q_lens : sequence of int, optional
            Query tokens per sequence, one each by default; a query reads up to its own position.
        sm_scale : float, optional
            Logit scale, ``1 / sqrt(head_dim)`` by default.
        keys, values : ndarray ``[tokens, num_kv_heads, head_dim]``, optional
            The query tokens' own keys and values, read exactly instead of what is stored.
        soft_cap : float, optional
            Logits become ``soft_cap * tanh(logit / soft_cap)``.
        sink_logits : ndarray ``[num_q_heads]``, optional
            Learned sink logits: they take mass and add nothing to the output.
        window_left : int, optional
            A query at p reads positions ``>= p - window_left`` only (sliding-window layers).
        alibi_slopes : None
            Not supported: anything else is refused.

        Returns
        -------
        out : ndarray ``[tokens, num_q_heads, head_dim]``
        lse : ndarray of float64 ``[tokens, num_q_heads]``
            Of true logits; -inf (and ``out`` 0) where nothing is readable.
        """
        ids = self._readable(layer, seq_ids)
        scale = self.config.head_dim**-0.5 if sm_scale is None else sm_scale
        lens = None if q_lens is None else integers("q_lens", q_lens)
        overlay = self.config.has_overlay(layer)
        reads = self.tables.reads(ids, overlay)
        table = self.tables.block_table(ids)
        return self.backend.attend(
            layer,
            queries,
            table,
            reads,
            scale,
            lens,
            keys,
            values,
            soft_cap=soft_cap,
            sink_logits=sink_logits,
            window_left=window_left,
            alibi_slopes=alibi_slopes,
            window=self._window_of(ids) if overlay else None,
        )

    def score(self, layer: int, queries: Array, seq_ids: SeqIds) -> Scores:
        """Score one query token per sequence against its readable keys.

        Parameters
        ----------
        layer : int
            The layer.
        queries : ndarray ``[batch, num_q_heads, head_dim]``
            One query token per sequence.
        seq_ids : int or sequence of int
            The batch.

        Returns
        -------
        Scores
            True inner products ``q . k``: exact where `attend` is exact, without scale.
        """
        ids = self._readable(layer, seq_ids)
        overlay = self.config.has_overlay(layer)
        reads = self.tables.reads(ids, overlay)
        window = self._window_of(ids) if overlay else None
        return self.backend.score(
            layer, queries, self.tables.block_table(ids), reads, window=window
        )

    def page_stats(self, scores: Scores, sm_scale: float = 1.0) -> PageStats:
        """Reduce `score`'s result to a maximum and a softmax mass per page.

        Parameters
        ----------
        scores : Scores
            What `score` returned.
        sm_scale : float
            Scale of the logits in the mass.
        """
        return self.backend.page_stats(scores, sm_scale)

    def score_bounds(self, layer: int, queries: Array, seq_ids: SeqIds) -> PageBounds:
        """Bound `score`'s result by page, from the key bounds alone: no code is read.

        Parameters
        ----------
        layer : int
            A layer with key bounds (``key_bounds=True`` and TurboQuant keys).
        queries : ndarray ``[batch, num_q_heads, head_dim]``
            One query token per sequence.
        seq_ids : int or sequence of int
            The batch.

        Returns
        -------
        PageBounds
            Of the blocks that lie wholly below the exact window's ring; no entry is below a score
            of its page, the exact ones of sinks included.

        Raises
        ------
        UnsupportedError
            If the layer keeps no bounds.
        """
        ids = self._readable(layer, seq_ids)
        overlay = self.config.has_overlay(layer)
        reads = self.tables.reads(ids, overlay)
        bounds = self.backend.score_bounds(layer, queries, self.tables.block_table(ids), reads)
        if not overlay:
            return bounds
        return self.backend.window(layer).raise_bounds(
            bounds, queries, self.tables.sink_records(ids), reads
        )

    def load(
        self,
        layer: int,
        seq_id: int,
        exact: bool = True,
        start: int = 0,
        stop: int | None = None,
    ) -> tuple[Array, Array, Array]:
        """Return what `attend` would read of a sequence, dense.

        Parameters
        ----------
        layer : int
            The layer.
        seq_id : int
            The sequence.
        exact : bool
            Sinks and ring from the exact window; False decodes every position from its page.
        start, stop : int
            Only positions in ``[start, stop)``; all by default.

        Returns
        -------
        keys, values : ndarray ``[n, num_kv_heads, head_dim]``
        positions : ndarray of int64 ``[n]``
            Ascending; evicted and masked positions are absent.

        Raises
        ------
        ArgumentError
            ``exact=False`` although positions at the end have no codes yet, or a range that is not
            within the sequence.
        """
        ids = self._readable(layer, seq_id)
        state = self.tables.state(seq_id)
        overlay = self.config.has_overlay(layer)
        stop = state.length if stop is None else integer("stop", stop, 0, state.length)
        start = integer("start", start, 0, stop)
        if overlay and not exact and state.coded < stop:
            raise ArgumentError(
                f"positions [{state.coded}, {stop}) are in the exact window only; use exact=True"
            )
        reads = self.tables.reads(ids, overlay and exact)
        positions = np.arange(start, stop)
        kept = (positions < reads.keep[0]) | (positions >= reads.start[0])
        slots = self.tables.slots_of(seq_id, positions)
        resident = kept & (slots >= 0)
        positions, slots = positions[resident], slots[resident]
        body = (positions >= reads.first[0]) & (positions < reads.stop[0])
        keys, values = self.backend.load(layer, slots[body])
        if not (overlay and exact):
            return keys, values, positions
        window = self.backend.window(layer)
        parts = window.read_positions(
            int(self.tables.window_slots(ids)[0]),
            int(self.tables.sink_records(ids)[0]),
            positions[positions < reads.first[0]],
            positions[positions >= reads.stop[0]],
        )
        (sink_keys, sink_values), (ring_keys, ring_values) = parts
        return (
            np.concatenate([sink_keys, keys, ring_keys]),
            np.concatenate([sink_values, values, ring_values]),
            positions,
        )

    def stats(self) -> CacheStats:
        """Count pages, window slots, sequences and tokens."""
        return cache_stats(self.tables)

    def counters(self) -> CacheCounters:
        """Count what happened so far: lookups, blocks published, forgotten and evicted."""
        return cache_counters(self.tables)

    def memory_report(self) -> MemoryReport:
        """Account for every byte held, beside what fp16 and fp32 would take."""
        return memory_report(
            self.config, self.backend.layout, self.tables, self._host, self.backend.codec_bytes
        )

    def check_integrity(self) -> None:
        """Prove the invariants of tables and pools.

        Raises
        ------
        IntegrityError
            Naming the first broken one.
        """
        self.tables.check_integrity()

    @staticmethod
    def _ids(seq_ids: SeqIds) -> Int64:
        if isinstance(seq_ids, int | np.integer):
            seq_ids = np.array([seq_ids])
        return integers("seq_ids", seq_ids)

    def _window_of(self, ids: Array) -> tuple[Array, Array]:
        return self.tables.window_slots(ids), self.tables.sink_records(ids)

    def _check_layer(self, layer: int) -> None:
        integer("layer", layer, 0, self.config.num_layers - 1)

    def _readable(self, layer: int, seq_ids: SeqIds) -> Array:
        self._check_layer(layer)
        ids = self._ids(seq_ids)
        step = self._step
        if step is not None and layer not in self._stored:
            members = np.isin(ids, step.seq_ids[step.num_new > 0])
            if members.any():
                raise StepError(
                    f"sequence {ids[members][0]} is in the open step, whose layer {layer} "
                    f"is not stored yet"
                )
        return ids
