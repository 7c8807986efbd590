"""The NumPy backend: every data-plane operation, on the same page bytes as the CUDA backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..codec.turboquant import TurboQuantCodec
from ..config import CacheConfig, Dtype, TurboQuant
from ..errors import ArgumentError, SlotError, UnsupportedError
from ..paging.layout import PageLayout
from ..paging.table_views import Reads
from .dtypes import Float32, as_float32, check_range, check_shape, f16_towards, round_to
from .host_attend import PageAttention, Span, span_of
from .host_chunk import attend_chunk
from .host_pages import PageBytes
from .host_score import Scores
from .host_window import WindowRows, WindowStore
from .page_reader import Scratch, StreamReader
from .page_writer import PageWriter
from .queries import (
    PreparedQueries,
    QueryTokens,
    check_queries,
    prepare_queries,
    unrotate_outputs,
)
from .states import merge_states
from .workers import Workers

Array = npt.NDArray[Any]

# Threads pay off once each has arrays of some hundred kilobytes; below, the GIL hand-off costs
# more than the second core brings.
_PARALLEL_TOKENS = 2048
_STORE_VECTORS = 4096


class HostBackend:
    """Store, score and attend on pages with NumPy.

    Parameters
    ----------
    config : CacheConfig
        Shape, codecs and pool size.
    key_means : ndarray of float32 ``[num_layers, num_kv_heads, head_dim]`` or None
        Subtracted from keys before coding. Exact for softmax; scores and lse add it back.
    accumulate : {"float32", "float64"}
        Type of all arithmetic after decoding.
    num_threads : int or None
        Threads for large calls; None for one per available CPU.

    Attributes
    ----------
    pool : ndarray of uint8
        All pages (`PageLayout` says where everything lies).
    pages : PageBytes
        Whole-page operations.
    windows : dict of int to WindowStore
        Exact windows of the layers that have them.
    page_owners : ndarray of int ``[num_pages]`` or None
        Reference counts of the pages, when a page pool is attached; `store` and `load` then refuse
        pages without an owner.
    """

    name = "host"

    def __init__(
        self,
        config: CacheConfig,
        key_means: Array | None = None,
        accumulate: Literal["float32", "float64"] = "float32",
        num_threads: int | None = None,
    ) -> None:
        if accumulate not in ("float32", "float64"):
            raise ArgumentError(f"accumulate must be float32 or float64, got {accumulate!r}")
        self.config = config
        self.layout = PageLayout(config)
        self.dtype = np.dtype(accumulate)
        self.key_means = _check_means(key_means, config)
        self.pool: Array = np.zeros(self.layout.pool_bytes, np.uint8)
        self.workers = Workers(num_threads)
        self.scratch = Scratch()
        layers = range(config.num_layers)
        self.codecs = [self._build_codecs(layer) for layer in layers]
        self.writers = [
            PageWriter(self.layout, self.pool, layer, self.codecs[layer]) for layer in layers
        ]
        self.readers = [self._build_reader(layer) for layer in layers]
        self.windows = {layer: WindowStore(config) for layer in layers if config.has_overlay(layer)}
        self.pages = PageBytes(self.layout, self.pool)
        self.page_owners: Array | None = None

    # -- writing -----------------------------------------------------------------------------

    def check(
        self, layer: int, keys: Array, values: Array, dtype: Dtype | None = None
    ) -> tuple[Float32, Float32]:
        """Check tokens and round them to ``kv_dtype``; writes nothing.

        Parameters
        ----------
        layer : int
            The layer.
        keys, values : ndarray ``[n, num_kv_heads, head_dim]``
            float16, bfloat16 or float32.
        dtype : {"f16", "bf16", "f32"}, optional
            Declares the type (needed for bfloat16 bits in uint16).

        Returns
        -------
        keys, values : ndarray of float32
            What would be stored, before coding.

        Raises
        ------
        ArgumentError, ArgumentTypeError, NonFiniteError, OverflowingError, NotUnitNormError
        """
        self._check_layer(layer)
        heads, dim = self.config.num_kv_heads, self.config.head_dim
        check_shape(keys, "keys", (None, heads, dim), "tokens, KV heads, head_dim")
        if getattr(values, "ndim", 0) == 3 and values.shape[2] != dim:
            raise UnsupportedError(
                f"v_head_dim != head_dim is not supported: got {values.shape[2]}, need {dim}"
            )
        check_shape(values, "values", (len(keys), heads, dim), "tokens, KV heads, head_dim")
        checked = []
        for name, array, codec in zip(("keys", "values"), (keys, values), self.codecs[layer]):
            wide = as_float32(array, name, dtype)
            check_range(wide, name, self.config.kv_dtype)
            rounded = round_to(wide, self.config.kv_dtype)
            if codec is not None:
                codec.validate(rounded)
            checked.append(rounded)
        return checked[0], checked[1]

    def store(
        self,
        layer: int,
        keys: Array,
        values: Array,
        slot_mapping: Array,
        dtype: Dtype | None = None,
    ) -> None:
        """Encode tokens into page slots.

        Parameters
        ----------
        layer : int
            The layer.
        keys, values : ndarray ``[n, num_kv_heads, head_dim]``
            float16, bfloat16 or float32.
        slot_mapping : ndarray of int64 ``[n]``
            ``page * page_size + offset`` of each token; negative: skip it.
        dtype : {"f16", "bf16", "f32"}, optional
            Declares the type (needed for bfloat16 bits in uint16).

        Raises
        ------
        SlotError
            A slot on the null page, outside the pool, or twice in the mapping.
        ArgumentError, ArgumentTypeError, NonFiniteError, OverflowingError, NotUnitNormError
            As `check`. Nothing was written.
        """
        checked = self.check(layer, keys, values, dtype)
        slots = self.check_slots(slot_mapping, len(keys))
        self.write(layer, *checked, slots)

    def write(self, layer: int, keys: Float32, values: Float32, slots: Array) -> None:
        """Encode tokens that `check` returned into slots that are known to be good."""
        chosen = np.flatnonzero(slots >= 0)
        if not chosen.size:
            return
        if chosen.size < slots.size:
            keys, values, slots = keys[chosen], values[chosen], slots[chosen]
        writer = self.writers[layer]
        # Slices begin at even tokens, so that pairs of values stay together.
        step = max(2, _STORE_VECTORS // self.config.num_kv_heads // 2 * 2)
        cuts = range(0, len(slots), step)
        work = [(stream, cut) for cut in cuts for stream in ("key", "value")]

        def encode(item: tuple[str, int]) -> None:
            part = slice(item[1], item[1] + step)
            writer.write(item[0], (keys if item[0] == "key" else values)[part], slots[part])

        self.workers.run(encode, work, parallel=len(slots) * self.config.num_kv_heads >= 1024)

    def seal(self, layer: int, ring_rows: Array, slot_mapping: Array) -> None:
        """Encode tokens of the exact window into page slots.

        Parameters
        ----------
        layer : int
            A layer with a window.
        ring_rows : ndarray of int64 ``[n]``
            ``window_slot * window_tokens + row`` of each token.
        slot_mapping : ndarray of int64 ``[n]``
            Where it goes.
        """
        if len(ring_rows):
            self.write(layer, *self.windows[layer].read(ring_rows), slot_mapping)

    def write_bounds(self, layer: int, pages: Array) -> None:
        """Write the key bounds of full pages: per rotated channel, rounded outwards to f16."""
        plane = self.layout.extents[layer].planes.get("key_bounds")
        if plane is None or not len(pages):
            return
        bounds = self.layout.plane_view(self.pool, layer, "key_bounds")
        reader = self.readers[layer].keys
        size = self.config.page_size
        for head in range(self.config.num_kv_heads):
            norms = reader.norms(pages, head)
            assert norms is not None
            tile = reader.tile(pages, head, self.scratch).reshape(len(pages), size, -1)
            tile = tile * norms.reshape(len(pages), size, 1)
            bounds[pages, head, 0] = f16_towards(tile.min(axis=1), -np.inf)
            bounds[pages, head, 1] = f16_towards(tile.max(axis=1), np.inf)

    # -- reading -----------------------------------------------------------------------------

    def attend(
        self,
        layer: int,
        queries: Array,
        block_table: Array,
        reads: Reads,
        sm_scale: float,
        q_lens: Array | None = None,
        keys: Array | None = None,
        values: Array | None = None,
        *,
        soft_cap: float | None = None,
        sink_logits: Array | None = None,
        window_left: int | None = None,
    ) -> tuple[Array, Array]:
        """Attend over the coded (or exact) pages of a batch.

        Parameters
        ----------
        layer : int
            The layer.
        queries : ndarray ``[tokens, num_q_heads, head_dim]``
            The last ``q_lens[b]`` tokens of each sequence, in batch order.
        block_table : ndarray of int32 ``[batch, max_blocks]``
            Page of each block; 0 where evicted.
        reads : Reads
            Which positions are read.
        sm_scale : float
            Scale of the logits, usually ``1 / sqrt(head_dim)``.
        q_lens : ndarray of int ``[batch]``, optional
            Query tokens per sequence; one each by default.
        keys, values : ndarray ``[tokens, num_kv_heads, head_dim]``, optional
            The query tokens' own keys and values: their exact part, read instead of codes.
        soft_cap : float, optional
            Logits become ``soft_cap * tanh(logit / soft_cap)``.
        sink_logits : ndarray ``[num_q_heads]``, optional
            Learned sink: a logit per head that takes mass and adds nothing to ``out``.
        window_left : int, optional
            Sliding-window layers: a query at p reads positions ``>= p - window_left`` only.

        Returns
        -------
        out : ndarray ``[tokens, num_q_heads, head_dim]``
        lse : ndarray ``[tokens, num_q_heads]``
            Natural log of the softmax denominator over true logits; -inf (and ``out`` 0) where
            nothing is readable.
        """
        self._check_layer(layer)
        tokens = self._tokens(queries, reads, q_lens, window_left)
        _check_scale(sm_scale, soft_cap)
        raw = None
        if keys is not None or values is not None:
            if keys is None or values is None:
                raise ArgumentError("keys and values of the chunk come together, got only one")
            raw = self.check(layer, keys, values)
            check_shape(raw[0], "keys", (len(tokens.last), None, None), "one row per query token")
            reads = without_chunk(reads, tokens.q_lens)
        state = self._attend_pages(layer, tokens, block_table, reads, sm_scale, soft_cap)
        if raw is not None:
            chunk = attend_chunk(tokens, *raw, sm_scale, soft_cap)
            state = merge_states((state[0], chunk[0]), (state[1], chunk[1]))
        return finish(*state, sink_logits)

    def attend_window(
        self,
        layer: int,
        queries: Array,
        window_slots: Array,
        sink_records: Array,
        reads: Reads,
        sm_scale: float,
        q_lens: Array | None = None,
        *,
        chunk_apart: bool = False,
        soft_cap: float | None = None,
        window_left: int | None = None,
    ) -> tuple[Array, Array]:
        """Attend exactly over sinks ``[0, first)`` and ring ``[stop, kv_len)`` of a batch.

        Parameters are those of `attend`; besides, ``window_slots`` and ``sink_records`` (int32
        ``[batch]``, -1 for none) say where the rows lie, and ``chunk_apart`` leaves out the query
        tokens' own positions, whose keys and values were given to `attend`.
        """
        self._check_layer(layer)
        tokens = self._tokens(queries, reads, q_lens, window_left)
        _check_scale(sm_scale, soft_cap)
        if chunk_apart:
            reads = without_chunk(reads, tokens.q_lens)
        rows = WindowRows(tokens.values * self.dtype.type(sm_scale), tokens.last, tokens.floor)
        out, lse = self.windows[layer].attend(
            rows, tokens.q_lens, window_slots, sink_records, reads, soft_cap, self.dtype
        )
        return finish(out, lse, None)

    def score(self, layer: int, queries: Array, block_table: Array, reads: Reads) -> Scores:
        """Score one query token per sequence against its readable keys in pages.

        Parameters are those of `attend`.

        Returns
        -------
        Scores
            True inner products ``q . k``: no scale, key means added back.
        """
        self._check_layer(layer)
        tokens = self._tokens(queries, reads, None, None)
        prepared = self._prepare(layer, tokens, 1.0)
        spans = self._spans(block_table, reads)
        positions = [span.positions(self.config.page_size) for span in spans]
        chosen = [span.allows(inside) for span, inside in zip(spans, positions)]
        indptr = np.cumsum([0, *(int(mask.sum()) for mask in chosen)])
        heads, group = tokens.values.shape[1:3]
        values = np.empty((heads, group, int(indptr[-1])), self.dtype)

        def one(unit: tuple[int, int]) -> None:
            index, head = unit
            rows = prepared.rows(tokens, slice(index, index + 1), head)
            flat = self.readers[layer].scores(spans[index], head, rows)
            values[head, :, indptr[index] : indptr[index + 1]] = flat[:, chosen[index]]

        self._run(one, spans)
        flat_positions = [inside[mask] for inside, mask in zip(positions, chosen)]
        return Scores(
            values.reshape(heads * group, -1),
            indptr,
            np.concatenate([np.zeros(0, np.int64), *flat_positions]),
        )

    def load(self, layer: int, slots: Array) -> tuple[Array, Array]:
        """Decode page slots.

        Parameters
        ----------
        layer : int
            The layer.
        slots : ndarray of int64 ``[n]``
            Page slots; repeats are allowed.

        Returns
        -------
        keys, values : ndarray ``[n, num_kv_heads, head_dim]``
            Decoded, in the original space, key means added back.
        """
        self._check_layer(layer)
        slots = self.check_slots(slots, None)
        key_codec, value_codec = self.codecs[layer]
        reader = self.readers[layer]
        heads = range(self.config.num_kv_heads)
        keys, values = (
            np.stack([stream.rows(slots, head, self.scratch) for head in heads], axis=1)
            for stream in (reader.keys, reader.values)
        )
        if key_codec is not None:
            if key_codec.projection is not None:
                sketch = np.stack([reader.keys.qjl_rows(slots, head) for head in heads], axis=1)
                back = key_codec.projection.project_back(sketch)
                keys = keys + back * self.dtype.type(key_codec.projection.factor)
            keys = key_codec.rotation.inverse(keys)
            if self.key_means is not None:
                keys = keys + self.key_means[layer]
        return keys, values if value_codec is None else value_codec.rotation.inverse(values)

    # -- parts -------------------------------------------------------------------------------

    def check_slots(self, slot_mapping: Array, count: int | None) -> Array:
        """Return a slot mapping as int64 after checking it.

        Raises
        ------
        SlotError
            A slot on the null page, outside the pool, without an owner, or (with ``count``, that
            is when writing) twice in the mapping.
        """
        slots = np.asarray(slot_mapping)
        if slots.ndim != 1 or slots.dtype.kind not in "iu":
            raise ArgumentError(f"slots must be integers [n], got {slots.dtype} {slots.shape}")
        if count is not None and len(slots) != count:
            raise ArgumentError(f"slot_mapping must have {count} entries, got {len(slots)}")
        slots = slots.astype(np.int64, copy=False)
        used = slots[slots >= 0] if count is not None else slots
        size, total = self.config.page_size, self.config.num_pages
        bad = used[(used < size) | (used >= size * total)]
        if bad.size:
            raise SlotError(f"slots must be in [{size}, {size * total - 1}], got {bad[0]}")
        if count is not None and np.unique(used).size < used.size:
            values, counts = np.unique(used, return_counts=True)
            raise SlotError(f"slot {values[counts > 1][0]} appears twice in slot_mapping")
        if self.page_owners is not None:
            pages = used // size
            ownerless = pages[self.page_owners[pages] == 0]
            if ownerless.size:
                raise SlotError(f"page {ownerless[0]} has no owner")
        return slots

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.config.num_layers:
            raise ArgumentError(f"layer must be in [0, {self.config.num_layers - 1}], got {layer}")

    def _build_codecs(self, layer: int) -> tuple[TurboQuantCodec | None, TurboQuantCodec | None]:
        config = self.config
        means = None if self.key_means is None else self.key_means[layer]

        def build(stream: str) -> TurboQuantCodec | None:
            codec = config.layer_codecs(layer)[stream == "value"]
            if not isinstance(codec, TurboQuant):
                return None
            return TurboQuantCodec(
                codec,
                config.head_dim,
                config.num_kv_heads,
                seed=config.seed,
                layer=layer,
                stream=stream,
                first_kv_head=config.first_kv_head,
                mean=means if stream == "key" else None,
            )

        return build("key"), build("value")

    def _build_reader(self, layer: int) -> PageAttention:
        streams = []
        for stream, codec, config in zip(
            ("key", "value"), self.codecs[layer], self.config.layer_codecs(layer)
        ):
            table = None if codec is None else codec.book.table
            streams.append(
                StreamReader(self.layout, self.pool, layer, stream, config, table, self.dtype)
            )
        return PageAttention(*streams, self.scratch)

    def _tokens(
        self, queries: Array, reads: Reads, q_lens: Array | None, window_left: int | None
    ) -> QueryTokens:
        heads, dim = self.config.num_kv_heads, self.config.head_dim
        return check_queries(queries, reads, q_lens, heads, dim, window_left, self.dtype)

    def _prepare(self, layer: int, tokens: QueryTokens, scale: float) -> PreparedQueries:
        codec = self.codecs[layer][0]
        mean = None if codec is None or self.key_means is None else self.key_means[layer]
        return prepare_queries(tokens, codec, mean, scale)

    def _spans(self, block_table: Array, reads: Reads) -> list[Span]:
        size = self.config.page_size
        bounds = zip(
            *(field.tolist() for field in (reads.first, reads.stop, reads.keep, reads.start))
        )
        return [span_of(row, size, bound) for row, bound in zip(block_table, bounds)]

    def _run(self, work: Callable[[tuple[int, int]], None], spans: list[Span]) -> None:
        """Run ``work((sequence, head))`` for all, on threads where the arrays are large."""
        units = [(b, h) for b in range(len(spans)) for h in range(self.config.num_kv_heads)]
        pages = sum(len(span.pages) for span in spans)
        long = pages * self.config.page_size >= _PARALLEL_TOKENS * len(spans)
        self.workers.run(work, units, parallel=long)

    def _attend_pages(
        self,
        layer: int,
        tokens: QueryTokens,
        block_table: Array,
        reads: Reads,
        sm_scale: float,
        soft_cap: float | None,
    ) -> tuple[Array, Array]:
        prepared = self._prepare(layer, tokens, sm_scale)
        spans = self._spans(block_table, reads)
        ends = np.cumsum(tokens.q_lens)
        out = np.zeros_like(tokens.values)
        lse = np.full(out.shape[:3], -np.inf, self.dtype)

        def one(unit: tuple[int, int]) -> None:
            index, head = unit
            part = slice(int(ends[index] - tokens.q_lens[index]), int(ends[index]))
            span = spans[index]
            if not len(span.pages) or part.start == part.stop:
                return
            rows = prepared.rows(tokens, part, head)
            total, mass = self.readers[layer].attend(span, head, rows, soft_cap)
            out[part, head] = total.reshape(out[part, head].shape)
            lse[part, head] = mass.reshape(lse[part, head].shape)

        self._run(one, spans)
        return unrotate_outputs(self.codecs[layer][1], out), lse


def without_chunk(reads: Reads, q_lens: Array) -> Reads:
    """Leave the query tokens' own positions out of the read ranges."""
    ends = reads.kv_lens - q_lens
    stop, first = np.minimum(reads.stop, ends), np.minimum(reads.first, ends)
    return reads._replace(kv_lens=ends, stop=stop, first=first)


