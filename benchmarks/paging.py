"""Cost of the control plane: decode steps, taking and returning pages.

A step is ``reserve`` and ``commit`` of one token for every sequence of a batch; no per-token array
is made, as in a simulation. Lengths are random, so that every step crosses some page boundaries.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq.paging import PagePool, PageTables

PAGE_SIZE = 64
WARM_UP = 5
POOLS = (10_000, 100_000, 300_000)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("paging", __doc__, argv)
    repeats = 30 if options.quick else 300
    rows = []
    for window in (0, PAGE_SIZE):
        for num_seqs in (64, 256, 1024, 4096):
            # A pool must hold what so many sequences grow to.
            for num_pages in (pages for pages in POOLS if pages >= 8 * num_seqs):
                rows.append(step_row(num_seqs, num_pages, window, repeats, options.seed))
    rows += [forked_row(window, repeats) for window in (0, PAGE_SIZE)]
    for count in (10, 100, 1000):
        for num_pages in POOLS:
            rows += page_rows(count, num_pages, repeats, options.seed)
    notes = (
        f"pages of {PAGE_SIZE} tokens; windows of one page with 4 sinks; {repeats} repeats of each",
        "per unit: nanoseconds per sequence (step) or per page (get, free)",
    )
    publish(
        "paging",
        rows,
        notes=notes,
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def step_row(
    num_seqs: int, num_pages: int, window: int, repeats: int, seed: int
) -> dict[str, object]:
    tables, seq_ids = filled(num_seqs, num_pages, window, seed)
    times = timed(lambda: tables.commit(tables.reserve(seq_ids, 1)), repeats)
    return line("step", f"window {window}", num_seqs, num_pages, times)


def forked_row(window: int, repeats: int) -> dict[str, object]:
    """Time steps of sequences that share their first pages, so that sharing is looked at."""
    tables = PageTables(PAGE_SIZE, 100_000, window, 4, 2048)
    parent = tables.open()
    tables.commit(tables.reserve([parent], 2 * PAGE_SIZE))
    seq_ids = np.array([tables.fork(parent) for _ in range(1024)])
    tables.commit(tables.reserve(seq_ids, 1))
    times = timed(lambda: tables.commit(tables.reserve(seq_ids, 1)), repeats)
    return line("step, forks", f"window {window}", 1024, 100_000, times)


def page_rows(count: int, num_pages: int, repeats: int, seed: int) -> list[dict[str, object]]:
    pool = PagePool(num_pages)
    # A used pool: the free queue is in random order, half of the pages have owners.
    pages = np.random.default_rng(seed).permutation(pool.acquire(num_pages - 1))
    pool.release(pages[: num_pages // 2])
    seconds = np.empty((2, repeats + WARM_UP))
    for i in range(repeats + WARM_UP):
        start = time.perf_counter()
        taken = pool.acquire(count)
        middle = time.perf_counter()
        pool.release(taken)
        seconds[:, i] = middle - start, time.perf_counter() - middle
    return [
        line(operation, "", count, num_pages, of_one[WARM_UP:])
        for operation, of_one in zip(("get", "free"), seconds, strict=True)
    ]


def filled(num_seqs: int, num_pages: int, window: int, seed: int) -> tuple[PageTables, np.ndarray]:
    """Tables whose sequences have random lengths that leave room for the steps to come."""
    tables = PageTables(PAGE_SIZE, num_pages, window, 4, num_seqs)
    seq_ids = tables.open_many(num_seqs)
    # Pages left for growth: the steps begin at most 6 blocks of each sequence.
    longest = (num_pages - 1) * PAGE_SIZE // num_seqs - 6 * PAGE_SIZE
    lengths = np.random.default_rng(seed).integers(1, min(longest, 4096) + 1, num_seqs)
    tables.commit(tables.reserve(seq_ids, lengths))
    return tables, seq_ids


def timed(call: Callable[[], object], repeats: int) -> np.ndarray:
    """Return the seconds of each call."""
    seconds = np.empty(repeats + WARM_UP)
    for i in range(seconds.size):
        start = time.perf_counter()
        call()
        seconds[i] = time.perf_counter() - start
    return seconds[WARM_UP:]


def line(
    operation: str, variant: str, units: int, num_pages: int, seconds: np.ndarray
) -> dict[str, object]:
    return {
        "operation": operation,
        "variant": variant,
        "units": units,
        "pages": num_pages,
        "min us": float(seconds.min()) * 1e6,
        "median us": float(np.median(seconds)) * 1e6,
        "mean us": float(seconds.mean()) * 1e6,
        "ns per unit": float(np.median(seconds)) / units * 1e9,
    }


if __name__ == "__main__":
    main()
