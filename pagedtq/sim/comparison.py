"""The whole of `pagedtq simulate`: one workload, several formats, one memory budget."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from ..errors import ArgumentError
from ..models import ModelShape
from ..serving.generation import SchedulerOptions
from ..sizing import Format, plan_capacity
from .cost_model import CostModel, Hardware
from .report import FormatReport, SimulationReport
from .simulator import Simulator
from .summary import build_report, summarise_format
from .workload import Workload

#: Formats that are compared unless others are named.
DEFAULT_FORMATS = ("fp16", "fp8", "k4v4", "k4v4-w0", "k3v3", "k2v2")

#: Opens a progress display for a run: (label, number of requests) -> context with a callback.
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object] | None]]


def silent(label: str, total: int) -> AbstractContextManager[None]:
    """Show no progress."""
    return nullcontext()


def simulate_format(
    workload: Workload,
    storage: Format,
    model: ModelShape,
    *,
    budget_bytes: int,
    page_size: int = 64,
    hardware: Hardware | None = None,
    options: SchedulerOptions | None = None,
    host_bytes: int | None = None,
    overlap_swaps: bool = True,
    fast_forward: bool = True,
    progress: Progress = silent,
) -> FormatReport:
    """Serve a workload in one storage format.

    Parameters are those of ``simulate_formats``.
    """
    options = options or SchedulerOptions()
    config = storage.config(model, page_size)
    # As many window slots as sequences of the typical resident length fit beside their windows.
    capacity = plan_capacity(
        config,
        budget_bytes,
        tokens_per_sequence=workload.mean_resident_tokens,
        byte_share=storage.byte_share,
    )
    cost = CostModel(model, config, hardware or Hardware(), storage.byte_share)
    host_pages = host_memory(options, budget_bytes, host_bytes) // capacity.page_bytes
    start = time.perf_counter()
    simulator = Simulator(
        workload,
        config,
        capacity,
        cost,
        options,
        num_host_pages=host_pages,
        overlap_swaps=overlap_swaps,
        fast_forward=fast_forward,
    )
    with progress(storage.name, len(workload)) as update:
        outcome = simulator.run(update)
    wall = time.perf_counter() - start
    return summarise_format(storage, config, capacity, cost, workload, outcome, host_pages, wall)


def host_memory(options: SchedulerOptions, budget_bytes: int, host_bytes: int | None) -> int:
    """Return the memory of the host for swaps: as given, or as much as the device's, if any."""
    if options.preemption == "recompute":
        return 0
    return budget_bytes if host_bytes is None else host_bytes


def simulate_formats(
    workload: Workload,
    formats: Sequence[Format],
    model: ModelShape,
    *,
    budget_bytes: int,
    page_size: int = 64,
    hardware: Hardware | None = None,
    options: SchedulerOptions | None = None,
    host_bytes: int | None = None,
    overlap_swaps: bool = True,
    fast_forward: bool = True,
    progress: Progress = silent,
) -> SimulationReport:
    """Serve a workload in several storage formats at the same memory budget.

    Parameters
    ----------
    workload : Workload
        The requests.
    formats : sequence of Format
        What to compare.
    model : ModelShape
        Decides bytes and work per token.
    budget_bytes : int
        Memory for pages and exact windows together, the same for each format.
    page_size : int
        Tokens in a page.
    hardware : Hardware, optional
        Constants of the cost model.
    options : SchedulerOptions, optional
        How steps are put together.
    host_bytes : int, optional
        Memory of the host for sequences that are swapped; ``budget_bytes`` if not given, none if
        preemption recomputes.
    overlap_swaps : bool
        Let copies of swaps run while other sequences step; else every step waits for its copies.
    fast_forward : bool
        Take runs of decode steps at once; never changes a result.
    progress : callable, optional
        Opens a progress display.

    Returns
    -------
    SimulationReport
    """
    if not formats:
        raise ArgumentError("expected at least one format, got none")
    hardware, options = hardware or Hardware(), options or SchedulerOptions()
    reports = [
        simulate_format(
            workload,
            storage,
            model,
            budget_bytes=budget_bytes,
            page_size=page_size,
            hardware=hardware,
            options=options,
            host_bytes=host_bytes,
            overlap_swaps=overlap_swaps,
            fast_forward=fast_forward,
            progress=progress,
        )
        for storage in formats
    ]
    return build_report(
        workload,
        model,
        hardware,
        options,
        budget_bytes,
        host_memory(options, budget_bytes, host_bytes),
        overlap_swaps,
        page_size,
        reports,
    )
