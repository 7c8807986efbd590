"""What a device must be sent of the page tables each step: all of them, or what changed.

Sequences of 2048 blocks decode one token per step at random phases, so that one in sixteen takes a
new page; the pool is that of a long-context server. "Whole" is `PageTables.block_table` and
`PageTables.csr`, "changed" is `TableExport`. Process CPU time; bytes are those for the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq.paging import PageTables, TableExport

PAGE = 16


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("table_export", __doc__, argv)
    rng = np.random.default_rng(options.seed)
    shapes = [(64, 128)] if options.quick else [(64, 2048), (256, 2048), (1024, 128), (1024, 2048)]
    rounds = 12 if options.quick else 48
    publish(
        "table_export",
        [row for shape in shapes for row in rows_of(*shape, rounds, rng)],
        notes=(
            f"pages of {PAGE} tokens, {rounds} steps, minimum and median of process CPU time",
            "bytes: per step, the mean; changed entries are an int64 index and an int32 page",
        ),
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def rows_of(
    num_seqs: int, num_blocks: int, rounds: int, rng: np.random.Generator
) -> list[dict[str, object]]:
    tables = PageTables(PAGE, num_seqs * (num_blocks + 1) + 1)
    ids = tables.open_many(num_seqs)
    room = rounds + PAGE
    tables.commit(
        tables.reserve(ids, num_blocks * PAGE - rng.integers(room, room + PAGE, num_seqs))
    )
    export = TableExport(tables, num_seqs, num_blocks)
    export.update(ids)
    export.csr()
    calls: dict[str, Callable[[], object]] = {
        "dense, whole": lambda: tables.block_table(ids),
        "dense, changed": lambda: export.update(ids),
        "compressed rows, whole": lambda: tables.csr(ids),
        "compressed rows, changed": export.csr,
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    sent: dict[str, list[int]] = {name: [] for name in calls}
    for _ in range(rounds):
        tables.commit(tables.reserve(ids, 1))
        for name, call in calls.items():
            start = time.process_time_ns()
            result = call()
            seconds[name].append((time.process_time_ns() - start) * 1e-9)
            sent[name].append(bytes_of(result))
    whole = {"dense": seconds["dense, whole"], "compressed rows": seconds["compressed rows, whole"]}
    return [
        {
            "what": name,
            "sequences": num_seqs,
            "blocks": num_blocks,
            "min us": min(times) * 1e6,
            "median us": float(np.median(times)) * 1e6,
            "times faster": float(np.median(whole[name.split(",")[0]]) / np.median(times)),
            "bytes": float(np.mean(sent[name])),
        }
        for name, times in seconds.items()
    ]


def bytes_of(result: object) -> int:
    """Count what a device is sent of a result."""
    if isinstance(result, np.ndarray):
        return result.nbytes
    indices, values = getattr(result, "indices", None), getattr(result, "values", None)
    if indices is not None and values is not None:
        return int(indices.nbytes + values.nbytes)
    return sum(array.nbytes for array in result[:3])  # type: ignore[index]


if __name__ == "__main__":
    main()
