"""Saving and loading a snapshot, against a plain copy of the same file with fsync.

A cache of 1 GiB of pages (64 MiB with ``--quick``) with sequences of many lengths is saved, loaded,
and its file copied, all on the same disk in the same run, several times in turn; each file is
removed before it is written again. Saving and copying end with the data on disk. The copy reads and
writes pieces of 8 MiB. Loading reads the file from the page cache, as the copy does.
"""

from __future__ import annotations

import functools
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq import CacheConfig, PagedKVCache, preset
from pagedtq.wire import load_cache, save_cache

BAR = 0.7


def filled_cache(config: CacheConfig, seed: int) -> PagedKVCache:
    """Return a cache whose pages are all in use, with random bytes in place of codes.

    Encoding a gigabyte would take longer than everything that is measured; what a page holds makes
    no difference to how it is saved.
    """
    cache = PagedKVCache(config)
    rng = np.random.default_rng(seed)
    lengths = []
    while sum(-(-n // config.page_size) for n in lengths) < config.num_pages - 1:
        lengths.append(int(rng.integers(1, 40 * config.page_size)))
    over = sum(-(-n // config.page_size) for n in lengths) - (config.num_pages - 1)
    lengths[-1] -= over * config.page_size
    lengths = [length for length in lengths if length > 0]
    tables = cache.tables
    ids = tables.open_many(len(lengths))
    # Sequences grow side by side, so that the pages of one do not lie side by side.
    left = np.array(lengths)
    while left.any():
        step = np.minimum(left, config.page_size)
        tables.commit(tables.reserve(ids, step))
        left -= step
    block = np.frombuffer(rng.bytes(1 << 20), np.uint8)
    pool = cache.backend.pool
    for begin in range(0, pool.size, block.size):
        pool[begin : begin + block.size] = block[: pool.size - begin]
    return cache


def copy(source: Path, target: Path) -> None:
    """Copy a file and force it to disk."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        shutil.copyfileobj(reader, writer, 8 << 20)
        writer.flush()
        os.fsync(writer.fileno())


def measure(
    calls: dict[str, Callable[[], Any]], written: dict[str, Path], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Time the calls in turn, wall and CPU; neither the first round nor removing old files."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            if name in written:
                written[name].unlink(missing_ok=True)
            begin, cpu = time.perf_counter(), time.process_time()
            result = call()
            seconds = time.perf_counter() - begin, time.process_time() - cpu
            # Not part of the time: giving a gigabyte back.
            del result
            if index:
                times[name].append(seconds)
    return times


def main() -> None:
    options = arguments("snapshot", __doc__)
    size = (64 << 20) if options.quick else (1 << 30)
    shape = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "num_window_slots": 256}
    rows = []
    for order in ("layer_major", "page_major"):
        small = preset("k4v4", num_pages=2, pool_order=order, window=0, **shape)
        page_bytes = PagedKVCache(small).backend.layout.page_bytes
        cache = filled_cache(small.replace(num_pages=size // page_bytes + 2), options.seed)
        with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
            saved, copied = Path(folder, "saved"), Path(folder, "copied")

            calls: dict[str, Callable[[], Any]] = {
                "save": functools.partial(save_cache, cache, saved),
                "copy with fsync": functools.partial(copy, saved, copied),
                "load": functools.partial(load_cache, saved),
            }
            written = {"save": saved, "copy with fsync": copied}
            times = measure(calls, written, 2 if options.quick else 5)
            file_bytes = saved.stat().st_size
        copies = min(wall for wall, _ in times["copy with fsync"])
        for name, measured in times.items():
            walls = [wall for wall, _ in measured]
            rows.append(
                {
                    "pool": order,
                    "what": name,
                    "MiB": file_bytes / (1 << 20),
                    "s median": statistics.median(walls),
                    "s best": min(walls),
                    "CPU s best": min(cpu for _, cpu in measured),
                    "MiB/s best": file_bytes / (1 << 20) / min(walls),
                    "speed vs copy": copies / min(walls),
                    "bar": None if name == "copy with fsync" else BAR,
                }
            )
        del cache, calls
    notes = (
        "k4v4, 32 layers, 8 KV heads of 128, pages of 64 tokens; pages of a sequence are scattered",
        "speed vs copy: best time of the copy over the best time of this",
    )
    publish(
        "snapshot",
        rows,
        notes=notes,
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
