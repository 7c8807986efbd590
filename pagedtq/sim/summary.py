"""From the log of a run to the figures of a report."""

from __future__ import annotations

import msgspec
import numpy as np

from .. import __version__
from ..config import PAGE_SIZES, CacheConfig
from ..models import ModelShape
from ..serving.generation import SchedulerOptions
from ..sizing import Capacity, Format
from .cost_model import CostModel, Hardware
from .report import (
    SCHEMA,
    FormatReport,
    SimulationReport,
    SwapReport,
    Timeline,
    WorkloadSummary,
)
from .step_log import Outcome
from .workload import Workload, length_statistics, page_utilisation

#: Points of a timeline.
NUM_BINS = 240


def summarise_workload(workload: Workload) -> WorkloadSummary:
    """Return what a report says about its requests."""
    sizes = (8, *PAGE_SIZES, 512)
    return WorkloadSummary(
        name=workload.name,
        num_requests=len(workload),
        requests_per_second=workload.rate if np.isfinite(workload.rate) else None,
        prompt_tokens=length_statistics(workload.prompt_tokens),
        output_tokens=length_statistics(workload.output_tokens),
        waste_by_page_size={str(size): 1 - page_utilisation(workload, size) for size in sizes},
    )


def summarise_format(
    storage: Format,
    config: CacheConfig,
    capacity: Capacity,
    cost: CostModel,
    workload: Workload,
    outcome: Outcome,
    num_host_pages: int,
    wall_seconds: float,
) -> FormatReport:
    """Return what a report says about one run; ``relative_throughput`` is set by ``compare``."""
    log = outcome.log
    served = np.isfinite(outcome.finish)
    output_tokens = int(outcome.generated[served].sum())
    duration = float(log.end[-1]) if len(log) else 0.0
    slots = log.pages * capacity.page_size
    stored, taken = (float((x * log.seconds).sum()) for x in (log.tokens, slots))
    delay = (outcome.first_token - workload.arrival)[served]
    prefilled, prompts = int(log.prefilled.sum()), int(workload.prompt_tokens[served].sum())
    found = int(outcome.found[served].sum())
    processed = prefilled + int(log.decoded.sum())
    return FormatReport(
        name=storage.name,
        window_tokens=config.window_tokens if capacity.num_window_slots else 0,
        num_sinks=config.num_sinks if capacity.num_window_slots else 0,
        bytes_per_token=capacity.page_bytes / capacity.page_size,
        capacity=capacity,
        requests_served=int(served.sum()),
        requests_rejected=int(outcome.rejected.size),
        rejection=_rejection(workload, outcome, capacity),
        prompt_tokens=prompts,
        output_tokens=output_tokens,
        tokens_found=found,
        tokens_recomputed=prefilled + found - prompts,
        preemptions=int(outcome.preemptions.sum()),
        requests_preempted=int(np.count_nonzero(outcome.preemptions)),
        swaps=SwapReport(host_pages=num_host_pages, **outcome.swaps._asdict()),
        steps=len(log),
        simulated_seconds=duration,
        linear_layers_seconds=cost.linear_seconds(processed),
        output_tokens_per_second=output_tokens / duration if duration else 0.0,
        relative_throughput=1.0,
        running_peak=int(log.running.max(initial=0)),
        running_mean=log.time_mean(log.running),
        utilisation=stored / taken if taken else 0.0,
        occupancy=log.time_mean(log.pages) / capacity.usable_pages,
        first_token_seconds={
            "mean": float(delay.mean()),
            "p50": float(np.percentile(delay, 50)),
            "p99": float(np.percentile(delay, 99)),
        }
        if delay.size
        else {},
        timeline=_timeline(outcome, capacity),
        wall_seconds=wall_seconds,
    )


def compare(formats: list[FormatReport]) -> list[FormatReport]:
    """Return the reports with throughput relative to fp16, or to the first without fp16."""
    base = next((f for f in formats if f.name == "fp16"), formats[0]).output_tokens_per_second
    return [
        msgspec.structs.replace(
            f, relative_throughput=f.output_tokens_per_second / base if base else 0.0
        )
        for f in formats
    ]


def build_report(
    workload: Workload,
    model: ModelShape,
    hardware: Hardware,
    options: SchedulerOptions,
    budget_bytes: int,
    host_bytes: int,
    overlap_swaps: bool,
    page_size: int,
    formats: list[FormatReport],
) -> SimulationReport:
    """Put the runs of all formats together."""
    return SimulationReport(
        schema=SCHEMA,
        pagedtq_version=__version__,
        budget_bytes=budget_bytes,
        host_bytes=host_bytes,
        overlap_swaps=overlap_swaps,
        page_size=page_size,
        workload=summarise_workload(workload),
        model=model,
        hardware=hardware,
        options=options,
        formats=compare(formats),
    )


def _timeline(outcome: Outcome, capacity: Capacity) -> Timeline:
    log = outcome.log
    if not len(log):
        return Timeline(seconds=[], running=[], tokens=[], occupancy=[], utilisation=[])
    edges = np.linspace(0, log.end[-1], NUM_BINS + 1)
    tokens, pages = log.binned(log.tokens, edges), log.binned(log.pages, edges)
    # Without sharing only rounding leads above 1.
    most = float("inf") if outcome.found.any() else 1.0
    return Timeline(
        seconds=((edges[1:] + edges[:-1]) / 2).tolist(),
        running=log.binned(log.running, edges).tolist(),
        tokens=tokens.tolist(),
        occupancy=(pages / capacity.usable_pages).tolist(),
        # Rounding of the integrals leaves a trace of pages in idle bins.
        utilisation=[
            min(t / (p * capacity.page_size), most) if p > 1e-6 else None
            for t, p in zip(tokens.tolist(), pages.tolist())
        ],
    )


def _rejection(workload: Workload, outcome: Outcome, capacity: Capacity) -> str | None:
    if not outcome.rejected.size:
        return None
    first = int(outcome.rejected[0])
    tokens = int(workload.final_tokens[first]) - 1
    return (
        f"{outcome.rejected.size} requests rejected, the first number {first}: it stores {tokens} "
        f"tokens in {-(-tokens // capacity.page_size)} pages, the pool has {capacity.usable_pages}"
    )
