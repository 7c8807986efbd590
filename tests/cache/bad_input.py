"""What every table of bad input needs: a cache with something of everything, and the claim."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from pagedtq import Exact, PagedKVCache, TurboQuant
from pagedtq.errors import ArgumentError, ArgumentTypeError, PagedTQError
from tests.cache.bank import HEADS, LAYERS, differences, make_config, snapshot

#: Short for what the tables say most.
Z = np.zeros
BAD, KIND = ArgumentError, ArgumentTypeError

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
    """A call that is refused with an error whose message holds some words."""

    what: str
    error: type[PagedTQError]
    message: str
    call: Callable[[Scene], Any]
    scene: str = "window"
    in_step: bool = False


def cases(scene: str, *rows: tuple, in_step: bool = False) -> list[Case]:
    """Make rows ``what, error, message, call`` into cases of a scene."""
    names = [row[0] for row in rows]
    assert len(set(names)) == len(names), names
    return [Case(*row, scene, in_step) for row in rows]


def named(case: Case) -> str:
    """Name a case in a test's id."""
    return case.what.replace(" ", "-")


def refuses(case: Case) -> None:
    """Check that a case has its error, that no byte changed, and that work goes on."""
    scene = Scene(case.scene, case.in_step)
    before = snapshot(scene.cache)
    with pytest.raises(case.error, match=re.escape(case.message)):
        case.call(scene)
    assert differences(before, snapshot(scene.cache)) == []
    scene.cache.check_integrity()
    if case.in_step:
        scene.cache.store(0, *scene.layer_0)
        scene.cache.commit()
    else:
        scene.append()
