"""Saving and loading a snapshot, against a plain copy of the same file with fsync.

A cache of 1 GiB of pages (64 MiB with ``--quick``) with sequences of many lengths is saved, its
file copied, and loaded, all on the same disk in the same run, in turn for several rounds.

What is compared: the copy reads the file and writes another one, 8 MiB at a time, and ends with
fsync; a save ends with the data and the name on disk, too; a load ends with a cache that is ready
to use and writes nothing to disk. Copy and load both read a file that was just written, from the
page cache; copy and save both write a new file. All three take a gigabyte of memory from the
system, and what each made in the round before is given back right before. Each round gives one
ratio to its own copy, and the median of these is what the bar is held against, because a shared
disk or machine is slow for a while and then fast again.
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
    """Time the calls in turn, wall and CPU; neither the first round nor removing what is old."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    results: dict[str, Any] = {}
    for index in range(rounds + 1):
        for name, call in calls.items():
            # The memory of the round before is given back right before it is taken again, whether
            # files or a cache were in it: a virtual machine takes back what is free for long.
            results.pop(name, None)
            if name in written:
                written[name].unlink(missing_ok=True)
            begin, cpu = time.perf_counter(), time.process_time()
            results[name] = call()
            seconds = time.perf_counter() - begin, time.process_time() - cpu
            if index:
                times[name].append(seconds)
    return times


def main() -> None:
    options = arguments("snapshot", __doc__)
    size = (64 << 20) if options.quick else (1 << 30)
    shape = {"num_layers": 32, "num_kv_heads": 8, "head_dim": 128, "num_window_slots": 256}
    rounds = 2 if options.quick else 9
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
            times = measure(calls, written, rounds)
            file_bytes = saved.stat().st_size
        copies = [wall for wall, _ in times["copy with fsync"]]
        for name, measured in times.items():
            walls = [wall for wall, _ in measured]
            ratios = [copied / wall for copied, wall in zip(copies, walls, strict=True)]
            rows.append(
                {
                    "pool": order,
                    "what": name,
                    "MiB": file_bytes / (1 << 20),
                    "s median": statistics.median(walls),
                    "s best": min(walls),
                    "CPU s best": min(cpu for _, cpu in measured),
                    "MiB/s best": file_bytes / (1 << 20) / min(walls),
                    "speed vs copy": statistics.median(ratios),
                    "best vs best": min(copies) / min(walls),
                    "bar": None if name == "copy with fsync" else BAR,
                }
            )
        del cache, calls
    notes = (
        "k4v4, 32 layers, 8 KV heads of 128, pages of 64 tokens; pages of a sequence are scattered",
        f"speed vs copy: median over {rounds} rounds of the copy's time over this one's, "
        "the copy of the same round; best vs best: of their shortest times",
        f"load average over 5 minutes at the end: {os.getloadavg()[1]:.1f}",
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
