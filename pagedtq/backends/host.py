"""The NumPy backend: every data-plane operation, on the same page bytes as the CUDA backend."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..codec.constants import constant_bytes
from ..config import CacheConfig, Dtype
from ..errors import ArgumentError, UnsupportedError
from ..paging.arguments import integer, integers
from ..paging.table_views import Reads
from .dtypes import check_shape
from .host_bounds import PageBounds
from .host_layer import HostLayer
from .host_pages import PageBytes
from .host_score import PageStats, Scores, page_stats
from .host_window import WindowStore
from .paged_backend import PagedBackend
from .queries import QueryTokens, check_queries, check_scale, without_chunk
from .read_checks import check_pages, check_ranges, check_table, checked_owners
from .states import add_sink
from .tokens import TokenBatch, check_ring_rows, check_slots
from .workers import Workers

Array = npt.NDArray[Any]


class HostBackend(PagedBackend):
    """Store, score and attend on pages with NumPy.

    Parameters
    ----------
    config : CacheConfig
        Shape, codecs and pool size.
    key_means : ndarray of float32 ``[num_layers, num_kv_heads, head_dim]`` or None
        Subtracted from keys before coding. Exact for softmax; scores and lse add it back.
    accumulate : {"float32", "float64"}
        Type of weighted sums and outputs. Scores and softmax denominators are float64 always: the
        largest logits decide the result, and float32 rounds them by too much.
    num_threads : int or None
        Threads for large calls; None for one per available CPU.

    Attributes
    ----------
    pool : ndarray of uint8
        All pages (`PageLayout` says where everything lies).
    pages : PageBytes
        Whole pages of the pool; `copy_pages` and its like are its operations.
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
        super().__init__(config, key_means)
        self.dtype = np.dtype(accumulate)
        self.pool: Array = np.zeros(self.layout.pool_bytes, np.uint8)
        self.workers = Workers(num_threads)
        self.layers = [
            HostLayer(self.layout, self.pool, layer, mean, self.dtype, self.workers)
            for layer, mean in enumerate(self._layer_means())
        ]
        self.pages: PageBytes = PageBytes(self.layout, self.pool)

    @property
    def codec_bytes(self) -> int:
        """Bytes of what codecs keep beside the pages; what layers have in common counts once."""
        return constant_bytes([layer.codecs for layer in self.layers])

    # -- writing -----------------------------------------------------------------------------

    def check(
        self, layer: int, keys: Array, values: Array, dtype: Dtype | None = None
    ) -> TokenBatch:
        """Check tokens of one layer for `write`; writes nothing (see `check_tokens`)."""
        return self._layer(layer).check(keys, values, dtype)

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
        batch = self.check(layer, keys, values, dtype)
        slots = check_slots(self.config, self.page_owners, slot_mapping, len(batch))
        self.write(layer, batch, slots)

    def write(self, layer: int, batch: TokenBatch, slots: Array) -> None:
        """Encode checked tokens into slots that are known to be good; negative ones are skipped."""
        self.layers[layer].write(batch, slots)

    def seal(self, layer: int, ring_rows: Array, slot_mapping: Array) -> None:
        """Encode tokens of the exact window into page slots.

        Parameters
        ----------
        layer : int
            A layer with a window.
        ring_rows : ndarray of int64 ``[n]``
            ``window_slot * window_tokens + row`` of each token.
        slot_mapping : ndarray of int64 ``[n]``
            Where it goes; negative: skip it, whatever its row.

        Raises
        ------
        SlotError
            A slot on the null page, outside the pool, or twice in the mapping.
        ArgumentError, ArgumentTypeError
            A row outside the rings; wrong shape, type or number. Nothing was written.
        """
        window = self.window(layer)
        rows = integers("ring_rows", ring_rows)
        slots = check_slots(self.config, self.page_owners, slot_mapping, len(rows))
        check_ring_rows(self.config, rows, slots)
        if rows.size:
            # What goes nowhere may name any row.
            self.write(layer, window.read(np.where(slots < 0, 0, rows)), slots)

    def write_bounds(self, layer: int, pages: Array) -> None:
        """Write the key bounds of full pages, where the configuration has them."""
        self.pages.check(pages)
        self._layer(layer).write_bounds(pages)

    def window(self, layer: int) -> WindowStore:
        """Return the exact window of a layer that has one."""
        window = self._layer(layer).window
        if window is None:
            raise ArgumentError(f"layer {layer} has no exact window")
        return window

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
        alibi_slopes: object = None,
        window: tuple[Array, Array] | None = None,
    ) -> tuple[Array, Array]:
        """Attend over the coded (or exact) pages of a batch, and its exact windows where given.

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
        alibi_slopes : None
            Not supported: anything else is refused.
        window : tuple of ndarray, optional
            ``window_slots, sink_records`` of `attend_window`, whose state is merged in.

        Returns
        -------
        out : ndarray ``[tokens, num_q_heads, head_dim]``
        lse : ndarray of float64 ``[tokens, num_q_heads]``
            Natural log of the softmax denominator over true logits; -inf (and ``out`` 0) where
            nothing is readable.
        """
        if alibi_slopes is not None:
            raise UnsupportedError("ALiBi is not supported: alibi_slopes must be None")
        one = self._layer(layer)
        check_table(block_table, reads)
        tokens = self._tokens(queries, reads, q_lens, window_left)
        check_scale(sm_scale, soft_cap)
        chunk = None
        if keys is not None or values is not None:
            if keys is None or values is None:
                raise ArgumentError("keys and values of the chunk come together, got only one")
            check_shape(keys, "keys", (len(tokens.last), None, None), "one row per query token")
            chunk = one.check(keys, values, None)
        check_pages(block_table, reads, self.config)
        if window is not None:
            self.window(layer)  # refuses a layer without one
            window = checked_owners(window, reads, self.config)
        state = one.attend(tokens, block_table, reads, sm_scale, soft_cap, chunk, window)
        return add_sink(*_by_query_head(*state), sink_logits)

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
        self.window(layer)  # refuses a layer without one
        check_ranges(reads)
        tokens = self._tokens(queries, reads, q_lens, window_left)
        check_scale(sm_scale, soft_cap)
        owners = checked_owners((window_slots, sink_records), reads, self.config)
        if chunk_apart:
            reads = without_chunk(reads, tokens.q_lens)
        state = self._layer(layer).attend_window(tokens, reads, sm_scale, soft_cap, owners)
        return _by_query_head(*state)

    def score(
        self,
        layer: int,
        queries: Array,
        block_table: Array,
        reads: Reads,
        *,
        window: tuple[Array, Array] | None = None,
    ) -> Scores:
        """Score one query token per sequence against its readable keys.

        Parameters are those of `attend`; without ``window`` only keys in pages are scored.

        Returns
        -------
        Scores
            True inner products ``q . k``: no scale, key means added back.
        """
        one = self._layer(layer)
        check_table(block_table, reads)
        tokens = self._tokens(queries, reads, None, None)
        check_pages(block_table, reads, self.config)
        if window is None:
            return one.score(tokens, block_table, reads)
        store = self.window(layer)
        owners = checked_owners(window, reads, self.config)
        return store.add_scores(one.score(tokens, block_table, reads), queries, *owners, reads)

    def page_stats(self, scores: Scores, sm_scale: float = 1.0) -> PageStats:
        """Reduce `score`'s result to a maximum and a softmax mass per page; see `page_stats`."""
        return page_stats(scores, self.config.page_size, sm_scale)

    def score_bounds(
        self, layer: int, queries: Array, block_table: Array, reads: Reads
    ) -> PageBounds:
        """Bound the scores of one query token per sequence by page, without reading codes.

        Only pages all of whose positions are in codes have bounds: those below ``reads.stop``.
        Parameters are those of `attend`.

        Returns
        -------
        PageBounds
            Not below any of the scores that `score` computes of the same pages.

        Raises
        ------
        UnsupportedError
            If the layer keeps no bounds: ``key_bounds`` is off, or its keys are exact or polar.
        """
        one = self._layer(layer)
        check_table(block_table, reads)
        tokens = self._tokens(queries, reads, None, None)
        check_pages(block_table, reads, self.config)
        return one.score_bounds(tokens, block_table, reads)

    def norm_ratios(self, layer: int, pages: Array) -> Array:
        """Return the mean value-by-key norm ratio of full pages, from the norm planes alone.

        Parameters
        ----------
        layer : int
            The layer.
        pages : ndarray of int ``[n]``
            Page ids.

        Returns
        -------
        ndarray of float64 ``[n, num_kv_heads]``
            Of centred keys; arXiv 2509.04377, section 3, with pages for blocks.

        Raises
        ------
        UnsupportedError
            If a stream of the layer is exact: its norms are not kept apart.
        """
        one = self._layer(layer)
        self.pages.check(pages)
        return one.norm_ratios(pages)

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
        one = self._layer(layer)
        return one.load(check_slots(self.config, self.page_owners, slots, None))

    # -- memory ------------------------------------------------------------------------------

    def host_memory(self, shape: tuple[int, ...]) -> Array:
        """Allocate bytes for the host tier, not cleared.

        A backend with a device returns memory that the device copies from and to by itself.
        """
        return np.empty(shape, np.uint8)

    def to_host(self, array: Array) -> Array:
        """Return a result of this backend as a NumPy array: here it is one already."""
        return array

    @property
    def description(self) -> str:
        """What computes, for people."""
        return self.name

    # -- parts -------------------------------------------------------------------------------

    def _layer(self, layer: int) -> HostLayer:
        return self.layers[integer("layer", layer, 0, self.config.num_layers - 1)]

    def _tokens(
        self, queries: Array, reads: Reads, q_lens: Array | None, window_left: int | None
    ) -> QueryTokens:
        heads, dim = self.config.num_kv_heads, self.config.head_dim
        return check_queries(queries, reads, q_lens, heads, dim, window_left)


def _by_query_head(out: Array, lse: Array) -> tuple[Array, Array]:
    """Merge the KV head and group axes."""
    tokens, heads, group, dim = out.shape
    return out.reshape(tokens, heads * group, dim), lse.reshape(tokens, heads * group)
