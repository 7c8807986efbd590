"""Aligned text tables, and the one of a simulation report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..sizing import format_bytes
from .report import ExecutionReport, FormatReport, SimulationReport
from .sweep import SweepReport


def format_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return lines of aligned columns: the first to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def report_table(report: SimulationReport) -> str:
    """Return the figures of all formats as text."""
    w = report.workload
    arrival = f"{w.requests_per_second:.4g} per second" if w.requests_per_second else "all at once"
    title = (
        f"{report.model.name}, {format_bytes(report.budget_bytes)} for the cache, pages of "
        f"{report.page_size} tokens; {w.num_requests} requests ({w.name}), {arrival}"
    )
    header = (
        "format",
        *("B/token", "pages", "slots", "running", "peak", "occupied", "utilised"),
        *("preempted", "tokens", "seconds", "tokens/s", "relative"),
    )
    rows = [
        (
            f.name,
            f"{f.bytes_per_token:.0f}",
            str(f.capacity.num_pages),
            str(f.capacity.num_window_slots or "-"),
            f"{f.running_mean:.1f}",
            str(f.running_peak),
            f"{f.occupancy:.1%}",
            f"{f.utilisation:.2%}",
            str(f.preemptions),
            str(f.output_tokens),
            f"{f.simulated_seconds:.1f}",
            f"{f.output_tokens_per_second:.0f}",
            f"{f.relative_throughput:.2f}x",
        )
        for f in report.formats
    ]
    lines = [title, "", format_table(header, rows)]
    lines += [
        f"{f.name}: {f.tokens_found / f.prompt_tokens:.2%} of the prompt tokens found in pages"
        for f in report.formats
        if f.tokens_found
    ]
    lines += [f"{f.name}: {f.rejection}" for f in report.formats if f.rejection]
    lines += [_swap_line(f) for f in report.formats if f.preemptions and report.host_bytes]
    executed = [(f.name, f.execution) for f in report.formats if f.execution is not None]
    if executed:
        lines += ["", _execution_table(executed)]
    return "\n".join(lines)


def _swap_line(f: FormatReport) -> str:
    moved = f.swaps.bytes_out + f.swaps.bytes_in
    return (
        f"{f.name}: {f.swaps.sequences} of {f.preemptions} preempted sequences swapped, "
        f"{format_bytes(moved)} in {f.swaps.link_seconds:.2f} s on the link, "
        f"{f.swaps.wait_seconds:.2f} s waited for; {f.tokens_recomputed} tokens computed again"
    )


def sweep_table(report: SweepReport) -> str:
    """Return the hit rates of all formats and budgets as text."""
    title = (
        f"{report.model.name}, pages of {report.page_size} tokens; {report.num_requests} requests "
        f"({report.workload}); an endless cache finds {report.ideal_hit_rate:.2%}"
    )
    header = ("format", "budget", "pages", "found", "first token", "p99", "preempted", "rejected")
    rows = [
        (
            point.name,
            format_bytes(point.budget_bytes),
            str(point.num_pages),
            f"{point.hit_rate:.2%}",
            *(f"{point.first_token_seconds.get(key, 0):.1f} s" for key in ("p50", "p99")),
            str(point.preemptions),
            str(point.requests_rejected),
        )
        for point in report.points
    ]
    return "\n".join([title, "", format_table(header, rows)])


def _execution_table(executed: Sequence[tuple[str, ExecutionReport]]) -> str:
    header = ("executed", "backend", "stored/s", "attended/s", "decoded/s", "mean error", "max")
    rows = [
        (
            name,
            run.backend,
            f"{run.store_tokens_per_second:.3g}",
            f"{run.attend_tokens_per_second:.3g}",
            f"{run.decode_tokens_per_second:.3g}",
            f"{run.mean_relative_error:.2e}",
            f"{run.max_relative_error:.2e}",
        )
        for name, run in executed
    ]
    return format_table(header, rows)
