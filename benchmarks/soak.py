"""The long soaks of the tests, and what happened in them.

* tables: random operations on `PageTables` of 1000 pages, 500 pages of the host and 64 window slots
  under heavy preemption, while one allocation of 97 fails; a failed call must have changed nothing.
  Every page carries what its tokens stand for.
* scheduler: steps of `Scheduler` on 1000 pages with up to 1024 requests of up to 5000 tokens to
  generate, which are read through the page tables; by priority with recomputation, and in order of
  arrival with swaps.

``pytest -m soak`` runs the same. Whatever is wrong is an exception, and no result is written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from benchmarks.report import arguments, publish
from tests.paging.faults import Faults
from tests.paging.soak import Soak
from tests.serving.scheduler_soak import SchedulerSoak
from tests.serving.test_scheduler_soak import RULES


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("soak", __doc__, argv)
    operations, steps = (4_000, 300) if options.quick else (1_000_000, 20_000)
    seed = 2026 + options.seed
    begin = time.process_time()
    with pytest.MonkeyPatch.context() as patch:
        faults = Faults(patch)
        faults.arm(97, repeats=True)
        tables = Soak(seed, faults=faults)
        tables.run(operations, check_every=2_000)
    rows = _rows("tables", operations, time.process_time() - begin, tables.done)
    for rules in RULES:
        begin = time.process_time()
        run = SchedulerSoak(seed, **rules)
        run.run(steps, check_every=200)
        name = "scheduler, " + ", ".join(rules.values())
        rows += _rows(name, steps, time.process_time() - begin, run.done)
    publish(
        "soak",
        rows,
        notes=(
            "all invariants every 2000 operations and every 200 steps, a sequence read every 20 "
            "operations, every generated token compared, at the end nothing held: no failure",
        ),
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def _rows(run: str, count: int, seconds: float, done: Mapping[str, int]) -> list[dict[str, Any]]:
    figures = {
        "operations or steps asked for": count,
        "CPU s": seconds,
        **dict(sorted(done.items())),
    }
    return [{"run": run, "what": what, "value": value} for what, value in figures.items()]


if __name__ == "__main__":
    main()
