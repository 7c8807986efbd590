"""The CUDA backend: every data-plane operation by kernels, on the same page bytes as the host."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..codec.constants import constant_bytes
from ..config import CacheConfig, Dtype
from ..errors import ArgumentError, UnsupportedError
from ..paging.arguments import integer
from ..paging.table_views import Reads
from .attend_buffers import State
from .attend_kernel import refuse_cap
from .cuda_exact import WindowSpan, attend_window
from .cuda_kept_plans import KeptPlans
from .cuda_layer import CudaLayer, refuse_unsupported
from .cuda_operands import DeviceTokens, Operands
from .cuda_pages import CudaPages, SwappedPages
from .cuda_plan import AttendPlan
from .cuda_score import page_stats, score
from .cuda_window import CudaWindow
from .device import Device, DeviceArray, Event
from .dtypes import STORAGE
from .host_bounds import PageBounds
from .host_score import PageStats, Scores
from .paged_backend import PagedBackend
from .queries import check_query_shapes, check_scale, without_chunk
from .read_checks import check_ranges, check_table, checked_owners, window_owners

Array = npt.NDArray[Any]

# What ranks pages on a device, for refusals of what does not.
_RANKINGS = "the CUDA backend supports score, page_stats and attend: use them, or backend='host'"


class CudaBackend(PagedBackend):
    """Store, score and attend on pages with CUDA kernels.

    Operations, argument order and refusals are those of `HostBackend`. Arguments may be NumPy
    arrays, which are checked in full and uploaded, or arrays on the device: CuPy's, or anything
    with ``__dlpack__`` such as PyTorch's, which are read in place. Results are CuPy arrays
    (float32, ``lse`` included), which export DLPack.

    Parameters
    ----------
    config : CacheConfig
        Shape, codecs and pool size.
    key_means : ndarray of float32 ``[num_layers, num_kv_heads, head_dim]`` or None
        As `HostBackend`.
    device : Device, optional
        Where to run; CuPy's current device by default.
    validate : bool
        Check the content of device arrays too (NaN, overflow, slots): every call then waits for
        the device. Host arrays are always checked.
    split_tokens : int, optional
        Cut sequences into parts of so many tokens whatever the batch, so that a sequence gets the
        same result to the bit alone and in any batch. By default parts fill the device.
    int8_values : bool, optional
        Multiply values as bytes: True wherever they are coded in 2 to 4 bits and the device and the
        head dim allow it, False nowhere; by default 2-bit values beside 2-bit keys,
        from sm_90 on.

    Attributes
    ----------
    pool : array of uint8
        All pages, on the device (`PageLayout` says where everything lies).
    pages : CudaPages
        Whole pages of the pool.
    page_owners : ndarray of int ``[num_pages]`` or None
        As `HostBackend`: slots in host arrays are checked against it.

    Raises
    ------
    BackendUnavailable
        Without CuPy or a device.
    UnsupportedError
        For a configuration that no kernel reads; the message lists what is supported.

    Notes
    -----
    Work goes to the current stream, and nothing waits for it but results that are asked for on the
    host. A backend may be used on one stream at a time; `plan` gives buffers for more.
    """

    name = "cuda"

    def __init__(
        self,
        config: CacheConfig,
        key_means: Array | None = None,
        *,
        device: Device | None = None,
        validate: bool = False,
        split_tokens: int | None = None,
        int8_values: bool | None = None,
    ) -> None:
        refuse_unsupported(config)
        if split_tokens is not None:
            integer("split_tokens", split_tokens, config.page_size)
        if device is None:
            from .cupy_device import CupyDevice

            device = CupyDevice()
        super().__init__(config, key_means)
        self.device, self.split_tokens, self.int8_values = device, split_tokens, int8_values
        self.operands = Operands(device, config, validate)
        self.pool: DeviceArray = device.zeros((self.layout.pool_bytes,), np.uint8)
        self.layers = [
            CudaLayer(self.layout, self.pool, layer, mean, self.operands)
            for layer, mean in enumerate(self._layer_means())
        ]
        self.pages: CudaPages = CudaPages(self.layout, self.pool, self.operands)
        self._plans = KeptPlans()

    @property
    def description(self) -> str:
        """What computes, for people."""
        return f"cuda on {self.device.name}"

    @property
    def codec_bytes(self) -> int:
        """Bytes of what codecs keep beside the pages, on the host and on the device."""
        on_host = constant_bytes([layer.codecs for layer in self.layers])
        return on_host + sum(layer.table_bytes for layer in self.layers)

    @property
    def validate(self) -> bool:
        """Whether the content of device arrays is checked."""
        return self.operands.validate

    # -- writing -----------------------------------------------------------------------------

    def check(self, layer: int, keys: Any, values: Any, dtype: Dtype | None = None) -> DeviceTokens:
        """Check tokens of one layer for `write`; writes nothing."""
        return self.operands.tokens(layer, self.layer(layer).codecs, keys, values, dtype)

    def store(
        self, layer: int, keys: Any, values: Any, slot_mapping: Any, dtype: Dtype | None = None
    ) -> None:
        """Encode tokens into page slots; see `HostBackend.store`.

        A mapping on the device (``int64``) is trusted: negative slots are skipped, others must be
        distinct and inside the pool.
        """
        batch = self.check(layer, keys, values, dtype)
        self.write(layer, batch, self.operands.slots(slot_mapping, self.page_owners, len(batch)))

    def write(self, layer: int, batch: DeviceTokens, slots: Any) -> None:
        """Encode checked tokens into slots that are known to be good; negative ones are skipped."""
        if len(batch):
            mapping = self.operands.index(slots)
            launch = self.layers[layer].tokens.store(*batch.arrays, batch.kind, mapping)
            self.device.launch(launch)

    def seal(self, layer: int, ring_rows: Any, slot_mapping: Any) -> None:
        """Encode tokens of the exact window into page slots; see `HostBackend.seal`.

        Rows and mappings on the device are trusted as those of `store` are: a negative slot skips
        its row.
        """
        ring = self.window(layer).ring
        rows, slots = self.operands.sealed(ring_rows, slot_mapping, self.page_owners)
        if len(rows):
            index, tokens = self.operands.index, self.layers[layer].tokens
            self.device.launch(tokens.seal(ring, index(rows), index(slots)))

    def write_bounds(self, layer: int, pages: Any) -> None:
        """Write the key bounds of full pages, where the configuration has them."""
        one = self.layer(layer)
        if self.device.adopt(pages, "pages") is None:
            self.pages.check(pages)
        if one.has_bounds and len(pages):
            self.device.launch(one.tokens.write_bounds(self.operands.index(pages)))

    def window(self, layer: int) -> CudaWindow:
        """Return the exact window of a layer that has one."""
        window = self.layer(layer).window
        if window is None:
            raise ArgumentError(f"layer {layer} has no exact window")
        return window

    # -- reading -----------------------------------------------------------------------------

    def plan(
        self, batch: int, max_blocks: int, tokens: int | None = None, chunk_tokens: int = 0
    ) -> AttendPlan:
        """Allocate what attention over a batch of a given shape needs.

        Parameters
        ----------
        batch : int
            Sequences.
        max_blocks : int
            Blocks of the longest sequence that will come.
        tokens : int, optional
            Query tokens of all sequences; one each by default.
        chunk_tokens : int
            Most query tokens of one sequence whose own keys and values are passed along.
        """
        integer("batch", batch, 1)
        integer("max_blocks", max_blocks, 1)
        total = batch if tokens is None else integer("tokens", tokens, 0)
        return AttendPlan(self, batch, total, max_blocks, integer("chunk_tokens", chunk_tokens, 0))

    def attend(
        self,
        layer: int,
        queries: Any,
        block_table: Array,
        reads: Reads,
        sm_scale: float,
        q_lens: Array | None = None,
        keys: Any = None,
        values: Any = None,
        *,
        soft_cap: float | None = None,
        sink_logits: Any = None,
        window_left: int | None = None,
        alibi_slopes: object = None,
        window: tuple[Array, Array] | None = None,
    ) -> tuple[DeviceArray, DeviceArray]:
        """Attend over the pages of a batch, and its exact windows; see `HostBackend.attend`.

        Page tables and read ranges are sent when they differ from those of the last call with this
        shape, so once per step for all layers.

        Returns
        -------
        out : array of float32 ``[tokens, num_q_heads, head_dim]``
        lse : array of float32 ``[tokens, num_q_heads]``
        """
        if alibi_slopes is not None:
            raise UnsupportedError("ALiBi is not supported: alibi_slopes must be None")
        self.layer(layer)
        check_table(block_table, reads)
        lens = self._counts(queries, reads, q_lens, window_left)
        check_scale(sm_scale, soft_cap)
        refuse_cap(soft_cap)
        if window is not None:
            self.window(layer)
        if not len(lens):
            return self._results(queries)
        chunk = 0 if keys is None and values is None else int(lens.max())
        shape = len(lens), int(lens.sum()), block_table.shape[1]
        plan = self._plans.of_shape(self, *shape, chunk, window is not None)
        plan.update(block_table, reads, q_lens, window)
        return plan.attend(
            layer,
            queries,
            sm_scale,
            keys,
            values,
            soft_cap=soft_cap,
            sink_logits=sink_logits,
            window_left=window_left,
        )

    def attend_window(
        self,
        layer: int,
        queries: Any,
        window_slots: Array,
        sink_records: Array,
        reads: Reads,
        sm_scale: float,
        q_lens: Array | None = None,
        *,
        chunk_apart: bool = False,
        soft_cap: float | None = None,
        window_left: int | None = None,
    ) -> tuple[DeviceArray, DeviceArray]:
        """Attend exactly over sinks and ring of a batch; see `HostBackend.attend_window`.

        Slots, records and ranges are sent when they differ from those of the last calls.

        Returns
        -------
        out : array of float32 ``[tokens, num_q_heads, head_dim]``
        lse : array of float32 ``[tokens, num_q_heads]``
        """
        self.window(layer)
        check_ranges(reads)
        lens = self._counts(queries, reads, q_lens, window_left)
        check_scale(sm_scale, soft_cap)
        refuse_cap(soft_cap)
        owners = checked_owners((window_slots, sink_records), reads, self.config)
        array, kind = self.operands.queries(queries)
        into = State(*self._results(queries))
        span = WindowSpan(without_chunk(reads, lens) if chunk_apart else reads, lens, owners)
        attend_window(
            self, layer, array, kind, span, reads.kv_lens, sm_scale, window_left, soft_cap, into
        )
        return into.out, into.lse

    def score(
        self,
        layer: int,
        queries: Any,
        block_table: Array,
        reads: Reads,
        *,
        window: tuple[Array, Array] | None = None,
    ) -> Scores:
        """Score one query token per sequence against its readable keys; see `HostBackend.score`.

        Returns
        -------
        Scores
            ``values`` on the device, ``indptr`` and ``positions`` on the host.
        """
        self.layer(layer)
        check_table(block_table, reads)
        lens = self._counts(queries, reads, None, None)
        if window is not None:
            self.window(layer)
            window = window_owners(window, len(lens))
        if not len(lens):
            empty = self.device.empty((queries.shape[1], 0), np.float32)
            return Scores(empty, np.zeros(1, np.int64), np.zeros(0, np.int64))
        shape = len(lens), len(lens), block_table.shape[1]
        plan = self._plans.of_shape(self, *shape, 0, window is not None)
        plan.update(block_table, reads, None, window)
        return score(self, plan, layer, queries, block_table, reads, window)

    def page_stats(self, scores: Scores, sm_scale: float = 1.0) -> PageStats:
        """Reduce `score`'s result to a maximum and a softmax mass per page, as NumPy arrays."""
        return page_stats(self.operands, scores, self.config.page_size, sm_scale)

    def score_bounds(
        self, layer: int, queries: Any, block_table: Array, reads: Reads
    ) -> PageBounds:
        """Refuse: no kernel reads key bounds, only the host's `HostBackend.score_bounds` does."""
        raise UnsupportedError(f"no kernel bounds the scores of pages; {_RANKINGS}")

    def norm_ratios(self, layer: int, pages: Array) -> Array:
        """Refuse: no kernel compares norm planes, only `HostBackend.norm_ratios` does."""
        raise UnsupportedError(f"no kernel compares the norms of pages; {_RANKINGS}")

    def load(self, layer: int, slots: Any, dtype: Dtype = "f32") -> tuple[DeviceArray, DeviceArray]:
        """Decode page slots; see `HostBackend.load`. Results are of type ``dtype``."""
        one = self.layer(layer)
        if not isinstance(dtype, str) or dtype not in STORAGE:
            raise ArgumentError(f"dtype must be one of {', '.join(STORAGE)}, got {dtype!r}")
        index = self.operands.slots(slots, self.page_owners, None)
        shape = (len(index), self.config.num_kv_heads, self.config.head_dim)
        keys, values = (self.device.empty(shape, STORAGE[dtype]) for _ in range(2))
        if len(index):
            self.device.launch(one.tokens.load(index, keys, values, dtype))
        return keys, values

    def host_memory(self, shape: tuple[int, ...]) -> Array:
        """Allocate pinned bytes for the host tier, not cleared."""
        return self.device.pinned(shape, np.uint8)

    def to_host(self, array: Any) -> Array:
        """Return a result of this backend as a NumPy array, waiting for it."""
        return self.device.download(array)

    # -- whole pages -------------------------------------------------------------------------

    def swap_out(self, pages: Array) -> SwappedPages:
        """Copy pages into pinned host memory without waiting."""
        return self.pages.swap_out(pages)

    def swap_in(self, swapped: SwappedPages, pages: Array) -> Event:
        """Copy what `swap_out` returned into pages, without waiting."""
        return self.pages.swap_in(swapped, pages)

    # -- parts -------------------------------------------------------------------------------

    def _results(self, queries: Any) -> tuple[DeviceArray, DeviceArray]:
        shape = queries.shape
        return self.device.empty(shape, np.float32), self.device.empty(shape[:2], np.float32)

    def _counts(
        self, queries: Any, reads: Reads, q_lens: Array | None, window_left: int | None
    ) -> npt.NDArray[np.int64]:
        heads, dim = self.config.num_kv_heads, self.config.head_dim
        return check_query_shapes(queries, reads, q_lens, heads, dim, window_left)

    def layer(self, layer: int) -> CudaLayer:
        """Return the launches and tables of a layer; ``ArgumentError`` if there is none."""
        return self.layers[integer("layer", layer, 0, self.config.num_layers - 1)]
