"""One layer of the host backend: its codecs, its pages' readers and writers, its exact window."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..codec import TurboQuantCodec
from ..config import Dtype, Polar, TurboQuant
from ..errors import UnsupportedError
from ..paging.layout import PageLayout
from ..paging.table_views import Reads
from .dtypes import Float32
from .host_attend import PageAttention, Span, span_of
from .host_bounds import KeyBounds, PageBounds
from .host_chunk import attend_chunk
from .host_norms import NormPlanes
from .host_score import Scores
from .host_window import WindowRows, WindowStore
from .page_reader import StreamReader
from .page_writer import PageWriter
from .polar_reader import PolarReader
from .queries import PreparedQueries, QueryTokens, prepare_queries, unrotate_outputs, without_chunk
from .states import merge_states
from .tokens import TokenBatch, check_tokens, layer_codecs
from .workers import Workers

Array = npt.NDArray[Any]
Stream = Literal["key", "value"]

_STREAMS: tuple[Stream, Stream] = ("key", "value")
# Threads pay off once each has arrays of some hundred kilobytes; below, handing the GIL over costs
# more than the second core brings.
_PARALLEL_TOKENS = 2048
_PIECE_VECTORS = 4096


class HostLayer:
    """Everything the host backend does to one layer; arguments are checked by the caller.

    Parameters
    ----------
    layout : PageLayout
        Where everything lies.
    pool : ndarray of uint8
        The pool.
    layer : int
        Which layer.
    mean : ndarray of float32 ``[num_kv_heads, head_dim]`` or None
        Key mean.
    dtype : dtype
        Type of weighted sums and outputs.
    workers : Workers
        Threads.
    """

    def __init__(
        self,
        layout: PageLayout,
        pool: Array,
        layer: int,
        mean: Float32 | None,
        dtype: np.dtype[Any],
        workers: Workers,
    ) -> None:
        config = layout.config
        self.config, self.index = config, layer
        self.dtype, self.workers = dtype, workers
        self.codecs = layer_codecs(config, layer, mean)
        self.mean = mean if self.codecs[0] is not None else None
        self.writer = PageWriter(layout, pool, layer, self.codecs)
        self.attention = PageAttention(
            *(self._reader(layout, pool, layer, stream) for stream in _STREAMS)
        )
        self.window = WindowStore(config) if config.has_overlay(layer) else None
        self.norms = NormPlanes(layout, pool, layer)
        self.bounds: KeyBounds | None = None
        if "key_bounds" in layout.extents[layer].planes:
            plane = layout.plane_view(pool, layer, "key_bounds")
            self.bounds = KeyBounds(plane, self.attention.keys)

    def check(self, keys: Array, values: Array, dtype: Dtype | None) -> TokenBatch:
        """Check tokens; see `check_tokens`."""
        return check_tokens(self.config, self.index, self.codecs, keys, values, dtype)

    def write(self, batch: TokenBatch, slots: Array) -> None:
        """Encode tokens into slots; negative slots are skipped."""
        chosen = np.flatnonzero(slots >= 0)
        whole = chosen.size == slots.size
        # Pieces begin at even tokens, so that the pairs of values stay together.
        step = max(2, _PIECE_VECTORS // self.config.num_kv_heads // 2 * 2)

        def encode(item: tuple[Stream, int]) -> None:
            stream, begin = item
            part = slice(begin, begin + step) if whole else chosen[begin : begin + step]
            self.writer.write(stream, batch.vectors(stream, part), slots[part])

        work = [(stream, at) for at in range(0, chosen.size, step) for stream in _STREAMS]
        self.workers.run(encode, work, parallel=len(work) > 2)

    def write_bounds(self, pages: Array) -> None:
        """Write the key bounds of full pages, where the configuration has them."""
        if self.bounds is not None and len(pages):
            self.bounds.write(pages)

    def attend(
        self,
        tokens: QueryTokens,
        block_table: Array,
        reads: Reads,
        sm_scale: float,
        soft_cap: float | None,
        chunk: TokenBatch | None = None,
        window: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array]:
        """Attend over pages, the query tokens' own keys and values, and the exact window.

        Returns
        -------
        out : ndarray ``[tokens, num_kv_heads, group, head_dim]``
        lse : ndarray of float64 ``[tokens, num_kv_heads, group]``
        """
        if chunk is not None:
            reads = without_chunk(reads, tokens.q_lens)
        prepared, spans = self._prepare(tokens, sm_scale), self._spans(block_table, reads)
        state = self._attend_pages(tokens, prepared, spans, soft_cap)
        if chunk is not None:
            own = attend_chunk(tokens, chunk, sm_scale, soft_cap, self.dtype)
            state = merge_states((state[0], own[0]), (state[1], own[1]))
        if window is not None:
            exact = self.attend_window(tokens, reads, sm_scale, soft_cap, window)
            state = merge_states((state[0], exact[0]), (state[1], exact[1]))
        return state

    def attend_window(
        self,
        tokens: QueryTokens,
        reads: Reads,
        sm_scale: float,
        soft_cap: float | None,
        owners: tuple[Array, Array],
    ) -> tuple[Array, Array]:
        """Attend over rings and sinks; ``owners`` are window slots and sink records."""
        assert self.window is not None
        rows = WindowRows(tokens.values * sm_scale, tokens.last, tokens.floor)
        return self.window.attend(rows, tokens.q_lens, *owners, reads, soft_cap, self.dtype)

    def _attend_pages(
        self,
        tokens: QueryTokens,
        prepared: PreparedQueries,
        spans: list[Span],
        soft_cap: float | None,
    ) -> tuple[Array, Array]:
        ends = np.cumsum(tokens.q_lens)
        out = np.zeros(tokens.values.shape, self.dtype)
        lse = np.full(out.shape[:3], -np.inf)

        def one(unit: tuple[int, int]) -> None:
            index, head = unit
            part = slice(int(ends[index] - tokens.q_lens[index]), int(ends[index]))
            span = spans[index]
            if not len(span.pages) or part.start == part.stop:
                return
            rows = prepared.rows(tokens, part, head)
            total, mass = self.attention.attend(span, head, rows, soft_cap)
            out[part, head] = total.reshape(out[part, head].shape)
            lse[part, head] = mass.reshape(lse[part, head].shape)

        self._run(one, spans)
        return unrotate_outputs(self.codecs[1], out), lse

    def score(self, tokens: QueryTokens, block_table: Array, reads: Reads) -> Scores:
        """Score one query token per sequence against its readable keys in pages."""
        prepared = self._prepare(tokens, 1.0)
        spans = self._spans(block_table, reads)
        positions = [span.positions(self.config.page_size) for span in spans]
        chosen = [span.allows(inside) for span, inside in zip(spans, positions)]
        indptr = np.cumsum([0, *(int(mask.sum()) for mask in chosen)])
        heads, group = tokens.values.shape[1:3]
        values = np.empty((heads, group, int(indptr[-1])), self.dtype)

        def one(unit: tuple[int, int]) -> None:
            index, head = unit
            rows = prepared.rows(tokens, slice(index, index + 1), head)
            flat = self.attention.scores(spans[index], head, rows)
            values[head, :, indptr[index] : indptr[index + 1]] = flat[:, chosen[index]]

        self._run(one, spans)
        flat_positions = [inside[mask] for inside, mask in zip(positions, chosen)]
        return Scores(
            values.reshape(heads * group, -1),
            indptr,
            np.concatenate([np.zeros(0, np.int64), *flat_positions]),
        )

    def score_bounds(self, tokens: QueryTokens, block_table: Array, reads: Reads) -> PageBounds:
        """Bound the scores of one query token per sequence by whole pages of coded keys."""
        bounds = self.bounds
        if bounds is None:
            keys = self.config.layer_codecs(self.index)[0]
            what = "key_bounds=True" if isinstance(keys, TurboQuant) else "TurboQuant keys"
            raise UnsupportedError(
                f"layer {self.index} ({keys} keys) keeps no bounds; it needs {what}"
            )
        prepared = self._prepare(tokens, 1.0)
        width = np.arange(block_table.shape[1])
        sealed = (width < (reads.stop // self.config.page_size)[:, None]) & (block_table > 0)
        owner, blocks = np.nonzero(sealed)
        indptr = np.searchsorted(owner, np.arange(len(sealed) + 1))
        heads, group = tokens.values.shape[1:3]
        # Rounding to nearest is monotone: what bounds a score bounds it in the scores' type too.
        values = np.empty((heads, group, len(blocks)), self.dtype)
        for index, (begin, end) in enumerate(itertools.pairwise(indptr.tolist())):
            pages = block_table[index, blocks[begin:end]]
            for head in range(heads):
                rows = prepared.rows(tokens, slice(index, index + 1), head)
                values[head, :, begin:end] = bounds.scores(pages, head, rows)
        return PageBounds(values.reshape(heads * group, -1), indptr, blocks)

    def norm_ratios(self, pages: Array) -> Array:
        """Compare the norms of values and keys in full pages: float64 ``[n, num_kv_heads]``."""
        if not self.norms.complete:
            keys, values = self.config.layer_codecs(self.index)
            raise UnsupportedError(
                f"layer {self.index} ({keys} keys, {values} values) keeps no norms apart; "
                f"both streams must be coded"
            )
        return self.norms.ratios(pages)

    def load(self, slots: Array) -> tuple[Array, Array]:
        """Decode page slots to ``[n, num_kv_heads, head_dim]``, in the original space."""
        heads = range(self.config.num_kv_heads)
        key_reader = self.attention.keys
        keys, values = (
            np.stack([reader.rows(slots, head) for head in heads], axis=1)
            for reader in (key_reader, self.attention.values)
        )
        key_codec, value_codec = self.codecs
        if key_codec is not None:
            if key_codec.projection is not None:
                sketch = np.stack([key_reader.qjl_rows(slots, head) for head in heads], axis=1)
                back = key_codec.projection.project_back(sketch)
                keys += back * key_codec.projection.factor
            keys = key_codec.rotation.inverse(keys, self.mean)
        keys = keys.astype(self.dtype, copy=False)
        return keys, values if value_codec is None else value_codec.rotation.inverse(values)

    def _reader(self, layout: PageLayout, pool: Array, layer: int, stream: Stream) -> StreamReader:
        form = self.config.layer_codecs(layer)[stream == "value"]
        codec = self.codecs[stream == "value"]
        # Scores are float64 whatever the sums are: see `HostBackend`.
        dtype = np.dtype(np.float64) if stream == "key" else self.dtype
        if isinstance(form, Polar):
            return PolarReader(layout, pool, layer, stream, form, dtype)
        table = codec.book.table if isinstance(codec, TurboQuantCodec) else None
        return StreamReader(layout, pool, layer, stream, form, table, dtype)

    def _prepare(self, tokens: QueryTokens, scale: float) -> PreparedQueries:
        return prepare_queries(tokens, self.codecs[0], self.mean, scale)

    def _spans(self, block_table: Array, reads: Reads) -> list[Span]:
        fields = (reads.first, reads.stop, reads.keep, reads.start)
        bounds = zip(*(field.tolist() for field in fields))
        size = self.config.page_size
        return [span_of(row, size, bound) for row, bound in zip(block_table, bounds)]

    def _run(self, work: Callable[[tuple[int, int]], None], spans: list[Span]) -> None:
        """Run ``work((sequence, head))`` for all, on threads where the arrays are large."""
        units = [(b, h) for b in range(len(spans)) for h in range(self.config.num_kv_heads)]
        tokens = sum(len(span.pages) for span in spans) * self.config.page_size
        self.workers.run(work, units, parallel=tokens >= _PARALLEL_TOKENS * len(spans))
