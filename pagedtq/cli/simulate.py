"""``pagedtq simulate``: replay a workload in several storage formats at one memory budget."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ..errors import UnsupportedError
from ..serving.generation import SchedulerOptions
from ..sim.comparison import DEFAULT_FORMATS, simulate_formats
from ..sim.cost_model import Hardware
from ..sim.generator import azure_conversation
from ..sim.report import SimulationReport, write_report
from ..sim.sweep import SweepReport, sweep_budgets, write_sweep
from ..sim.table import report_table, sweep_table
from ..sim.traces import READERS, read_trace
from ..sim.workload import Workload
from ..sizing import Format, parse_bytes
from .arguments import (
    Commands,
    add_command,
    add_memory_options,
    checked,
    positive_int,
    size_list,
)
from .progress import progress

#: The embedded workload's size, and a rate of arrival that keeps every format busy.
DEFAULT_REQUESTS = 8000
DEFAULT_RATE = 100.0


def add_parser(commands: Commands) -> None:
    """Add the command."""
    parser = add_command(
        commands,
        "simulate",
        run,
        "continuous batching over a page budget, several formats side by side",
        "Without --trace, requests are generated like those of the Azure conversation trace, "
        "arriving fast enough to keep every format busy. Time advances by a roofline cost model.",
    )
    work = parser.add_argument_group("workload")
    work.add_argument(
        "--trace", metavar="KIND:PATH", help=f"replay a trace; kinds: {', '.join(READERS)}"
    )
    work.add_argument("--seed", type=int, default=0, help="of everything random")
    work.add_argument(
        "--requests",
        type=positive_int,
        metavar="N",
        help=f"only the first N (default: {DEFAULT_REQUESTS} generated ones, all of a trace)",
    )
    work.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="stretch arrivals to R requests per second, inf for all at once "
        f"(default: {DEFAULT_RATE:g} for generated ones, unchanged for a trace)",
    )
    work.add_argument(
        "--no-sharing",
        action="store_true",
        help="share no pages between prompts that begin alike, although the trace says which do",
    )
    memory = parser.add_argument_group("memory")
    add_memory_options(memory, ",".join(DEFAULT_FORMATS))
    memory.add_argument(
        "--sweep",
        type=checked(size_list),
        metavar="SIZE,...",
        help="instead of --budget: how many prompt tokens are found in pages at each of these "
        "(needs a Mooncake trace)",
    )
    batch = parser.add_argument_group("batching")
    options = SchedulerOptions()
    batch.add_argument(
        "--step-tokens", type=int, default=options.step_tokens, help="tokens processed in a step"
    )
    batch.add_argument(
        "--max-running", type=int, default=options.max_running, help="sequences at a time"
    )
    batch.add_argument(
        "--watermark",
        type=float,
        default=options.watermark,
        help="share of the pages that admission leaves free",
    )
    batch.add_argument(
        "--admission",
        choices=("prompt", "chunk", "whole"),
        default=options.admission,
        help="what of a request must fit: its prompt, the next chunk of it, or all to its end",
    )
    batch.add_argument(
        "--preemption",
        choices=("recompute", "swap", "auto"),
        default=options.preemption,
        help="what becomes of a sequence that must give way: it is computed again, moves to the "
        "host and back, or whichever costs less",
    )
    batch.add_argument(
        "--host-memory",
        type=checked(parse_bytes),
        metavar="SIZE",
        help="of the host, for sequences that are swapped (default: as much as --budget)",
    )
    batch.add_argument(
        "--wait-for-swaps",
        action="store_true",
        help="let every step wait for its copies, instead of overlapping them with steps",
    )
    _add_hardware_options(parser.add_argument_group("cost model"))
    real = parser.add_argument_group("execution")
    real.add_argument(
        "--execute",
        nargs="?",
        type=positive_int,
        const=4,
        metavar="N",
        help="also store and attend the first N requests for real (4 if no number is given); "
        "choose a small --model or be patient",
    )
    real.add_argument(
        "--execute-steps", type=positive_int, default=16, help="output tokens of each"
    )
    real.add_argument("--backend", choices=("auto", "host", "cuda"), default="auto", help="where")
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, default=Path("simulate-report"), help="report folder")
    output.add_argument("--no-plots", action="store_true", help="write no PNG files")


def _add_hardware_options(group: Any) -> None:
    machine = Hardware()
    group.add_argument(
        "--bandwidth", type=float, default=machine.bandwidth, help="bytes per second of a copy"
    )
    group.add_argument(
        "--efficiency", type=float, default=machine.efficiency, help="share of it kernels reach"
    )
    group.add_argument(
        "--flops", type=float, default=machine.flops, help="attainable operations per second"
    )
    group.add_argument(
        "--step-overhead", type=float, default=machine.step_overhead, help="seconds of every step"
    )
    group.add_argument(
        "--link-bandwidth",
        type=float,
        default=machine.link_bandwidth,
        help="bytes per second between device and host, each way",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    hardware, options = _hardware(arguments), _options(arguments)
    workload = _workload(arguments)
    if arguments.sweep:
        return _sweep(arguments, workload)
    report = simulate_formats(
        workload,
        arguments.formats,
        arguments.model,
        budget_bytes=arguments.budget,
        page_size=arguments.page_size,
        hardware=hardware,
        options=options,
        host_bytes=arguments.host_memory,
        overlap_swaps=not arguments.wait_for_swaps,
        progress=progress,
    )
    if arguments.execute:
        report = _execute(arguments, workload, report)
    written = [write_report(report, arguments.out)]
    if not arguments.no_plots:
        written += _draw(report, arguments.out)
    _tell(arguments, report, report_table(report), written)
    return 0


def _tell(
    arguments: argparse.Namespace,
    report: SimulationReport | SweepReport,
    table: str,
    written: list[Path],
) -> None:
    if arguments.json:
        sys.stdout.write(report.to_json().decode() + "\n")
    else:
        print(table)
        print(f"\nwritten to {arguments.out}/: {', '.join(path.name for path in written)}")


def _workload(arguments: argparse.Namespace) -> Workload:
    rate = arguments.rate
    if arguments.trace:
        workload = read_trace(arguments.trace)
        if arguments.requests:
            workload = workload.first(arguments.requests)
    else:
        workload = azure_conversation(arguments.requests or DEFAULT_REQUESTS, arguments.seed)
        rate = DEFAULT_RATE if rate is None else rate
    if arguments.no_sharing:
        workload = replace(workload, hash_ids=None, hash_offsets=None)
    return workload if rate is None else workload.at_rate(rate)


def _sweep(arguments: argparse.Namespace, workload: Workload) -> int:
    """Run the formats at several budgets and say how much of the prompts is found."""
    report = sweep_budgets(
        workload,
        arguments.formats,
        arguments.sweep,
        arguments.model,
        page_size=arguments.page_size,
        hardware=_hardware(arguments),
        options=_options(arguments),
        host_bytes=arguments.host_memory,
        overlap_swaps=not arguments.wait_for_swaps,
        progress=progress,
    )
    written = [write_sweep(report, arguments.out)]
    if not arguments.no_plots:
        written += _draw(report, arguments.out)
    _tell(arguments, report, sweep_table(report), written)
    return 0


def _options(arguments: argparse.Namespace) -> SchedulerOptions:
    return SchedulerOptions(
        step_tokens=arguments.step_tokens,
        max_running=arguments.max_running,
        watermark=arguments.watermark,
        admission=arguments.admission,
        preemption=arguments.preemption,
    )


def _hardware(arguments: argparse.Namespace) -> Hardware:
    fields = ("bandwidth", "efficiency", "flops", "step_overhead", "link_bandwidth")
    hardware = Hardware(**{field: getattr(arguments, field) for field in fields})
    default = Hardware()
    return default if hardware == default else msgspec.structs.replace(hardware, name="custom")


def _execute(
    arguments: argparse.Namespace, workload: Workload, report: SimulationReport
) -> SimulationReport:
    # Reaches down to codecs and backends, which a simulation alone does not load.
    from ..sim.execute import execute_format

    formats = []
    for f in report.formats:
        with progress(f"{f.name} run", arguments.execute_steps) as update:
            execution = execute_format(
                workload,
                Format.parse(f.name),
                arguments.model,
                page_size=arguments.page_size,
                backend=arguments.backend,
                num_requests=arguments.execute,
                max_steps=arguments.execute_steps,
                seed=arguments.seed,
                progress=update,
            )
        formats.append(msgspec.structs.replace(f, execution=execution))
    return msgspec.structs.replace(report, formats=formats)


def _draw(report: SimulationReport | SweepReport, folder: Path) -> list[Path]:
    from ..sim.plots import draw_plots, draw_sweep

    try:
        if isinstance(report, SweepReport):
            return draw_sweep(report, folder)
        return draw_plots(report, folder)
    except UnsupportedError as error:
        print(f"pagedtq: no plots: {error}", file=sys.stderr)
        return []
