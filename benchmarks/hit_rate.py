"""Hit rate of prefix sharing under the scheduler: the Mooncake conversation trace, by memory.

Requests arrive at the trace's own times and run together, as many as fit, on the cost model's
clock: llama-3.1-8b, pages of 64 tokens, steps of 8192 tokens. Each format gets the same memory, so
that smaller tokens mean more pages. The trace names the content of prompts only: what was generated
is not found again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import arguments, publish
from pagedtq.models import MODELS
from pagedtq.serving import SchedulerOptions
from pagedtq.sim.sweep import sweep_budgets
from pagedtq.sim.traces import read_mooncake
from pagedtq.sizing import Format

TRACES = Path(os.environ.get("PAGEDTQ_TRACES", Path(__file__).parents[2] / "shared" / "traces"))
NAME = "mooncake_conversation_trace.jsonl"
FORMATS = ("fp16", "fp8", "k4v4", "k2v2")
BUDGETS = (64, 128, 256, 512, 1024, 2048, 4096)


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("hit_rate", __doc__, argv)
    path = TRACES / NAME
    if not path.is_file():
        raise SystemExit(f"{path} is missing: fetch it from kvcache-ai/Mooncake (FAST25-release)")
    workload = read_mooncake(path)
    budgets = BUDGETS
    if options.quick:
        workload, budgets = workload.first(500), BUDGETS[:2]
    report = sweep_budgets(
        workload,
        [Format.parse(name) for name in FORMATS],
        [gib << 30 for gib in budgets],
        MODELS["llama-3.1-8b"],
        options=SchedulerOptions(step_tokens=8192),
    )
    rows = [
        {
            "format": point.name,
            "GiB": point.budget_bytes >> 30,
            "pages": point.num_pages,
            "found %": 100 * point.hit_rate,
            "first token p50 s": point.first_token_seconds["p50"],
            "first token p99 s": point.first_token_seconds["p99"],
            "preempted": point.preemptions,
            "rejected": point.requests_rejected,
            "wall s": point.wall_seconds,
        }
        for point in report.points
    ]
    publish(
        "hit_rate",
        rows,
        notes=[
            f"{NAME}, {len(workload)} requests; an endless cache that serves one request after "
            f"the other finds {100 * report.ideal_hit_rate:.2f} %",
            "found: prompt tokens that lie in pages when a request is first admitted",
            "first token: by the cost model, queueing included; the trace keeps one such machine "
            "about busy",
        ],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
