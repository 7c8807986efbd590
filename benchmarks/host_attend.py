"""Host attention over coded pages, against PyTorch's attention on uncompressed keys and values.

One query token, 8 KV heads, group 4, head_dim 128, two threads. Calls are timed in turn in every
round, and ratios are taken round by round, so that a machine that changes its speed cannot change
them. PyTorch is optional (the ``bench`` extra): without it only our rows are printed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq import PagedKVCache, preset

HEADS, GROUP, DIM = 8, 4, 128
THREADS = 2
_REPEATS = 3


def build(name: str, tokens: int, window: int | None, seed: int) -> tuple[PagedKVCache, int]:
    """Return a cache of one layer that holds one random sequence."""
    rng = np.random.default_rng(seed)
    config = preset(
        name,
        num_layers=1,
        num_kv_heads=HEADS,
        head_dim=DIM,
        num_pages=tokens // 64 + 3,
        window=window,
    )
    cache = PagedKVCache(config, num_threads=THREADS)
    seq = cache.open()
    keys, values = rng.standard_normal((2, 1, tokens, HEADS, DIM)).astype(np.float32)
    cache.append(seq, keys, values)
    return cache, seq


def peers(tokens: int, query: np.ndarray, seed: int) -> dict[str, Callable[[], Any]]:
    """Return PyTorch's attention in the call forms worth comparing with, if it is installed."""
    try:
        import torch
    except ImportError:
        return {}
    torch.set_num_threads(THREADS)
    torch.manual_seed(seed)
    calls: dict[str, Callable[[], Any]] = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        keys = torch.randn(1, HEADS, tokens, DIM).to(dtype)
        values = torch.randn(1, HEADS, tokens, DIM).to(dtype)
        heads = torch.from_numpy(query).to(dtype)[:, :, None]
        rows = heads.view(1, HEADS, GROUP, DIM)
        attend = torch.nn.functional.scaled_dot_product_attention

        def grouped(q=heads, k=keys, v=values, attend=attend) -> Any:
            return attend(q, k, v, enable_gqa=True)

        def as_rows(q=rows, k=keys, v=values, attend=attend) -> Any:
            return attend(q, k, v)

        calls[f"torch {name}, 32 heads, enable_gqa"] = grouped
        calls[f"torch {name}, group as query rows"] = as_rows
    return calls


def rounds(calls: dict[str, Callable[[], Any]], count: int) -> dict[str, list[float]]:
    """Time every call in every round, in seconds: the median of a few repeats in a row.

    The first repeat is not counted: it pays for what the call before left behind, cold caches and
    worker threads that still spin.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(count):
        for name, call in calls.items():
            call()
            repeats = []
            for _ in range(_REPEATS):
                begin = time.perf_counter()
                call()
                repeats.append(time.perf_counter() - begin)
            times[name].append(statistics.median(repeats))
    return times


def rows_of(
    times: dict[str, list[float]], tokens: int, base: str, bytes_per: dict[str, float]
) -> list[dict[str, Any]]:
    """Summarise one set of rounds; ratios are medians over rounds."""
    rows = []
    for name, seconds in times.items():
        row: dict[str, Any] = {
            "what": name,
            "tokens": tokens,
            "ms median": 1e3 * statistics.median(seconds),
            "ms best": 1e3 * min(seconds),
            "M token-heads/s": tokens * HEADS / statistics.median(seconds) / 1e6,
            "bytes per token-head": bytes_per.get(name),
            "speed vs torch bf16 gqa": None,
        }
        if base in times:
            ratio = [b / s for b, s in zip(times[base], seconds)]
            row["speed vs torch bf16 gqa"] = statistics.median(ratio)
        rows.append(row)
    return rows


def main() -> None:
    options = arguments("host_attend", __doc__)
    tokens, long = (1024, 2048) if options.quick else (8192, 32768)
    count = 3 if options.quick else 20
    query = np.random.default_rng(options.seed).standard_normal((1, HEADS * GROUP, DIM))
    query = query.astype(np.float32)
    calls = peers(tokens, query, options.seed)
    sizes: dict[str, float] = {name: 2 * DIM * (2 if "bf" in name else 4) for name in calls}
    for name in ("k4v4", "k3v3", "k2v2", "exact"):
        cache, seq = build(name, tokens, 0, options.seed)
        label = f"pagedtq {name}, window off"
        calls[label] = lambda cache=cache, seq=seq: cache.attend(0, query, seq)
        sizes[label] = cache.backend.layout.token_bytes / HEADS
    base = "torch bfloat16, 32 heads, enable_gqa"
    rows = rows_of(rounds(calls, count), tokens, base, sizes)

    pair = {}
    for label, window in (("window off", 0), ("window on", None)):
        cache, seq = build("k4v4", long, window, options.seed)
        pair[f"pagedtq k4v4, {label}"] = lambda cache=cache, seq=seq: cache.attend(0, query, seq)
    times = rounds(pair, count)
    rows += rows_of(times, long, base, {})
    off, on = times.values()
    cost = statistics.median([b / a for a, b in zip(off, on)]) - 1
    publish(
        "host_attend",
        rows,
        notes=[f"window on against off at {long} tokens: {cost:+.1%} (median over rounds)"],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
