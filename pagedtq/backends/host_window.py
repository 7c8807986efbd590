"""Storage of exact windows and attention over them, in NumPy.

Rings and sink records of one layer are two arrays in ``kv_dtype``; who owns which row is decided
by the control plane.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..config import CacheConfig
from ..paging.table_views import Reads
from .dtypes import STORAGE, Float32, to_storage, widen
from .host_bounds import PageBounds
from .host_score import Scores
from .tokens import TokenBatch

Array = npt.NDArray[Any]

_STREAMS: tuple[Literal["key", "value"], ...] = ("key", "value")

# Elements of one group's keys in the overlay; keeps a group's arrays in cache.
_GROUP_ELEMENTS = 1 << 19


class WindowRows(NamedTuple):
    """Query rows of a batch for exact attention.

    ``queries`` is ``[tokens, num_kv_heads, group, head_dim]``, scaled; ``last`` and ``floor``
    ``[tokens]`` bound what each query token reads.
    """

    queries: Array
    last: Array
    floor: Array


class WindowStore:
    """Rings and sinks of one layer.

    Parameters
    ----------
    config : CacheConfig
        Shape, ``kv_dtype`` and number of slots.
    """

    def __init__(self, config: CacheConfig) -> None:
        self.config = config
        self.rows, self.sinks = config.window_tokens, config.num_sinks
        shape = (config.num_window_slots, config.num_kv_heads, 2)
        dtype = STORAGE[config.kv_dtype]
        self.ring = np.zeros((*shape, self.rows, config.head_dim), dtype)
        self.sink = np.zeros((*shape, self.sinks, config.head_dim), dtype)

    def write(self, batch: TokenBatch, ring_mapping: Array, sink_mapping: Array) -> None:
        """Write tokens to the rows they map to (-1: nowhere)."""
        kv_dtype = self.config.kv_dtype
        for store, mapping in ((self.sink, sink_mapping), (self.ring, ring_mapping)):
            chosen = np.flatnonzero(mapping >= 0)
            if chosen.size:
                slot, row = np.divmod(mapping[chosen], store.shape[3])
                for plane, stream in enumerate(_STREAMS):
                    rows = batch.vectors(stream, chosen)
                    store[slot, :, plane, row] = to_storage(rows, kv_dtype)

    def read(self, ring_rows: Array) -> TokenBatch:
        """Return the tokens of ring rows."""
        slot, row = np.divmod(ring_rows, self.rows)
        kv_dtype = self.config.kv_dtype
        keys, values = self.ring[slot, :, 0, row], self.ring[slot, :, 1, row]
        return TokenBatch(keys, values, kv_dtype, kv_dtype)

    def read_positions(
        self, slot: int, record: int, sinks: Array, ring: Array
    ) -> tuple[tuple[Float32, Float32], tuple[Float32, Float32]]:
        """Return exact ``(keys, values)`` of sink positions and of ring positions.

        Each is ``[n, num_kv_heads, head_dim]``; the owner of no positions may be -1.
        """
        kv_dtype = self.config.kv_dtype
        parts = []
        for store, owner, rows in ((self.sink, record, sinks), (self.ring, slot, ring)):
            size = max(1, store.shape[3])
            picked = store[owner][:, :, rows % size].transpose(1, 2, 0, 3)
            wide = widen(picked, kv_dtype)
            parts.append((wide[0], wide[1]))
        return parts[0], parts[1]

    def add_scores(
        self,
        scores: Scores,
        queries: Array,
        window_slots: Array,
        sink_records: Array,
        reads: Reads,
    ) -> Scores:
        """Put the exact scores of sinks and ring around the scores of the coded body.

        Parameters
        ----------
        scores : Scores
            Of the body.
        queries : ndarray ``[batch, num_q_heads, head_dim]``
            One query token per sequence.
        window_slots, sink_records : ndarray of int32 ``[batch]``
            Where the exact rows lie, -1 for none.
        reads : Reads
            The read ranges.
        """
        heads, dtype = self.config.num_kv_heads, scores.values.dtype
        num_q_heads = len(scores.values)
        values, positions = [], []
        for index in range(len(reads.kv_lens)):
            first, stop, length = (int(f[index]) for f in (reads.first, reads.stop, reads.kv_lens))
            sinks = np.arange(first)
            sinks = sinks[(sinks < reads.keep[index]) | (sinks >= reads.start[index])]
            ring = np.arange(stop, length)
            rows = self.read_positions(
                int(window_slots[index]), int(sink_records[index]), sinks, ring
            )
            query = queries[index].astype(np.float64).reshape(heads, -1, queries.shape[-1])
            exact = [
                np.einsum("hgd,nhd->hgn", query, keys.astype(np.float64)).reshape(
                    num_q_heads, len(keys)
                )
                for keys, _ in rows
            ]
            body, body_positions = scores.of(index)
            values += [exact[0], body, exact[1]]
            positions += [sinks, body_positions, ring]
        lengths = [len(part) for part in positions]
        totals = np.add.reduceat(lengths, range(0, len(lengths), 3)) if lengths else lengths
        indptr = np.cumsum([0, *totals])
        empty = np.zeros((len(scores.values), 0), dtype)
        return Scores(
            np.concatenate([empty, *values], axis=1).astype(dtype, copy=False),
            indptr,
            np.concatenate([np.zeros(0, np.int64), *positions]),
        )

    def raise_bounds(
        self, bounds: PageBounds, queries: Array, sink_records: Array, reads: Reads
    ) -> PageBounds:
        """Raise the bounds of blocks 0 to the exact scores of the sinks they hold.

        Parameters are those of `add_scores`; the bounds of the body are changed in place.
        """
        values = bounds.values
        nothing = Scores(values[:, :0], np.zeros_like(bounds.indptr), bounds.blocks[:0])
        no_ring = np.full(len(reads.kv_lens), -1, np.int32)
        sinks = self.add_scores(
            nothing, queries, no_ring, sink_records, reads._replace(stop=reads.kv_lens)
        )
        for index, begin in enumerate(bounds.indptr[:-1].tolist()):
            exact, _ = sinks.of(index)
            first = begin < bounds.indptr[index + 1] and bounds.blocks[begin] == 0
            if first and exact.shape[1]:
                values[:, begin] = np.maximum(values[:, begin], exact.max(axis=1))
        return bounds

    def take_rows(self, ring: bool, owner: int, rows: Array) -> Array:
        """Return rows of a slot's ring or of a sink record as they lie.

        Returns
        -------
        ndarray ``[num_kv_heads, 2, len(rows), head_dim]``
            In the storage type of ``kv_dtype``; axis 1 is keys, values.
        """
        store = self.ring if ring else self.sink
        taken: Array = store[owner][:, :, rows]
        return taken

    def put_rows(self, ring: bool, owner: int, rows: Array, data: Array) -> None:
        """Write what `take_rows` returned, here or elsewhere."""
        store = self.ring if ring else self.sink
        store[owner][:, :, rows] = data

    def copy_slots(self, src: Array, dst: Array) -> None:
        """Copy whole rings."""
        self.ring[dst] = self.ring[src]

    def copy_records(self, src: Array, dst: Array) -> None:
        """Copy whole sink records."""
        self.sink[dst] = self.sink[src]

    def attend(
        self,
        rows: WindowRows,
        q_lens: Array,
        window_slots: Array,
        sink_records: Array,
        reads: Reads,
        soft_cap: float | None,
        dtype: npt.DTypeLike,
    ) -> tuple[Array, Array]:
        """Attend over sinks and rings.

        Returns
        -------
        out : ndarray ``[tokens, num_kv_heads, group, head_dim]``
        lse : ndarray ``[tokens, num_kv_heads, group]``
        """
        out = np.zeros(rows.queries.shape, dtype)
        lse = np.full(rows.queries.shape[:3], -np.inf)
        ends = np.cumsum(q_lens)
        for begin, end in self._groups(q_lens):
            members = slice(begin, end)
            tokens = slice(int(ends[begin] - q_lens[begin]), int(ends[end - 1]))
            count = end - begin
            keys, values, positions = self._gather(
                window_slots[members], sink_records[members], Reads(*(f[members] for f in reads))
            )
            if positions.shape[1] == 0:
                continue
            queries = rows.queries[tokens]
            per = queries.shape[0] // count
            heads, group, dim = queries.shape[1:]
            stacked = queries.reshape(count, per, heads, group, dim).transpose(0, 2, 1, 3, 4)
            stacked = np.ascontiguousarray(stacked).reshape(count, heads, per * group, dim)
            scores = np.matmul(stacked, keys.astype(np.float64).transpose(0, 1, 3, 2))
            if soft_cap is not None:
                scores = np.tanh(scores / soft_cap) * soft_cap
            last = np.repeat(rows.last[tokens].reshape(count, per), group, axis=1)
            floor = np.repeat(rows.floor[tokens].reshape(count, per), group, axis=1)
            place = positions[:, None, :]
            readable = (place >= 0) & (place <= last[..., None]) & (place >= floor[..., None])
            if not readable.all():
                np.copyto(scores, -np.inf, where=~readable[:, None])
                values = np.where((positions >= 0)[:, None, :, None], values, 0)
            peak = scores.max(axis=-1)
            reference = np.where(np.isneginf(peak), 0, peak)
            weights = np.exp(scores - reference[..., None])
            mass = weights.sum(axis=-1)
            part = np.matmul(weights.astype(dtype), values.astype(dtype, copy=False))
            part /= np.where(mass > 0, mass, 1)[..., None].astype(dtype)
            with np.errstate(divide="ignore"):
                part_lse = np.where(mass > 0, np.log(mass) + reference, -np.inf)
            shape = (count, heads, per, group)
            out[tokens] = part.reshape(*shape, dim).transpose(0, 2, 1, 3, 4).reshape(queries.shape)
            lse[tokens] = part_lse.reshape(shape).transpose(0, 2, 1, 3).reshape(-1, heads, group)
        return out, lse

    def _gather(self, slots: Array, records: Array, reads: Reads) -> tuple[Float32, Float32, Array]:
        """Return keys, values ``[b, heads, n, dim]`` and their positions ``[b, n]`` (-1: none)."""
        ring = _ranges(reads.stop, reads.kv_lens)
        sinks = _ranges(np.zeros_like(reads.first), reads.first)
        kept = (sinks < reads.keep[:, None]) | (sinks >= reads.start[:, None])
        sinks = np.where(kept, sinks, -1)
        heads = np.arange(self.config.num_kv_heads)[:, None, None]
        planes = np.arange(2)[:, None]
        parts = []
        for store, owner, positions, size in (
            (self.sink, records, sinks, self.sinks),
            (self.ring, slots, ring, self.rows),
        ):
            if positions.shape[1]:
                row = (positions % size)[:, None, None, :]
                rows = store[owner[:, None, None, None], heads, planes, row]
                parts.append(widen(rows, self.config.kv_dtype))
        positions = np.concatenate([sinks, ring], axis=1)
        if not parts:
            empty = np.zeros((len(slots), heads.size, 0, self.config.head_dim), np.float32)
            return empty, empty, positions
        both = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=3)
        return both[:, :, 0], both[:, :, 1], positions

    def _groups(self, q_lens: Array) -> list[tuple[int, int]]:
        """Cut the batch into runs of equal query counts, small enough for the cache."""
        row = self.config.num_kv_heads * (self.rows + self.sinks) * self.config.head_dim
        limit = max(1, _GROUP_ELEMENTS // row)
        cuts = np.flatnonzero(np.diff(q_lens)) + 1
        groups = []
        for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(q_lens)]):
            groups += [(at, min(at + limit, end)) for at in range(begin, end, limit)]
        return groups


def _ranges(begin: Array, end: Array) -> Array:
    """Return ``[len(begin), longest]``: the integers of each range, then -1."""
    longest = int(np.maximum(end - begin, 0).max(initial=0))
    values = begin[:, None] + np.arange(longest)
    return np.asarray(np.where(values < end[:, None], values, -1))
