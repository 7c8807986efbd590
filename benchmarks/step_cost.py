"""What one decode step costs the control plane: flat in the size of the pool, linear in sequences.

A step is one token for every running sequence; lengths are random, so that a sixty-fourth of them
begin a page. Four callers, in the same run:

* tables: ``reserve`` and ``commit`` alone
* tables, shared: the same with prefix sharing, so that full blocks are hashed and published
* scheduler: ``schedule`` and ``update`` of the reference scheduler, tokens kept, stop token watched
* scheduler, shared: the same with prefix sharing

CPU time of the process, so that other work on the machine counts little; the least and the median
of the steps. All cases of an axis take turns, so that a slow minute of the machine meets them all.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq.paging import PageTables, SharingOptions
from pagedtq.serving import GenerationRequest, Scheduler, SchedulerOptions

PAGE_SIZE = 64
POOLS = (10_000, 30_000, 100_000, 300_000)
SEQUENCES = (64, 128, 256, 512, 1024, 2048, 4096)
#: Steps that a case does in a row, and steps before them that are not timed.
TURN, WARMING = 20, 4
CALLERS = ("tables", "tables, shared", "scheduler", "scheduler, shared")


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("step_cost", __doc__, argv)
    repeats = 20 if options.quick else 200
    rows = []
    for axis, cases in (
        ("pool", [(1024, pages) for pages in POOLS]),
        ("sequences", [(count, 100_000) for count in SEQUENCES]),
    ):
        costs = costs_us(cases, repeats, options.seed)
        for (count, pages, caller), (least, median) in costs.items():
            beside = costs[count, pages, caller.replace("scheduler", "tables")][1]
            rows.append(
                {
                    "axis": axis,
                    "sequences": count,
                    "pages": pages,
                    "caller": caller,
                    "min us": least,
                    "median us": median,
                    "ns per sequence": 1e3 * median / count,
                    "x tables": median / beside,
                }
            )
    publish(
        "step_cost",
        rows,
        notes=(f"pages of {PAGE_SIZE} tokens; {repeats} steps each; no window",),
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def costs_us(
    cases: Sequence[tuple[int, int]], repeats: int, seed: int
) -> dict[tuple[int, int, str], tuple[float, float]]:
    """Return the least and the median cost of a step of every case and caller in microseconds."""
    steps = {}
    for (count, pages), caller in itertools.product(cases, CALLERS):
        lengths = np.random.default_rng(seed).integers(1, 384, count)
        sharing = SharingOptions() if "shared" in caller else None
        tables = PageTables(PAGE_SIZE, pages, sharing=sharing)
        make = running_scheduler if "scheduler" in caller else running_tables
        steps[count, pages, caller] = make(tables, lengths, repeats)
    seconds = {key: np.empty(repeats) for key in steps}
    for turn in range(0, repeats, TURN):
        for key, step in steps.items():
            for _ in range(WARMING):
                step()
            for i in range(turn, turn + TURN):
                start = time.process_time()
                step()
                seconds[key][i] = time.process_time() - start
    return {
        key: (1e6 * float(all_.min()), 1e6 * float(np.median(all_)))
        for key, all_ in seconds.items()
    }


def running_tables(tables: PageTables, lengths: np.ndarray, repeats: int) -> Callable[[], None]:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1000, length) for length in lengths.tolist()]
    seq_ids = np.array([tables.open(prompt) for prompt in prompts])
    tables.commit(tables.reserve(seq_ids, lengths))
    sampled = np.arange(lengths.size, dtype=np.int32)

    def step() -> None:
        tables.commit(tables.reserve(seq_ids, 1, sampled))

    return step


def running_scheduler(tables: PageTables, lengths: np.ndarray, repeats: int) -> Callable[[], None]:
    options = SchedulerOptions(max_running=lengths.size, step_tokens=1 << 22, admission="chunk")
    scheduler = Scheduler(tables, options)
    rng = np.random.default_rng(0)
    for at, length in enumerate(lengths.tolist()):
        request = GenerationRequest(
            request_id=str(at),
            prompt=rng.integers(0, 1000, length),
            max_tokens=2 * repeats,
            stop_token_ids=(1 << 20,),
        )
        scheduler.add(request)
    sampled = np.arange(lengths.size, dtype=np.int32)

    def step() -> None:
        scheduler.schedule()
        scheduler.update(sampled)

    step()
    assert scheduler.num_running == lengths.size and not scheduler.num_waiting
    return step


if __name__ == "__main__":
    main()
