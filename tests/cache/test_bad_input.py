"""Bad input of every kind: each has its typed error, and nothing changes, to the byte."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from pagedtq import CacheConfig, Exact, KeepFirstLast, PagedKVCache, TurboQuant
from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConfigError,
    EvictedError,
    NonFiniteError,
    NotUnitNormError,
    OutOfPages,
    OutOfWindowSlots,
    OverflowingError,
    PagedTQError,
    SlotError,
    StepError,
    UnknownSequence,
    UnsupportedError,
)
from tests.cache.bank import HEADS, LAYERS, differences, make_config, snapshot

P, DIM = 16, 16
PAGES, SLOTS = 12, 3

SCENES: dict[str, dict[str, Any]] = {
    "window": {"window": P},
    "plain": {"window": 0},
    "mixed": {"name": "mixed", "window": P},
    "f32": {"kv_dtype": "f32"},
    "bf16": {"kv_dtype": "bf16"},
    "exact16": {"name": "exact", "kv_dtype": "f32"},
    "exact keys": {"kv_dtype": "bf16", "keys": Exact(), "window": P},
    "unit": {"keys": TurboQuant(unit_norm=True)},
}


class Scene:
    """A cache with something of everything.

    ``long`` has 5 P + 5 tokens, block 1 evicted, and a fork ``twin``; ``short`` has 3 tokens;
    ``empty`` and ``other`` have none. 5 pages and 1 window slot are free.
    """

    def __init__(self, kind: str, in_step: bool = False) -> None:
        options = {"name": "k4v4"} | SCENES[kind]
        keys = options.pop("keys", None)
        config = make_config(
            options.pop("name"), num_pages=PAGES, page_size=P, num_window_slots=SLOTS, **options
        )
        self.config = config if keys is None else config.replace(keys=keys)
        self.cache = PagedKVCache(self.config, num_threads=1, debug=True)
        self.closed = self.cache.open()
        self.cache.close(self.closed)
        self.long = self.grown(5 * P + 5)
        self.cache.evict(self.long, [1])
        self.twin = self.cache.fork(self.long)
        self.short = self.grown(3)
        self.empty, self.other = self.cache.open(), self.cache.open()
        self.foreign = PagedKVCache(self.config, num_threads=1).open()
        self.layer_0 = [a[0] for a in self.tokens(4)]
        if in_step:
            self.cache.begin_step([self.long, self.short], [3, 1])
            self.cache.store(1, *(a[1] for a in self.tokens(4)))
        self.pages = self.cache.tables.block_table([self.long])[0]
        free = np.flatnonzero(self.cache.tables.pool.ref_counts == 0)
        self.free_page = int(free[-1])

    def grown(self, count: int) -> int:
        seq_id = self.cache.open()
        self.cache.append(seq_id, *self.tokens(count))
        return seq_id

    def tokens(self, count: int) -> list[np.ndarray]:
        """Good tokens ``float32[layers, count, heads, dim]``; keys of norm 1."""
        keys, values = np.random.default_rng(count).standard_normal((2, LAYERS, count, HEADS, DIM))
        keys /= np.linalg.norm(keys, axis=-1, keepdims=True)
        return [keys.astype(np.float32), values.astype(np.float32)]

    def append(self, keys: Any = None, values: Any = None, *, to: Any = None, **options: Any):
        """Append to ``short`` what is given, good tokens otherwise."""
        good = self.tokens(2)
        keys = good[0] if keys is None else keys
        values = good[1] if values is None else values
        self.cache.append(self.short if to is None else to, keys, values, **options)

    def spoiled(self, value: float, stream: int = 1, count: int = 2) -> dict[str, np.ndarray]:
        """Good tokens but for the last element of the last head, token and layer."""
        keys_values = self.tokens(count)
        keys_values[stream][-1, -1, -1, -1] = value
        return dict(zip(("keys", "values"), keys_values))

    def store_spoiled(self, value: float, stream: int = 1) -> None:
        keys_values = [a.copy() for a in self.layer_0]
        keys_values[stream][-1, -1, -1] = value
        self.cache.store(0, *keys_values)

    def queries(self, count: int = 1, heads: int = 4, dim: int = DIM, dtype: Any = np.float32):
        return np.ones((count, heads, dim), dtype)

    def spoiled_queries(self, value: float) -> np.ndarray:
        queries = self.queries()
        queries[-1, -1, -1] = value
        return queries

    def attend(self, queries: Any = None, ids: Any = None, layer: Any = 0, **options: Any):
        queries = self.queries() if queries is None else queries
        return self.cache.attend(layer, queries, self.long if ids is None else ids, **options)

    def back_store(self, slots: Any, count: int | None = None) -> None:
        count = len(slots) if count is None else count
        self.cache.backend.store(0, *(a[0] for a in self.tokens(count)), slots)


class Case(NamedTuple):
    what: str
    error: type[PagedTQError]
    message: str
    call: Callable[[Scene], Any]
    scene: str = "window"
    in_step: bool = False


def cases(scene: str, *rows: tuple, in_step: bool = False) -> list[Case]:
    return [Case(*row, scene, in_step) for row in rows]


Z = np.zeros
BAD, KIND = ArgumentError, ArgumentTypeError

TOKENS = cases(
    "window",
    ("keys without layers", BAD, "keys must have shape [2,", lambda s: s.append(s.layer_0[0])),
    ("one layer only", BAD, "keys must have shape [2,", lambda s: s.append(s.tokens(2)[0][:1])),
    (
        "values of 3 layers",
        BAD,
        "values must have",
        lambda s: s.append(values=Z((3, 2, 2, 16), "f")),
    ),
    ("another number of heads", BAD, "KV heads", lambda s: s.append(Z((2, 2, 3, 16), "f"))),
    (
        "values with fewer heads",
        BAD,
        "values must",
        lambda s: s.append(values=Z((2, 2, 1, 16), "f")),
    ),
    ("another head_dim", BAD, "head_dim", lambda s: s.append(Z((2, 2, 2, 8), "f"))),
    (
        "values of another head_dim",
        UnsupportedError,
        "v_head_dim != head_dim is not supported",
        lambda s: s.append(values=Z((2, 2, 2, 8), "f")),
    ),
    (
        "fewer values",
        BAD,
        "values must have shape [2,",
        lambda s: s.append(values=Z((2, 1, 2, 16), "f")),
    ),
    ("float64", KIND, "float64", lambda s: s.append(Z((2, 2, 2, 16)))),
    ("float64 values", KIND, "values must be f32", lambda s: s.append(values=Z((2, 2, 2, 16)))),
    ("int8", KIND, "int8", lambda s: s.append(Z((2, 2, 2, 16), np.int8))),
    ("complex", KIND, "complex64", lambda s: s.append(Z((2, 2, 2, 16), np.complex64))),
    ("lists", KIND, "list", lambda s: s.append(s.tokens(2)[0].tolist())),
    ("lists of values", KIND, "list", lambda s: s.append(values=s.tokens(2)[1].tolist())),
    ("a number", KIND, "int", lambda s: s.append(1)),
    ("uint16 of no declared type", KIND, "uint16", lambda s: s.append(Z((2, 2, 2, 16), np.uint16))),
    ("not the declared type", KIND, "must be f16", lambda s: s.append(dtype="f16")),
    ("a type that does not exist", KIND, "must be f8", lambda s: s.append(dtype="f8")),
    (
        "keys and values of two types",
        KIND,
        "values must be f32",
        lambda s: s.append(values=Z((2, 2, 2, 16), np.float16)),
    ),
    (
        "float16 in the other byte order",
        KIND,
        "byte order",
        lambda s: s.append(*(a.astype(">f2") for a in s.tokens(2))),
    ),
    (
        "float32 in the other byte order",
        KIND,
        "byte order",
        lambda s: s.append(*(a.astype(">f4") for a in s.tokens(2))),
    ),
    (
        "NaN in the last key",
        NonFiniteError,
        "(1, 1, 15)",
        lambda s: s.append(**s.spoiled(np.nan, 0)),
    ),
    ("NaN in the last value", NonFiniteError, "values", lambda s: s.append(**s.spoiled(np.nan))),
    ("infinity", NonFiniteError, "inf", lambda s: s.append(**s.spoiled(np.inf))),
    ("minus infinity", NonFiniteError, "-inf", lambda s: s.append(**s.spoiled(-np.inf, 0))),
    (
        "NaN in float16",
        NonFiniteError,
        "nan",
        lambda s: s.append(**{k: a.astype("f2") for k, a in s.spoiled(np.nan).items()}),
    ),
    (
        "NaN in bfloat16 bits",
        NonFiniteError,
        "nan",
        lambda s: s.append(*[np.full((2, 2, 2, 16), 0x7FC1, np.uint16)] * 2, dtype="bf16"),
    ),
    ("overflow of f16", OverflowingError, "must fit f16", lambda s: s.append(**s.spoiled(65520.0))),
    ("negative overflow", OverflowingError, "f16", lambda s: s.append(**s.spoiled(-7e4, 0))),
    ("a norm too large", OverflowingError, "32752", lambda s: s.append(**s.spoiled(4e4, 0))),
    ("a value's norm too large", OverflowingError, "value", lambda s: s.append(**s.spoiled(-4e4))),
)
TOKENS += cases(
    "bf16",
    (
        "overflow of bf16",
        OverflowingError,
        "must fit bf16",
        lambda s: s.append(**s.spoiled(3.4e38)),
    ),
    (
        "a norm too large in bf16",
        OverflowingError,
        "32752",
        lambda s: s.append(**s.spoiled(32800.0)),
    ),
)
TOKENS += cases(
    "f32",
    (
        "a norm too large in f32",
        OverflowingError,
        "32752",
        lambda s: s.append(**s.spoiled(1e30, 0)),
    ),
    (
        "a norm too large of small elements",
        OverflowingError,
        "32752",
        lambda s: s.append(np.full((2, 2, 2, 16), 9000, "f")),
    ),
)
TOKENS += cases(
    "exact16",
    (
        "overflow of exact f16 pages",
        OverflowingError,
        "f16",
        lambda s: s.append(**s.spoiled(65520.0)),
    ),
    (
        "overflow of exact f16 keys",
        OverflowingError,
        "f16",
        lambda s: s.append(**s.spoiled(-1e9, 0)),
    ),
)
TOKENS += cases(
    "exact keys",
    # 65504 fits f16, but as a bfloat16 it is 65536.
    (
        "overflow after rounding",
        OverflowingError,
        "f16",
        lambda s: s.append(**s.spoiled(65504.0, 0)),
    ),
)
TOKENS += cases(
    "unit",
    ("a key of norm 2", NotUnitNormError, "norm 1", lambda s: s.append(2 * s.tokens(2)[0])),
    ("a zero key", NotUnitNormError, "norm 1", lambda s: s.append(Z((2, 2, 2, 16), "f"))),
    (
        "the last key not of norm 1",
        NotUnitNormError,
        "head 1",
        lambda s: s.append(**s.spoiled(0.9, 0)),
    ),
)

BATCHES = cases(
    "window",
    ("a batch without counts", BAD, "num_new_tokens", lambda s: s.append(to=[s.short, s.empty])),
    (
        "counts that do not add up",
        BAD,
        "add up to 2 tokens, got 3",
        lambda s: s.append(to=[s.short, s.empty], num_new_tokens=[1, 2]),
    ),
    ("too many counts", BAD, "one entry per", lambda s: s.append(num_new_tokens=[1, 1])),
    (
        "negative counts",
        BAD,
        "got -1",
        lambda s: s.append(to=[s.short, s.empty], num_new_tokens=[3, -1]),
    ),
    ("counts that are floats", KIND, "integers", lambda s: s.append(num_new_tokens=[2.0])),
    ("counts that are strings", KIND, "integers", lambda s: s.append(num_new_tokens=["2"])),
    ("counts that are bools", KIND, "bool", lambda s: s.cache.begin_step([s.short], [True])),
    ("a count that is a bool", KIND, "bool", lambda s: s.cache.begin_step(s.short, True)),
    ("no counts", KIND, "NoneType", lambda s: s.cache.begin_step(s.short, None)),
    ("an absurd count", BAD, "num_new_tokens", lambda s: s.cache.begin_step(s.short, 1 << 50)),
    ("a nested list of counts", KIND, "flat", lambda s: s.cache.begin_step(s.short, [[1], [1, 2]])),
    (
        "a sequence twice",
        BAD,
        "twice",
        lambda s: s.append(to=[s.short, s.short], num_new_tokens=[1, 1]),
    ),
    ("a closed sequence", UnknownSequence, "not open here", lambda s: s.append(to=s.closed)),
    ("a sequence of another cache", UnknownSequence, "another", lambda s: s.append(to=s.foreign)),
    (
        "sequences of two caches",
        UnknownSequence,
        "another cache",
        lambda s: s.append(to=[s.short, s.foreign], num_new_tokens=[1, 1]),
    ),
    ("sequence 0", UnknownSequence, "sequence 0 is", lambda s: s.append(to=0)),
    ("sequence -1", UnknownSequence, "sequence -1 is", lambda s: s.append(to=[-1])),
    ("a float as sequence", KIND, "seq_ids", lambda s: s.append(to=1.5)),
    ("a bool as sequence", KIND, "seq_ids", lambda s: s.append(to=True)),
    ("a string as sequence", KIND, "seq_ids", lambda s: s.append(to="7")),
    ("ids in two dimensions", BAD, "one-dimensional", lambda s: s.append(to=[[s.short]])),
    ("a ragged list of ids", KIND, "flat", lambda s: s.append(to=[[s.short], [1, 2]])),
    (
        "more pages than free",
        OutOfPages,
        "need 6 pages, 5 free of 11",
        lambda s: s.append(*s.tokens(6 * P), to=s.empty),
    ),
    (
        "pages exhausted half-way",
        OutOfPages,
        "need 7 pages, 5 free of 11",
        lambda s: s.append(*s.tokens(7 * P), to=[s.empty, s.short], num_new_tokens=[P, 6 * P]),
    ),
    (
        "window slots exhausted half-way",
        OutOfWindowSlots,
        "need 3 window slots, 1 free of 3",
        lambda s: s.append(*s.tokens(3), to=[s.empty, s.twin, s.other], num_new_tokens=[1, 1, 1]),
    ),
    (
        "window slots exhausted by forks alone",
        OutOfWindowSlots,
        "need 2 window slots, 1 free of 3",
        lambda s: s.cache.begin_step([s.other, s.long, s.empty], [0, 1, 1]),
    ),
)
BATCHES += cases(
    "plain",
    (
        "pages exhausted half-way, without a window",
        OutOfPages,
        "need 7 pages, 5 free of 11",
        lambda s: s.append(*s.tokens(7 * P), to=[s.empty, s.short], num_new_tokens=[P, 6 * P]),
    ),
    (
        "pages exhausted by a copy on write",
        OutOfPages,
        "need 6 pages, 5 free of 11",
        lambda s: s.append(*s.tokens(5 * P), to=s.twin),
    ),
)

TABLES = cases(
    "window",
    ("a negative length", BAD, "length", lambda s: s.cache.truncate(s.long, -1)),
    ("a length beyond the end", BAD, "got 86", lambda s: s.cache.truncate(s.long, 5 * P + 6)),
    ("a float as length", KIND, "length", lambda s: s.cache.truncate(s.long, 2.0)),
    ("a bool as length", KIND, "bool", lambda s: s.cache.truncate(s.long, True)),
    ("no length", KIND, "NoneType", lambda s: s.cache.truncate(s.long, None)),
    (
        "an evicted end",
        EvictedError,
        "block 1 was evicted",
        lambda s: s.cache.truncate(s.long, P + 1),
    ),
    ("truncating a closed one", UnknownSequence, "open", lambda s: s.cache.truncate(s.closed, 0)),
    ("truncating many", KIND, "seq_id", lambda s: s.cache.truncate([s.long], 0)),
    ("forking a closed one", UnknownSequence, "open", lambda s: s.cache.fork(s.closed)),
    ("forking a foreign one", UnknownSequence, "another", lambda s: s.cache.fork(s.foreign)),
    ("forking by name", KIND, "seq_id", lambda s: s.cache.fork("long")),
    ("closing twice", UnknownSequence, "open", lambda s: s.cache.close(s.closed)),
    ("closing one twice at once", BAD, "twice", lambda s: s.cache.close([s.long, s.long])),
    (
        "closing good ones and a foreign one",
        UnknownSequence,
        "another cache",
        lambda s: s.cache.close([s.long, s.short, s.foreign]),
    ),
    ("evicting what the ring holds", BAD, "exact window", lambda s: s.cache.evict(s.long, [4])),
    ("evicting the open block", BAD, "block 5 is open", lambda s: s.cache.evict(s.long, [5])),
    ("evicting a block that is not", BAD, "no block 6", lambda s: s.cache.evict(s.long, [6])),
    ("evicting a negative block", BAD, "no block -1", lambda s: s.cache.evict(s.long, [-1])),
    ("evicting one block twice", BAD, "twice", lambda s: s.cache.evict(s.long, [2, 2])),
    ("evicting again", EvictedError, "block 1", lambda s: s.cache.evict(s.long, [1])),
    ("good blocks and an open one", BAD, "open", lambda s: s.cache.evict(s.long, [0, 2, 5])),
    ("good blocks and an evicted one", EvictedError, "1", lambda s: s.cache.evict(s.long, [0, 1])),
    ("blocks that are floats", KIND, "blocks", lambda s: s.cache.evict(s.long, [0.0])),
    ("blocks that are bools", KIND, "bool", lambda s: s.cache.evict(s.long, [True])),
    ("a block that is no list", KIND, "blocks", lambda s: s.cache.evict(s.long, 0)),
    ("evicting from nothing", UnknownSequence, "open", lambda s: s.cache.evict(s.closed, [0])),
    (
        "a policy on a foreign sequence",
        UnknownSequence,
        "another cache",
        lambda s: s.cache.evict(s.foreign, KeepFirstLast(1, 1)),
    ),
    (
        "keeping fewer than none",
        BAD,
        "first",
        lambda s: s.cache.evict(s.long, KeepFirstLast(-1, 4)),
    ),
    ("keeping half a token", KIND, "last", lambda s: s.cache.evict(s.long, KeepFirstLast(1, 0.5))),
    (
        "a boundary inside the ring",
        BAD,
        "exact window",
        lambda s: s.cache.tables.set_start(s.long, 0, 5 * P),
    ),
    ("a boundary upside down", BAD, "keep", lambda s: s.cache.tables.set_start(s.long, 20, 10)),
    ("the length of a closed one", UnknownSequence, "open", lambda s: s.cache.length(s.closed)),
    ("the state of a foreign one", UnknownSequence, "another", lambda s: s.cache.state(s.foreign)),
)
TABLES += cases(
    "plain",
    ("the open block, without a window", BAD, "is open", lambda s: s.cache.evict(s.long, [5])),
    ("a negative length, without one", BAD, "length", lambda s: s.cache.truncate(s.long, -1)),
)

NO_STEP = cases(
    "window",
    ("a store without a step", StepError, "begin_step", lambda s: s.cache.store(0, *s.layer_0)),
    ("a commit without a step", StepError, "begin_step", lambda s: s.cache.commit()),
    ("an abort without a step", StepError, "begin_step", lambda s: s.cache.abort_step()),
)
IN_STEP = cases(
    "window",
    ("an append", StepError, "open step", lambda s: s.append(to=s.empty)),
    ("another step", StepError, "a step is open", lambda s: s.cache.begin_step(s.empty)),
    ("a fork", StepError, "a step is open", lambda s: s.cache.fork(s.long)),
    ("a fork of another", StepError, "a step is open", lambda s: s.cache.fork(s.twin)),
    ("an eviction", StepError, "a step is open", lambda s: s.cache.evict(s.long, [0])),
    ("a policy", StepError, "open", lambda s: s.cache.evict(s.long, KeepFirstLast(1, 1))),
    ("a truncation", StepError, "a step is open", lambda s: s.cache.truncate(s.long, 3)),
    ("a close", StepError, "a step is open", lambda s: s.cache.close(s.long)),
    ("a close of another", StepError, "a step is open", lambda s: s.cache.close(s.empty)),
    ("a boundary", StepError, "open", lambda s: s.cache.tables.set_start(s.twin, 0, 0)),
    ("a layer twice", StepError, "already stored", lambda s: s.cache.store(1, *s.layer_0)),
    ("a commit too early", StepError, "layers [0] are not", lambda s: s.cache.commit()),
    (
        "fewer tokens",
        BAD,
        "the step has 4 tokens, got 3",
        lambda s: s.cache.store(0, s.layer_0[0][:3], s.layer_0[1][:3]),
    ),
    ("no tokens", BAD, "has 4 tokens", lambda s: s.cache.store(0, *(a[:0] for a in s.layer_0))),
    ("all layers at once", BAD, "keys must have", lambda s: s.cache.store(0, *s.tokens(4))),
    ("NaN in the last value", NonFiniteError, "(3, 1, 15)", lambda s: s.store_spoiled(np.nan)),
    ("infinity in the last key", NonFiniteError, "keys", lambda s: s.store_spoiled(np.inf, 0)),
    ("overflow", OverflowingError, "f16", lambda s: s.store_spoiled(1e5)),
    ("a norm too large", OverflowingError, "32752", lambda s: s.store_spoiled(5e4)),
    ("float64", KIND, "float64", lambda s: s.cache.store(0, *(a.astype("f8") for a in s.layer_0))),
    ("lists", KIND, "list", lambda s: s.cache.store(0, *(a.tolist() for a in s.layer_0))),
    ("layer 2 of 2", BAD, "layer must be in [0, 1]", lambda s: s.cache.store(2, *s.layer_0)),
    ("layer -1", BAD, "layer must be in [0, 1]", lambda s: s.cache.store(-1, *s.layer_0)),
    ("layer 0.0", KIND, "layer", lambda s: s.cache.store(0.0, *s.layer_0)),
    ("layer False", KIND, "layer", lambda s: s.cache.store(False, *s.layer_0)),
    ("layer [0]", KIND, "layer", lambda s: s.cache.store([0], *s.layer_0)),
    ("reading a layer not stored", StepError, "layer 0 is not stored", lambda s: s.attend()),
    ("scoring it", StepError, "layer 0", lambda s: s.cache.score(0, s.queries(), s.long)),
    ("loading it", StepError, "layer 0", lambda s: s.cache.load(0, s.short)),
    in_step=True,
)
IN_STEP += cases(
    "plain",
    (
        "an eviction, without a window",
        StepError,
        "open",
        lambda s: s.cache.evict(s.long, [0]),
    ),
    (
        "fewer tokens, without a window",
        BAD,
        "4 tokens",
        lambda s: s.cache.store(0, *Z((2, 3, 2, 16), "f")),
    ),
    ("NaN, without a window", NonFiniteError, "values", lambda s: s.store_spoiled(np.nan)),
    in_step=True,
)

QUERIES = cases(
    "window",
    ("3 query heads", BAD, "multiple of 2 heads", lambda s: s.attend(s.queries(heads=3))),
    ("no query heads", BAD, "multiple of 2 heads", lambda s: s.attend(s.queries(heads=0))),
    ("queries of another dim", BAD, "queries must have", lambda s: s.attend(s.queries(dim=8))),
    ("queries in two dimensions", BAD, "queries must have", lambda s: s.attend(s.queries()[0])),
    ("two queries for one sequence", BAD, "queries must have", lambda s: s.attend(s.queries(2))),
    ("float64 queries", KIND, "float64", lambda s: s.attend(s.queries(dtype="f8"))),
    ("integer queries", KIND, "int32", lambda s: s.attend(s.queries(dtype="i4"))),
    ("uint16 queries", KIND, "uint16", lambda s: s.attend(s.queries(dtype="u2"))),
    ("swapped bytes", KIND, "byte order", lambda s: s.attend(s.queries(dtype=">f2"))),
    ("a list of queries", KIND, "list", lambda s: s.attend(s.queries().tolist())),
    ("NaN in a query", NonFiniteError, "(0, 3, 15)", lambda s: s.attend(s.spoiled_queries(np.nan))),
    ("infinity in a query", NonFiniteError, "inf", lambda s: s.attend(s.spoiled_queries(np.inf))),
    ("a group of 65", UnsupportedError, "1 to 64", lambda s: s.attend(s.queries(heads=130))),
    (
        "more queries than tokens",
        BAD,
        "3 tokens",
        lambda s: s.attend(s.queries(4), s.short, q_lens=[4]),
    ),
    ("a query of an empty one", BAD, "0 tokens", lambda s: s.attend(ids=s.empty, q_lens=[1])),
    ("q_lens that do not add up", BAD, "queries must have", lambda s: s.attend(q_lens=[2])),
    ("q_lens of floats", KIND, "q_lens", lambda s: s.attend(q_lens=[1.0])),
    ("q_lens of bools", KIND, "q_lens", lambda s: s.attend(q_lens=[True])),
    ("ragged q_lens", KIND, "q_lens", lambda s: s.attend(q_lens=[[1], [1, 2]])),
    ("too many q_lens", BAD, "q_lens", lambda s: s.attend(q_lens=[1, 0])),
    ("a negative q_len", BAD, "q_lens", lambda s: s.attend(ids=[s.long, s.short], q_lens=[2, -1])),
    ("one number as q_lens", KIND, "q_lens", lambda s: s.attend(q_lens=1)),
    ("sm_scale NaN", BAD, "sm_scale must be finite", lambda s: s.attend(sm_scale=np.nan)),
    ("sm_scale infinite", BAD, "sm_scale", lambda s: s.attend(sm_scale=np.inf)),
    ("sm_scale a bool", KIND, "sm_scale must be a number", lambda s: s.attend(sm_scale=True)),
    ("soft_cap a bool", KIND, "soft_cap must be a number", lambda s: s.attend(soft_cap=True)),
    ("sm_scale a string", KIND, "sm_scale", lambda s: s.attend(sm_scale="1")),
    ("sm_scale an array", KIND, "sm_scale", lambda s: s.attend(sm_scale=np.ones(4))),
    ("soft_cap 0", BAD, "soft_cap must be positive", lambda s: s.attend(soft_cap=0.0)),
    ("soft_cap negative", BAD, "soft_cap", lambda s: s.attend(soft_cap=-30.0)),
    ("soft_cap NaN", BAD, "soft_cap", lambda s: s.attend(soft_cap=np.nan)),
    ("soft_cap a string", KIND, "soft_cap", lambda s: s.attend(soft_cap="30")),
    ("window_left negative", BAD, "window_left", lambda s: s.attend(window_left=-1)),
    ("window_left a float", KIND, "window_left", lambda s: s.attend(window_left=7.0)),
    ("3 sink logits for 4 heads", BAD, "sink_logits", lambda s: s.attend(sink_logits=Z(3, "f"))),
    ("a list of sink logits", KIND, "sink_logits", lambda s: s.attend(sink_logits=[0.0] * 4)),
    ("sink logits of integers", KIND, "sink_logits", lambda s: s.attend(sink_logits=Z(4, "i4"))),
    (
        "NaN as sink logit",
        NonFiniteError,
        "sink",
        lambda s: s.attend(sink_logits=np.full(4, np.nan)),
    ),
    ("keys without values", BAD, "come together", lambda s: s.attend(keys=s.layer_0[0][:1])),
    ("values without keys", BAD, "come together", lambda s: s.attend(values=s.layer_0[0][:1])),
    (
        "a chunk of more tokens than queries",
        BAD,
        "one row per query token",
        lambda s: s.attend(keys=s.layer_0[0], values=s.layer_0[1]),
    ),
    (
        "NaN in the chunk",
        NonFiniteError,
        "values",
        lambda s: s.attend(keys=s.layer_0[0][:1], values=np.full((1, 2, 16), np.nan, "f")),
    ),
    (
        "a chunk whose values have another dim",
        UnsupportedError,
        "v_head_dim",
        lambda s: s.attend(keys=s.layer_0[0][:1], values=Z((1, 2, 8), "f")),
    ),
    (
        "ALiBi",
        UnsupportedError,
        "ALiBi is not supported",
        lambda s: s.attend(alibi_slopes=np.ones(4, "f")),
    ),
    ("attending in layer 2", BAD, "layer must be in [0, 1]", lambda s: s.attend(layer=2)),
    ("attending in layer -1", BAD, "layer must be in [0, 1]", lambda s: s.attend(layer=-1)),
    ("attending in no layer", KIND, "layer", lambda s: s.attend(layer=None)),
    ("attending over a closed one", UnknownSequence, "open", lambda s: s.attend(ids=s.closed)),
    (
        "attending over two caches",
        UnknownSequence,
        "another",
        lambda s: s.attend(s.queries(2), [s.long, s.foreign]),
    ),
    ("scoring two queries", BAD, "queries", lambda s: s.cache.score(0, s.queries(2), s.long)),
    (
        "scoring NaN",
        NonFiniteError,
        "queries",
        lambda s: s.cache.score(0, s.spoiled_queries(np.nan), s.long),
    ),
    ("scoring in layer -2", BAD, "layer", lambda s: s.cache.score(-2, s.queries(), s.long)),
    (
        "scoring a foreign one",
        UnknownSequence,
        "open",
        lambda s: s.cache.score(0, s.queries(), s.foreign),
    ),
    (
        "codes of what only the ring holds",
        BAD,
        "positions [80, 85) are in the exact window only",
        lambda s: s.cache.load(0, s.long, exact=False),
    ),
    ("loading layer 2", BAD, "layer must be in", lambda s: s.cache.load(2, s.long)),
    ("loading layer -1", BAD, "layer must be in", lambda s: s.cache.load(-1, s.long)),
    ("loading layer '0'", KIND, "layer", lambda s: s.cache.load("0", s.long)),
    ("loading a closed one", UnknownSequence, "open", lambda s: s.cache.load(0, s.closed)),
    ("loading two", KIND, "seq_id", lambda s: s.cache.load(0, [s.long, s.short])),
)
QUERIES += cases(
    "plain",
    (
        "ALiBi, without a window",
        UnsupportedError,
        "ALiBi",
        lambda s: s.attend(alibi_slopes=Z(4, "f")),
    ),
    ("3 sink logits, without a window", BAD, "sink", lambda s: s.attend(sink_logits=Z(3, "f"))),
    (
        "float64 queries, without a window",
        KIND,
        "float64",
        lambda s: s.attend(s.queries(dtype="f8")),
    ),
)
QUERIES += cases(
    "mixed",
    ("the window of a layer without", BAD, "no exact window", lambda s: s.cache.backend.window(0)),
)

SLOT_MAPPINGS = cases(
    "window",
    (
        "a slot beyond the pool",
        SlotError,
        "in [16, 191], got 192",
        lambda s: s.back_store([P * PAGES]),
    ),
    ("a slot of the null page", SlotError, "got 0", lambda s: s.back_store([-1, 0])),
    ("the last slot of the null page", SlotError, "got 15", lambda s: s.back_store([P - 1])),
    (
        "a slot twice",
        SlotError,
        "appears twice",
        lambda s: s.back_store([P * s.pages[0], P * s.pages[0] + 1, P * s.pages[0]]),
    ),
    (
        "a page without an owner",
        SlotError,
        "has no owner",
        lambda s: s.back_store([P * s.pages[0], P * s.free_page]),
    ),
    ("fewer slots than tokens", BAD, "2 entries", lambda s: s.back_store([P * s.pages[0]], 2)),
    ("slots that are floats", KIND, "slot", lambda s: s.back_store([16.0])),
    ("slots in two dimensions", BAD, "slot", lambda s: s.back_store(np.full((1, 1), 16), 1)),
    ("ragged slots", KIND, "slot", lambda s: s.back_store([[1], [2, 3]])),
    (
        "NaN beside good slots",
        NonFiniteError,
        "keys",
        lambda s: s.cache.backend.store(0, *np.full((2, 1, 2, 16), np.nan, "f"), [P * s.pages[0]]),
    ),
    (
        "storing into layer -1",
        BAD,
        "layer",
        lambda s: s.cache.backend.store(-1, *s.layer_0, [-1] * 4),
    ),
    ("reading a negative slot", SlotError, "got -1", lambda s: s.cache.backend.load(0, [-1])),
    ("reading the null page", SlotError, "got 3", lambda s: s.cache.backend.load(0, [3])),
    ("reading beyond the pool", SlotError, "got 999", lambda s: s.cache.backend.load(0, [999])),
    (
        "reading a free page",
        SlotError,
        "no owner",
        lambda s: s.cache.backend.load(0, [P * s.free_page]),
    ),
    ("reading layer 2", BAD, "layer", lambda s: s.cache.backend.load(2, [P * s.pages[0]])),
)

ONE, TWO = np.array([1]), np.array([1, 2])
WHOLE_PAGES = cases(
    "window",
    ("copying to the null page", BAD, "got 0", lambda s: s.cache.backend.copy_pages(ONE, ONE - 1)),
    ("copying beyond the pool", BAD, "got 12", lambda s: s.cache.backend.copy_pages(ONE, ONE + 11)),
    ("copying a negative page", BAD, "got -1", lambda s: s.cache.backend.copy_pages(-ONE, ONE)),
    ("copying two to one", BAD, "pair up", lambda s: s.cache.backend.copy_pages(TWO, ONE)),
    ("copying a list", BAD, "integer array", lambda s: s.cache.backend.copy_pages([1], ONE)),
    ("copying floats", BAD, "integer array", lambda s: s.cache.backend.copy_pages(ONE, ONE * 2.0)),
    ("gathering beyond the pool", BAD, "got 13", lambda s: s.cache.backend.gather(TWO * 13)),
    ("gathering the null page", BAD, "got 0", lambda s: s.cache.backend.gather(ONE - 1)),
    (
        "scattering slabs of a wrong size",
        BAD,
        "slabs must have shape",
        lambda s: s.cache.backend.scatter(Z((1, 7), "u1"), ONE),
    ),
    (
        "scattering too few slabs",
        BAD,
        "slabs",
        lambda s: s.cache.backend.scatter(s.cache.backend.gather(ONE), TWO),
    ),
    (
        "scattering slabs of floats",
        KIND,
        "slabs must be uint8",
        lambda s: s.cache.backend.scatter(Z((1, s.cache.backend.layout.page_bytes)), ONE),
    ),
    (
        "scattering beyond the pool",
        BAD,
        "got 13",
        lambda s: s.cache.backend.scatter(s.cache.backend.gather(TWO), TWO * 12 - 11),
    ),
    ("clearing the null page", BAD, "got 0", lambda s: s.cache.backend.clear_norms(ONE - 1)),
)

MEANS = (LAYERS, HEADS, DIM)
CONSTRUCTION = cases(
    "window",
    ("a backend that is not", BAD, "auto, host or cuda", lambda s: PagedKVCache(s.config, "tpu")),
    (
        "a type to accumulate in",
        BAD,
        "float16",
        lambda s: PagedKVCache(s.config, accumulate="float16"),
    ),
    ("0 threads", BAD, "num_threads", lambda s: PagedKVCache(s.config, num_threads=0)),
    ("-1 threads", BAD, "num_threads", lambda s: PagedKVCache(s.config, num_threads=-1)),
    ("1.5 threads", KIND, "num_threads", lambda s: PagedKVCache(s.config, num_threads=1.5)),
    (
        "means of one layer",
        BAD,
        "key_means must have shape [2, 2, 16]",
        lambda s: PagedKVCache(s.config, key_means=Z(MEANS[1:], "f")),
    ),
    (
        "means of 3 heads",
        BAD,
        "means",
        lambda s: PagedKVCache(s.config, key_means=Z((2, 3, 16), "f")),
    ),
    (
        "NaN in the means",
        NonFiniteError,
        "key_means",
        lambda s: PagedKVCache(s.config, key_means=np.full(MEANS, np.nan, "f")),
    ),
    ("float64 means", KIND, "float64", lambda s: PagedKVCache(s.config, key_means=Z(MEANS))),
    (
        "a list of means",
        KIND,
        "means",
        lambda s: PagedKVCache(s.config, key_means=Z(MEANS).tolist()),
    ),
    (
        "a window of a page and a half",
        ConfigError,
        "multiple",
        lambda s: s.config.replace(window=24),
    ),
    ("a negative window", ConfigError, "window", lambda s: s.config.replace(window=-16)),
    ("more sinks than a page holds", ConfigError, "sinks", lambda s: s.config.replace(sinks=17)),
    (
        "a window without slots",
        ConfigError,
        "slots",
        lambda s: s.config.replace(num_window_slots=0),
    ),
    ("one page", ConfigError, "num_pages", lambda s: s.config.replace(num_pages=1)),
    (
        "Prod values",
        ConfigError,
        "prod",
        lambda s: s.config.replace(values=TurboQuant(estimator="prod")),
    ),
)

TABLE = [
    *TOKENS,
    *BATCHES,
    *TABLES,
    *NO_STEP,
    *IN_STEP,
    *QUERIES,
    *SLOT_MAPPINGS,
    *WHOLE_PAGES,
    *CONSTRUCTION,
]


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.what.replace(" ", "-"))
def test_bad_input_is_refused_by_type_and_changes_nothing(case):
    scene = Scene(case.scene, case.in_step)
    before = snapshot(scene.cache)
    with pytest.raises(case.error, match=re.escape(case.message)):
        case.call(scene)
    assert differences(before, snapshot(scene.cache)) == []
    scene.cache.check_integrity()
    # And it goes on as if nothing had been.
    if case.in_step:
        scene.cache.store(0, *scene.layer_0)
        scene.cache.commit()
    else:
        scene.append()


def test_the_table_is_long_and_names_each_case_once():
    names = [case.what for case in TABLE]
    assert len(names) >= 60
    twice = {name for name in names if names.count(name) > 1}
    assert all(len({c.in_step for c in TABLE if c.what == name}) == 2 for name in twice)


@pytest.mark.parametrize("kind", SCENES)
def test_the_scene_itself_accepts_good_input(kind):
    for in_step in (False, True):
        scene = Scene(kind, in_step)
        scene.attend(layer=1)
        if in_step:
            scene.cache.store(0, *scene.layer_0)
            scene.cache.commit()
        scene.append()
        scene.attend()
        assert scene.cache.stats().pages_free <= 5


@pytest.mark.parametrize("config", [None, {}, "k4v4", CacheConfig])
def test_what_is_no_configuration_is_refused_by_type(config):
    with pytest.raises(ArgumentTypeError, match="config must be a CacheConfig"):
        PagedKVCache(config)
