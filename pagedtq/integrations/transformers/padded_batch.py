"""A batch with left padding as sequences of a paged cache that grows; knows no torch.

The model counts positions of the padded batch; the cache stores real tokens only. Row ``b`` with
``pads[b]`` pads has its token ``p`` at padded position ``pads[b] + p``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ...cache import PagedKVCache, move_sequences
from ...config import CacheConfig, Dtype, Exact
from ...errors import ArgumentError, OutOfPages, OutOfTokens, OutOfWindowSlots, StepError
from .padding import Arrival, check_arrival

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]

#: Tokens per row a pool begins with where nothing says how many there will be.
FIRST_TOKENS = 256


class PaddedBatch:
    """The rows of a batch, their padding, and the cache that holds them.

    Parameters
    ----------
    config : CacheConfig
        Shape and codecs; ``num_pages`` and ``num_window_slots`` are chosen here.
    max_tokens : int or None
        Most tokens of a row, pads not counted; the pool is then allocated for them at once. None:
        it grows, doubling.
    own_tokens : {"exact", "stored"}
        How the queries of a call read the tokens of the same call.
    **options
        Of `PagedKVCache`: ``key_means``, ``accumulate``, ``num_threads``, ``debug``.
    """

    def __init__(
        self,
        config: CacheConfig,
        max_tokens: int | None = None,
        own_tokens: Literal["exact", "stored"] = "exact",
        **options: Any,
    ) -> None:
        self.config = config
        self.max_tokens = max_tokens
        self.own_tokens = own_tokens
        self._options = options
        self.cache: PagedKVCache | None = None
        self.ids: list[int] = []
        self.pads: Int64 = np.zeros(0, np.int64)
        #: Padded length, of committed calls.
        self.length = 0
        self.arrival: Arrival | None = None
        self._stored: set[int] = set()

    def copy(self) -> PaddedBatch:
        """Return an independent batch that holds the same."""
        self._refuse_open("copy")
        twin = PaddedBatch(self.config, self.max_tokens, self.own_tokens, **self._options)
        twin.pads, twin.length, twin.ids = self.pads.copy(), self.length, list(self.ids)
        if self.cache is not None:
            twin.cache = PagedKVCache(self.cache.config, **self._options)
            twin._follow(self.cache, move_sequences(self.cache, twin.cache))
        return twin

    # -- one forward call --------------------------------------------------------------------

    def check(self, rows: int, num_tokens: int, mask: npt.NDArray[np.bool_] | None) -> Arrival:
        """Check what a forward call brings; changes nothing.

        Parameters
        ----------
        rows, num_tokens : int
            Shape of its input.
        mask : ndarray of bool ``[rows, length + num_tokens]`` or None
            False for pads.

        Raises
        ------
        ArgumentError
            Another number of rows than before, a mask of another shape, with holes, or with other
            padding than before.
        OutOfTokens
            A row would be longer than ``max_tokens``.
        """
        if self.ids and rows != len(self.ids):
            raise ArgumentError(
                f"the cache holds a batch of {len(self.ids)}, got {rows} rows; call reset() for a "
                f"new batch, batch_select_indices() to drop rows"
            )
        old = self.pads if self.ids else np.zeros(rows, np.int64)
        arrival = check_arrival(rows, num_tokens, mask, self.length, old)
        if self.max_tokens is not None and rows:
            total = self.length + num_tokens - arrival.pads
            row = int(total.argmax())
            if total[row] > self.max_tokens:
                need = int(arrival.counts[row])
                raise OutOfTokens(need, self.max_tokens - int(total[row]) + need, self.max_tokens)
        return arrival

    def begin(self, arrival: Arrival) -> None:
        """Reserve room for checked tokens; nothing counts before `commit`.

        Raises
        ------
        MemoryError
            If a larger pool cannot be allocated; the batch is unchanged.
        """
        self._refuse_open("begin")
        fresh = not self.ids
        if self.cache is None:
            self.cache = self._new_cache(arrival.rows, self.length + arrival.num_tokens)
        if fresh:
            self.ids = [self.cache.open() for _ in range(arrival.rows)]
        try:
            self._begin_step(arrival)
        except BaseException:
            if fresh:
                self.cache.close(self.ids)
                self.ids = []
            raise
        self.arrival, self._stored = arrival, set()

    def store(self, layer: int, keys: Array, values: Array, dtype: Dtype) -> None:
        """Store one layer of the call, real tokens only: ``[tokens, num_kv_heads, head_dim]``."""
        self._open_cache.store(layer, keys, values, dtype)
        self._stored.add(layer)

    @property
    def missing_layers(self) -> list[int]:
        """Layers of the open call that are not stored yet."""
        return [layer for layer in range(self.config.num_layers) if layer not in self._stored]

    def commit(self) -> None:
        """Close the call: its tokens stay."""
        arrival = self.open_arrival
        self._open_cache.commit()
        self.pads, self.arrival = arrival.pads, None
        self.length += arrival.num_tokens

    def abort(self) -> None:
        """Close the call without its tokens; what the exact window covers may have shrunk."""
        cache, self.arrival = self._open_cache, None
        cache.abort_step()
        if not self.length:
            cache.close(self.ids)
            self.ids = []

    # -- reading -----------------------------------------------------------------------------

    def dense(self, layer: int, start: int, stop: int) -> tuple[Array, Array]:
        """Decode padded positions ``[start, stop)`` of all rows.

        Returns
        -------
        keys, values : ndarray of float32 ``[rows, num_kv_heads, stop - start, head_dim]``
            Zero where a pad is.
        """
        pads = self.pads if self.arrival is None else self.arrival.pads
        shape = (len(self.ids), self.config.num_kv_heads, stop - start, self.config.head_dim)
        keys, values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        assert self.cache is not None
        for row, (seq_id, pad) in enumerate(zip(self.ids, pads.tolist())):
            low, high = max(start - pad, 0), max(stop - pad, 0)
            if low < high:
                part = self.cache.load(layer, seq_id, start=low, stop=high)
                keys[row, :, stop - start - (high - low) :] = part[0].swapaxes(0, 1)
                values[row, :, stop - start - (high - low) :] = part[1].swapaxes(0, 1)
        return keys, values

    def attend(
        self, layer: int, queries: Array, own: Callable[[], tuple[Array, Array]], **options: Any
    ) -> Array:
        """Attend from the tokens of the open call over the pages.

        Parameters
        ----------
        layer : int
            A layer that is stored.
        queries : ndarray ``[tokens, num_q_heads, head_dim]``
            Of the real tokens.
        own : callable
            Returns the keys and values of the same tokens, for when they are read as they came.
        **options
            Of `PagedKVCache.attend`.

        Returns
        -------
        ndarray ``[tokens, num_q_heads, head_dim]``
        """
        arrival = self.open_arrival
        keys = values = None
        if self.own_tokens == "exact" and not self._stores_exactly(layer, arrival.num_tokens):
            keys, values = own()
        out, _ = self._open_cache.attend(
            layer, queries, self.ids, arrival.counts, keys=keys, values=values, **options
        )
        return out

    # -- the batch ---------------------------------------------------------------------------

    def select(self, rows: Iterable[int]) -> None:
        """Make a batch of some rows, in any order; a row named twice is forked.

        Raises
        ------
        ArgumentError
            If there is no such row; nothing changed.
        """
        self._refuse_open("select")
        wanted = list(rows)
        if not self.ids:
            return
        for row in wanted:
            if not -len(self.ids) <= row < len(self.ids):
                raise ArgumentError(f"row {row} is not in a batch of {len(self.ids)}")
        assert self.cache is not None
        wanted = [row % len(self.ids) for row in wanted]
        taken: set[int] = set()
        ids = []
        for row in wanted:
            ids.append(self.cache.fork(self.ids[row]) if row in taken else self.ids[row])
            taken.add(row)
        left = [seq_id for row, seq_id in enumerate(self.ids) if row not in taken]
        if left:
            self.cache.close(left)
        self.ids, self.pads = ids, self.pads[wanted]
        self.length = self.length if ids else 0

    def crop(self, tokens: int) -> None:
        """Cut the last ``tokens`` padded positions off every row."""
        self._refuse_open("crop")
        if not 0 <= tokens <= self.length:
            raise ArgumentError(f"cannot crop {tokens} of {self.length} tokens")
        length = self.length - tokens
        if tokens:
            assert self.cache is not None
            for seq_id, pad in zip(self.ids, self.pads.tolist()):
                self.cache.truncate(seq_id, max(length - pad, 0))
        self.length, self.pads = length, np.minimum(self.pads, length)

    def reset(self) -> None:
        """Drop all rows; the pool stays allocated."""
        if self.arrival is not None:
            self.abort()
        if self.ids:
            assert self.cache is not None
            self.cache.close(self.ids)
        self.ids, self.pads, self.length = [], np.zeros(0, np.int64), 0

    # -- parts -------------------------------------------------------------------------------

    @property
    def open_arrival(self) -> Arrival:
        """What the open forward call brings; ``StepError`` if none is open."""
        if self.arrival is None:
            raise StepError("no forward call is open")
        return self.arrival

    @property
    def _open_cache(self) -> PagedKVCache:
        if self.cache is None or self.arrival is None:
            raise StepError("no forward call is open")
        return self.cache

    def _refuse_open(self, verb: str) -> None:
        if self.arrival is not None:
            raise StepError(f"{verb} cannot run inside a forward call")

    def _stores_exactly(self, layer: int, num_tokens: int) -> bool:
        """Whether what is stored of a call's tokens is what came."""
        if self.config.has_overlay(layer):
            return num_tokens <= self.config.window_tokens
        kv_dtype = self.config.kv_dtype
        return all(
            isinstance(codec, Exact) and codec.dtype == kv_dtype
            for codec in self.config.layer_codecs(layer)
        )

    def _begin_step(self, arrival: Arrival) -> None:
        assert self.cache is not None
        while True:
            try:
                self.cache.begin_step(self.ids, arrival.counts)
                return
            except OutOfPages as error:
                pages, slots = max(2 * error.total, error.total + error.need - error.free) + 1, 0
            except OutOfWindowSlots as error:
                pages, slots = 0, max(2 * error.total, error.total + error.need - error.free)
            self._grow(pages, slots)

    def _grow(self, num_pages: int, num_slots: int) -> None:
        old = self.cache
        assert old is not None
        config = old.config.replace(
            num_pages=max(num_pages, old.config.num_pages),
            num_window_slots=max(num_slots, old.config.num_window_slots),
        )
        cache = PagedKVCache(config, **self._options)
        self._follow(old, move_sequences(old, cache))
        self.cache = cache

    def _follow(self, old: PagedKVCache, new_ids: Int64) -> None:
        moved = dict(zip(old.tables.sequence_ids().tolist(), new_ids.tolist()))
        self.ids = [moved[seq_id] for seq_id in self.ids]

    def _new_cache(self, rows: int, tokens: int) -> PagedKVCache:
        # One page per row above its tokens: the copy of a page that beams share.
        room = self.max_tokens or max(FIRST_TOKENS, tokens)
        pages = rows * (-(-room // self.config.page_size) + 1) + 1
        config = self.config.replace(num_pages=pages, num_window_slots=rows)
        return PagedKVCache(config, **self._options)
