"""Cost of appending one token to single-sequence caches of 1k to 128k tokens.

Caches of all lengths stand side by side and take turns, so that a slow moment of the machine hits
all alike. A push is `QuantizedKVCache.push_token` (checked, encoded, written); `move` is the copy
into a pool of twice the size that happens once per doubling, also spread over the tokens that paid
for it. Bar: the slowest length costs at most 1.25 times the fastest one.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq.compat.growing import PAGE_SIZE
from pagedtq.compat.turboquant import KVCacheConfig, QuantizedKVCache, QuantStrategy

DIM = 128
BAR = 1.25
KINDS = {
    "mse": {"key_strategy": QuantStrategy.MSE},
    "prod": {"key_strategy": QuantStrategy.PROD},
    "mse, full": {"key_strategy": QuantStrategy.MSE},
}


def filled(kind: str, length: int, rows: np.ndarray) -> QuantizedKVCache:
    """Build a cache of so many tokens; "full" ones drop a token per push."""
    limit = length if kind.endswith("full") else 0
    cache = QuantizedKVCache(KVCacheConfig(DIM, max_tokens=limit, **KINDS[kind]))
    for done in range(0, length, len(rows)):
        part = rows[: length - done]
        cache.append(part, part)
    return cache


def pushes(cache: QuantizedKVCache, rows: np.ndarray) -> list[float]:
    """Return the seconds of one push per row."""
    seconds = []
    for row in rows:
        start = time.perf_counter()
        cache.push_token(row, row)
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(
    kind: str, lengths: Sequence[int], rounds: int, rows: np.ndarray
) -> list[dict[str, Any]]:
    """Measure one kind of cache at all lengths."""
    caches = {length: filled(kind, length, rows) for length in lengths}
    medians: dict[int, list[float]] = {length: [] for length in lengths}
    for index in range(rounds + 1):
        for length, cache in caches.items():
            median = statistics.median(pushes(cache, rows[:64]))
            if index:  # the first round warms up
                medians[length].append(median)
    best = {length: min(times) for length, times in medians.items()}
    lines = []
    for length, cache in caches.items():
        beyond = PAGE_SIZE * (cache._tokens._cache.tables.pool.num_free + 1)
        start = time.perf_counter()
        cache._tokens.make_room(beyond)
        move = time.perf_counter() - start
        lines.append(
            {
                "keys": kind,
                "tokens": length,
                "push us (best)": 1e6 * best[length],
                "push us (median)": 1e6 * statistics.median(medians[length]),
                "move ms": 1e3 * move,
                "move us per token": 1e6 * move / length,
                "against shortest": best[length] / best[lengths[0]],
            }
        )
    spread = max(best.values()) / min(best.values())
    for line in lines:
        line["bar"] = "ok" if spread <= BAR else "MISSED"
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if the bar was missed in a full run."""
    options = arguments("compat_append", __doc__, argv)
    lengths = [1 << k for k in ((10, 12) if options.quick else range(10, 18))]
    rows = np.random.default_rng(options.seed).standard_normal((1024, DIM))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table = []
    for kind in KINDS:
        table += measure(kind, lengths, 2 if options.quick else 9, rows)
        print(f"{kind} done", file=sys.stderr)
    publish(
        "compat_append",
        table,
        notes=[
            f"One head, d = {DIM}, 4 bits, pages of 64 tokens. Rounds of 64 pushes at every "
            "length; best and median are over the rounds' medians.",
            "full: max_tokens equals the length, every push drops the oldest token.",
            f"Bar: slowest length at most {BAR} times the fastest (best).",
        ],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )
    missed = any(line["bar"] != "ok" for line in table)
    return 1 if missed and not options.quick else 0


if __name__ == "__main__":
    raise SystemExit(main())