def finish(out: Array, lse: Array, sink_logits: Array | None) -> tuple[Array, Array]:
    """Merge KV head and group axes, and the learned sink if there is one.

    A sink is a part of the keys with logit ``sink_logits`` and value 0.
    """
    tokens, heads, group, dim = out.shape
    out, lse = out.reshape(tokens, heads * group, dim), lse.reshape(tokens, heads * group)
    if sink_logits is None:
        return out, lse
    check_shape(sink_logits, "sink_logits", (heads * group,), "one per query head")
    sink = np.broadcast_to(np.asarray(sink_logits, lse.dtype), lse.shape)
    return merge_states((out, np.zeros_like(out)), (lse, sink))


def _check_scale(sm_scale: float, soft_cap: float | None) -> None:
    if not np.isfinite(sm_scale):
        raise ArgumentError(f"sm_scale must be finite, got {sm_scale}")
    if soft_cap is not None and not (np.isfinite(soft_cap) and soft_cap > 0):
        raise ArgumentError(f"soft_cap must be positive and finite, got {soft_cap}")


def _check_means(key_means: Array | None, config: CacheConfig) -> Float32 | None:
    if key_means is None:
        return None
    shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    check_shape(key_means, "key_means", shape, "layers, KV heads, head_dim")
    means = as_float32(key_means, "key_means").copy()
    check_range(means, "key_means", "f32")
    means.setflags(write=False)
    return means
