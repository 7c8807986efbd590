"""CPU time to simulate the whole Azure conversation hour: control plane and cost model, no bytes.

The trace is read from ../shared/traces or the folder PAGEDTQ_TRACES; without it, the generated
workload of the same size stands in. Groups of rows:

* formats: llama-3.1-8b, 4 GiB, arrivals at 100 requests per second, each default format
* own arrivals, all at once: the trace's own times, and all requests at the beginning
* single steps: as the first row, but one step at a time; the price of a step of the control plane
* recompute, swap: 4000 requests in 2 GiB without a watermark, preempted sequences computed again or
  swapped over a link of 50 GB/s, with copies that overlap steps and with steps that wait
* pool size: the same run in pools of 4 000 to 300 000 pages, to see that a step's price is flat
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq.models import MODELS
from pagedtq.serving import SchedulerOptions
from pagedtq.sim.comparison import DEFAULT_FORMATS
from pagedtq.sim.cost_model import CostModel, Hardware
from pagedtq.sim.generator import azure_conversation
from pagedtq.sim.simulator import Simulator
from pagedtq.sim.traces import read_azure
from pagedtq.sim.workload import Workload
from pagedtq.sizing import Capacity, Format, plan_capacity

MODEL = MODELS["llama-3.1-8b"]
BUDGET = 4 << 30
TRACE = "AzureLLMInferenceTrace_conv_2023.csv"


def load_workload(seed: int) -> Workload:
    here = Path(__file__).parents[2] / "shared" / "traces"
    path = Path(os.environ.get("PAGEDTQ_TRACES", here)) / TRACE
    return read_azure(path) if path.is_file() else azure_conversation(seed=seed)


def measure(
    case: str,
    workload: Workload,
    name: str,
    capacity: Capacity | None = None,
    fast_forward: bool = True,
    budget: int = BUDGET,
    overlap: bool = True,
    **options: Any,
) -> dict[str, Any]:
    storage = Format.parse(name)
    config = storage.config(MODEL)
    if capacity is None:
        capacity = plan_capacity(
            config,
            budget,
            tokens_per_sequence=workload.mean_resident_tokens,
            byte_share=storage.byte_share,
        )
    cost = CostModel(MODEL, config, Hardware(), storage.byte_share)
    start = time.process_time()
    chosen = SchedulerOptions(**options)
    simulator = Simulator(
        workload,
        config,
        capacity,
        cost,
        chosen,
        num_host_pages=0 if chosen.preemption == "recompute" else capacity.num_pages,
        overlap_swaps=overlap,
        fast_forward=fast_forward,
    )
    outcome = simulator.run()
    seconds = time.process_time() - start
    log = outcome.log
    served = np.isfinite(outcome.finish)
    assert (outcome.generated == workload.output_tokens)[served].all()
    assert simulator.tables.pool.num_used == 0
    return {
        "case": case,
        "format": name,
        "pages": capacity.num_pages,
        "requests": int(served.sum()),
        "CPU s": seconds,
        "steps": len(log),
        "us/step": 1e6 * seconds / len(log),
        "peak pages": int(log.pages.max()),
        "peak running": int(log.running.max()),
        "preemptions": int(outcome.preemptions.sum()),
        "swapped": outcome.swaps.sequences,
        "computed again": int(log.prefilled.sum() - workload.prompt_tokens[served].sum()),
        "link s": outcome.swaps.link_seconds,
        "simulated s": float(log.end[-1]),
    }


def main() -> None:
    args = arguments("simulate", __doc__)
    workload = load_workload(args.seed)
    if args.quick:
        workload = workload.first(1000)
    fast, once = workload.at_rate(100), workload.at_rate(float("inf"))
    rows = [measure("formats", fast, name) for name in DEFAULT_FORMATS]
    rows += [measure("own arrivals", workload, name) for name in ("fp16", "k4v4")]
    rows += [measure("all at once", once, name) for name in ("fp16", "k4v4")]
    rows.append(measure("single steps", fast, "fp16", fast_forward=False))
    for name in ("fp16", "k4v4"):
        few = fast.first(min(4000, len(fast)))
        for case, preemption, overlap in (
            ("recompute", "recompute", True),
            ("swap", "swap", True),
            ("swap, steps wait", "swap", False),
        ):
            options = {"preemption": preemption, "watermark": 0.0}
            rows.append(measure(case, few, name, budget=2 << 30, overlap=overlap, **options))
    for pages in (4_000, 40_000, 300_000):
        pool = Capacity(
            num_pages=pages, num_window_slots=0, page_size=64, page_bytes=1, window_slot_bytes=0
        )
        row = measure("pool size", once, "k4v4-w0", pool, fast_forward=False, max_running=150)
        rows.append(row)
    publish(
        "simulate",
        rows,
        notes=[
            f"{workload.name}; {MODEL.name}, pages of 64 tokens, 4 GiB except for 'pool size' and "
            "preemption ('recompute', 'swap': 2 GiB).",
            "CPU time of the process. Runs of decode steps are taken at once except in "
            "'single steps' and 'pool size', with the same result.",
        ],
        json_path=args.json,
        seed=args.seed,
        quick=args.quick,
    )


if __name__ == "__main__":
    main()
