"""Cost of the block manager: steps of many sequences, admission, and the one-request façade.

A step appends one token to every running sequence, with its token id where prefixes are shared:
a row whose block becomes full is hashed and published. Lengths are random, so that some rows fill
a block in every step; "in phase" all rows do in the same one. If vLLM can be imported, its manager
does the same in the same process, request by request, as it is meant to be called.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq.paging import BlockHasher, PagePool, PageTables, SharingOptions
from pagedtq.serving import BlockManager, ServedRequest

PAGE, POOL = 16, 200_000
PROMPT = 1000
VOCABULARY = 30_000


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("manager", __doc__, argv)
    rng = np.random.default_rng(options.seed)
    repeats = 32 if options.quick else 192
    rows = []
    for sharing in (False, True):
        rows += [
            batched_row(num_seqs, POOL, sharing, repeats, rng) for num_seqs in (64, 256, 1024, 4096)
        ]
    rows += [batched_row(1024, pages, True, repeats, rng) for pages in (100_000, 300_000)]
    rows.append(batched_row(1024, POOL, True, repeats, rng, in_phase=True))
    rows += [
        facade_row(num_seqs, caching, repeats, rng)
        for num_seqs in (64, 1024)
        for caching in (False, True)
    ]
    rows += admission_rows(repeats, rng)
    rows += evicting_rows(repeats, rng)
    publish(
        "manager",
        rows,
        notes=(
            f"pages of {PAGE} tokens, {repeats} steps; keys are SHA-256",
            "per unit: nanoseconds per sequence (steps), request (admission) or page (take, free)",
        ),
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def lengths_of(num_seqs: int, num_pages: int, rng: np.random.Generator) -> np.ndarray:
    """Random lengths that leave every sequence room for 20 pages more."""
    longest = min(PAGE * (num_pages // num_seqs - 20), 1000)
    return rng.integers(PAGE, longest, num_seqs)


def batched_row(
    num_seqs: int,
    num_pages: int,
    sharing: bool,
    repeats: int,
    rng: np.random.Generator,
    in_phase: bool = False,
) -> dict[str, object]:
    tables = PageTables(PAGE, num_pages, sharing=SharingOptions() if sharing else None)
    lengths = lengths_of(num_seqs, num_pages, rng)
    if in_phase:
        lengths = np.full(num_seqs, 20 * PAGE)
    seq_ids = np.array([tables.open(rng.integers(0, VOCABULARY, n)) for n in lengths])
    tables.commit(tables.reserve(seq_ids, lengths))

    def steps() -> Iterator[Callable[[], object]]:
        for _ in range(repeats):
            tokens = rng.integers(0, VOCABULARY, num_seqs).astype(np.int32)
            yield partial(append, tables, seq_ids, 1, tokens)

    label = "step, in phase" if in_phase else "step"
    return line(label, "sharing" if sharing else "", num_seqs, num_pages, timed(steps()))


def facade_row(
    num_seqs: int, caching: bool, repeats: int, rng: np.random.Generator
) -> dict[str, object]:
    manager, hasher = BlockManager(POOL, PAGE, enable_caching=caching), BlockHasher(PAGE)
    requests = [
        ServedRequest(str(i), rng.integers(0, VOCABULARY, n), hasher)
        for i, n in enumerate(lengths_of(num_seqs, POOL, rng))
    ]
    for request in requests:
        admit(manager, request)

    def step() -> None:
        for request in requests:
            manager.allocate_slots(request, 1)
            request.num_computed_tokens += 1

    def steps() -> Iterator[Callable[[], object]]:
        for _ in range(repeats):
            # The request, not the manager, hashes: as in vLLM this is not part of the step.
            for request in requests:
                request.append_token(7)
            yield step

    return line("façade step", "caching" if caching else "", num_seqs, POOL, timed(steps()))


def append(
    tables: PageTables, seq_ids: np.ndarray, count: int, token_ids: np.ndarray | None = None
) -> None:
    tables.commit(tables.reserve(seq_ids, count, token_ids))


def admit(manager: BlockManager, request: ServedRequest) -> None:
    found, num_found = manager.get_computed_blocks(request)
    manager.allocate_slots(request, request.num_tokens - num_found, num_found, found)
    request.num_computed_tokens = request.num_tokens


def admission_rows(repeats: int, rng: np.random.Generator) -> list[dict[str, object]]:
    """Time prompts that share nothing, then one that was there before; hashing included."""
    manager, hasher = BlockManager(POOL, PAGE), BlockHasher(PAGE)
    prompts = rng.integers(0, VOCABULARY, (repeats, PROMPT)).astype(np.int32)
    names = map(str, itertools.count())

    def admitting(prompt: np.ndarray) -> Callable[[], object]:
        return lambda: admit(manager, ServedRequest(next(names), prompt, hasher))

    new = timed(admitting(prompt) for prompt in prompts)
    known = timed(admitting(prompts[0]) for _ in range(repeats))
    return [
        line("admission", "nothing found", 1, POOL, new),
        line("admission", "all found", 1, POOL, known),
    ]


def evicting_rows(repeats: int, rng: np.random.Generator) -> list[dict[str, object]]:
    """Time taking pages that all hold a block, which they then forget."""
    rows = []
    for count in (10, 1000):
        tables = PageTables(PAGE, 100_000, sharing=SharingOptions())
        owner = tables.open(rng.integers(0, VOCABULARY, (100_000 - 1) * PAGE))
        tables.commit(tables.reserve([owner], (100_000 - 1) * PAGE))
        tables.close(owner)
        seq_ids = tables.open_many(repeats)
        times = timed(
            partial(append, tables, seq_ids[i : i + 1], count * PAGE)
            for i in range(min(repeats, 90))
        )
        rows.append(line("take, forgetting", "sharing", count, 100_000, times))
    for count in (10, 1000):
        pool = PagePool(100_000)
        pages = rng.permutation(pool.acquire(100_000 - 1))[: 90 * count].reshape(-1, count)
        times = timed(partial(pool.release, some) for some in pages)
        rows.append(line("free", "", count, 100_000, times))
    return rows


def timed(calls: Iterator[Callable[[], object]]) -> np.ndarray:
    """Return the seconds of each call but the first two."""
    seconds = []
    for call in calls:
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return np.array(seconds[2:])


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
        "max us": float(seconds.max()) * 1e6,
        "ns per unit": float(np.median(seconds)) / units * 1e9,
    }


if __name__ == "__main__":
    main()
