"""Small caches of one page size, and what the tests of steps do with them."""

from __future__ import annotations

import numpy as np

from pagedtq import PagedKVCache
from tests.cache.bank import HEADS, LAYERS, draw_tokens, make_config
from tests.cache.model import CheckedCache

P = 16
WINDOWS = [0, P, 2 * P]
FORMATS = ["k4v4", "prod4v4", "mixed"]
HISTORIES = [(0, 1), (5, 1), (5, P), (P, 1), (P - 1, 3), (2 * P + 3, P - 3), (2 * P + 3, 3 * P + 5)]


def build(name="k4v4", window=P, **fields):
    fields = {"num_pages": 40, "num_window_slots": 4, "page_size": P} | fields
    return PagedKVCache(make_config(name, window=window, **fields), num_threads=1, debug=True)


def tokens(count, seed=0):
    return draw_tokens(np.random.default_rng(seed), count, make_config("k4v4", num_pages=2))


def grow(kv_cache, seq_id, count, seed=0):
    kv_cache.append(seq_id, *tokens(count, seed))


def queries(count=1, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 2 * HEADS, 16)).astype(np.float32)


def dense(kv_cache, seq_id):
    return [kv_cache.load(layer, seq_id) for layer in range(LAYERS)]


def same_tokens(left, right):
    return all(
        np.array_equal(a, b) for one, two in zip(left, right) for a, b in zip(one, two, strict=True)
    )


def checked(name="k4v4", window=P, **options):
    return CheckedCache(name, "f16", P, window, num_pages=40, **options)
