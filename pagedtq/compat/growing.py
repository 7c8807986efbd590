"""One sequence that grows without end, in a paged cache whose pool is fixed.

A pool that is full is replaced by one twice as large and its pages are copied over, so a token
costs a constant number of page operations on average, however long the sequence is. Tokens dropped
at the front give their pages back; once most of the page table is empty entries, the sequence moves
to a fresh table.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cache import PagedKVCache
from ..codec.rotation import has_fast_transform
from ..config import CacheConfig, Codec, LayerOverride
from ..errors import ArgumentTypeError
from ..paging.eviction import EvictionPlan
from ..paging.page_tables import PageTables

Array = npt.NDArray[Any]
Float64 = npt.NDArray[np.float64]

#: Tokens per page, and pages to begin with.
PAGE_SIZE = 64
FIRST_PAGES = 8

# Null entries a page table may hold before the sequence moves, beyond its pages.
_SPARE_ENTRIES = 64
# Pages that are copied together when it moves.
_COPY_PAGES = 256
# Logits beyond this decide a softmax as infinity would, without its NaN.
_LARGEST_SCALE = 1e250


class GrowingSequence:
    """A paged cache of one sequence and one KV head, without a limit.

    Parameters
    ----------
    head_dim : int
        Dimension of the vectors.
    streams : list of (keys, values)
        Codecs of each layer; one layer is one pair of streams.
    seed : int
        Source of all randomness.
    """

    def __init__(self, head_dim: int, streams: list[tuple[Codec, Codec]], seed: int) -> None:
        overrides = tuple(
            LayerOverride(layers=(layer,), keys=keys, values=values)
            for layer, (keys, values) in enumerate(streams)
        )
        self._config = CacheConfig(
            num_layers=len(streams),
            num_kv_heads=1,
            head_dim=head_dim,
            num_pages=FIRST_PAGES + 1,
            page_size=PAGE_SIZE,
            overrides=overrides,
            window=0,
            kv_dtype="f32",
            seed=seed,
        )
        self.clear()

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self._cache.length(self._seq) - self._start

    @property
    def page_bytes(self) -> int:
        """Bytes of the pages that hold the tokens, the unused rest of the last one included."""
        return self._cache.tables.pool.num_used * self._cache.backend.layout.page_bytes

    @property
    def pool_bytes(self) -> int:
        """Bytes allocated for pages, those held free for growth included."""
        return self._cache.backend.layout.pool_bytes

    def clear(self) -> None:
        """Drop all tokens and return to the first size."""
        self._cache = PagedKVCache(self._config, "host", accumulate="float64")
        self._seq = self._cache.open()
        self._start = 0

    def make_room(self, num_new_tokens: int) -> None:
        """Make sure that `append` of so many tokens finds its pages."""
        length = self._cache.length(self._seq)
        total = -(-(length + num_new_tokens) // PAGE_SIZE)
        first = self._start // PAGE_SIZE
        held = -(-length // PAGE_SIZE) - first
        need, pool = total - first - held, self._cache.tables.pool
        if need > pool.num_free:
            self._move(max(2 * (pool.num_pages - 1), held + need))
        elif need and first > held + _SPARE_ENTRIES:
            self._move(pool.num_pages - 1)

    def append(self, keys: Array, values: Array) -> None:
        """Append ``float32[layers, n, 1, head_dim]``; everything or nothing."""
        self.make_room(keys.shape[1])
        self._cache.append(self._seq, keys, values)

    def keep_last(self, num_tokens: int) -> None:
        """Drop all tokens but the last ones."""
        start = self._cache.length(self._seq) - num_tokens
        if start > self._start:
            self._cache.evict(self._seq, _DropBefore(self._start, start))
            self._start = start

    def scores(self, query: Float64, layer: int = 0) -> Float64:
        """Return the inner products of a query ``[head_dim]`` with all keys, ``float64[n]``."""
        scaled, exponent = _scaled(query)
        values, _ = self._cache.score(layer, scaled, self._seq).of(0)
        with np.errstate(over="ignore"):
            products: Float64 = np.ldexp(values[0], exponent)
        return products

    def attend(self, query: Float64, scale: float) -> Float64:
        """Return softmax attention over all tokens of layer 0, ``float64[head_dim]``."""
        scaled, exponent = _scaled(query)
        with np.errstate(over="ignore"):
            factor = float(np.ldexp(scale, exponent))
        factor = min(max(factor, -_LARGEST_SCALE), _LARGEST_SCALE)
        out, _ = self._cache.attend(0, scaled, self._seq, sm_scale=factor)
        return np.asarray(out[0, 0])

    def load(self, layer: int = 0) -> tuple[Float64, Float64]:
        """Decode all tokens: keys and values, ``float64[n, head_dim]``."""
        keys, values, _ = self._cache.load(layer, self._seq)
        return keys[:, 0], values[:, 0]

    def load_at(self, indices: Array, layer: int = 0) -> tuple[Float64, Float64]:
        """Decode single tokens, counted from the oldest one held."""
        slots = self._cache.tables.slots_of(self._seq, self._start + indices)
        keys, values = self._cache.backend.load(layer, slots)
        return keys[:, 0], values[:, 0]

    def _move(self, num_pages: int) -> None:
        """Move to a new cache of that many pages, without the blocks that are dropped."""
        old, first = self._cache, self._start // PAGE_SIZE
        cache = PagedKVCache(
            self._config.replace(num_pages=num_pages + 1), "host", accumulate="float64"
        )
        seq = cache.open()
        length = old.length(self._seq) - first * PAGE_SIZE
        # The pages arrive whole, so the new tables take their tokens without a store.
        cache.tables.commit(cache.tables.reserve([seq], [length]))
        source = old.tables.block_table([self._seq])[0, first:]
        target = cache.tables.block_table([seq])[0]
        for begin in range(0, len(source), _COPY_PAGES):
            part = slice(begin, begin + _COPY_PAGES)
            cache.backend.scatter(old.backend.gather(source[part]), target[part])
        start = self._start - first * PAGE_SIZE
        cache.tables.set_start(seq, 0, start)
        self._cache, self._seq, self._start = cache, seq, start


class _DropBefore:
    """Eviction of everything below a position, knowing what went before."""

    def __init__(self, old: int, new: int) -> None:
        self._old, self._new = old, new

    def plan(self, tables: PageTables, seq_id: int) -> EvictionPlan:
        """Return the blocks that end between the two positions, and the new boundary."""
        size = tables.page_size
        blocks = np.arange(self._old // size, self._new // size)
        return EvictionPlan(seq_id, blocks, 0, self._new)


def rotation_for(head_dim: int) -> Any:
    """Return the kind of rotation a dimension gets: the fast one where there is one."""
    return "hadamard" if has_fast_transform(head_dim) else "dense"


def check_type(name: str, value: object, kind: type) -> None:
    """Refuse a field of another type: a struct made in Python is not checked when it is made."""
    if not isinstance(value, kind):
        got = type(value).__name__
        raise ArgumentTypeError(f"{name} must be {kind.__name__}, got {got} {value!r}")


def number(name: str, value: object) -> float:
    """Return a number as a float; refuse anything else by type, a bool too."""
    if isinstance(value, bool) or not isinstance(value, float | int | np.floating | np.integer):
        raise ArgumentTypeError(f"{name} must be a number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def vector(array: npt.ArrayLike, name: str) -> Float64:
    """Convert what should be a vector; its length is the caller's to check.

    Raises
    ------
    ArgumentTypeError
        If it is not a sequence of real numbers.
    """
    try:
        converted = np.asarray(array)
        if converted.dtype.kind not in "fiu":
            converted = converted.astype(np.float64, casting="same_kind")
        converted = converted.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(f"{name} must be a vector of real numbers: {error}") from error
    if converted.ndim != 1:
        raise ArgumentTypeError(f"{name} must be a vector, got {converted.ndim} dimensions")
    return converted


def _scaled(query: Float64) -> tuple[Array, int]:
    """Bring a query into float32's range by a power of two: ``[1, 1, head_dim]``, exponent."""
    exponent = int(np.frexp(np.abs(query).max())[1])
    return np.ldexp(query, -exponent).astype(np.float32)[None, None], exponent
