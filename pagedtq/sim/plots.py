"""Figures of a simulation report, as PNG files. Needs matplotlib (the ``plots`` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..figures import COLOURS, draw_figures
from ..sizing import format_bytes
from .report import FormatReport, SimulationReport
from .sweep import SweepReport

# The baselines are context, not data of interest.
_BASELINES = {"fp16": "#000000", "fp8": "#8C8C8C"}


def draw_plots(report: SimulationReport, folder: str | Path) -> list[Path]:
    """Draw all figures of a report into a folder, which is made.

    Returns
    -------
    list of Path
        ``utilisation_over_time.png``, ``running_sequences.png``, ``waste_by_page_size.png``,
        ``throughput.png``.

    Raises
    ------
    UnsupportedError
        If matplotlib is not installed.
    ArgumentError
        If a file cannot be written.
    """
    figures = {
        "utilisation_over_time": _utilisation_over_time,
        "running_sequences": _running_sequences,
        "waste_by_page_size": _waste_by_page_size,
        "throughput": _throughput,
    }
    return draw_figures({name: partial(draw, report) for name, draw in figures.items()}, folder)


def draw_sweep(report: SweepReport, folder: str | Path) -> list[Path]:
    """Draw ``hit_rate.png`` into a folder, which is made; see `draw_plots`."""
    return draw_figures({"hit_rate": partial(_hit_rate, report)}, folder)


def _utilisation_over_time(report: SimulationReport, figure: Any) -> None:
    figure.set_size_inches(6.4, 5.0)
    stored, utilised = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for f, line in _lines(report):
        time = f.timeline
        line["linewidth"] = 1.1
        stored.plot(time.seconds, [n / 1000 for n in time.tokens], **line)
        share = [float("nan") if u is None else 100 * u for u in time.utilisation]
        utilised.plot(time.seconds, share, **line)
    stored.set(title=_setting(report), ylabel="Tokens stored (thousands)", ylim=(0, None))
    utilised.set(xlabel="Simulated time (s)", ylabel="Page utilisation (%)", xlim=(0, None))
    # The drain at the end holds few sequences and much noise; show the range of the rest.
    low = min((100 * f.utilisation for f in report.formats), default=90)
    utilised.set_ylim(max(0, 100 - 3 * (100 - low)), 100)
    figure.legend(*stored.get_legend_handles_labels(), loc="outside right center")


def _running_sequences(report: SimulationReport, figure: Any) -> None:
    axes = figure.subplots()
    for f, line in _lines(report):
        axes.plot(f.timeline.seconds, f.timeline.running, **line)
    axes.set(
        title=_setting(report),
        xlabel="Simulated time (s)",
        ylabel="Running sequences",
        xlim=(0, None),
        ylim=(0, None),
    )
    figure.legend(loc="outside right center")


def _waste_by_page_size(report: SimulationReport, figure: Any) -> None:
    axes = figure.subplots()
    waste = {int(size): 100 * share for size, share in report.workload.waste_by_page_size.items()}
    axes.plot(*zip(*waste.items()), "o-", color=COLOURS[0], label="all requests complete")
    for size, share in waste.items():
        axes.annotate(
            f"{share:.2f}", (size, share), (-3, 5), textcoords="offset points", ha="right"
        )
    running = 100 * (1 - report.formats[0].utilisation)
    axes.plot(
        report.page_size,
        running,
        "D",
        color=COLOURS[1],
        label=f"while running, mean over time ({running:.2f} %)",
    )
    axes.axhline(4, color="#8C8C8C", linewidth=1, linestyle=":")
    axes.annotate("4 %", (min(waste), 4), (0, 3), textcoords="offset points", color="#666666")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(waste), [str(size) for size in waste])
    axes.minorticks_off()
    axes.set(
        title=f"{report.workload.num_requests} requests: {report.workload.name}",
        xlabel="Page size (tokens)",
        ylabel="Slots without a token (%)",
    )
    axes.margins(x=0.08)
    axes.set_ylim(0, 1.12 * max(waste.values()))
    axes.legend(loc="upper left")


def _throughput(report: SimulationReport, figure: Any) -> None:
    formats = report.formats
    figure.set_size_inches(6.4, 1.2 + 0.36 * len(formats))
    axes = figure.subplots()
    values = [f.relative_throughput for f in formats]
    bars = axes.barh(
        [f.name for f in formats], values, color=[line["color"] for _, line in _lines(report)]
    )
    for bar, (_, line) in zip(bars, _lines(report)):
        bar.set_alpha(1.0 if line["linestyle"] == "-" else 0.6)
    axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
    # Time cannot fall below what multiplying by the weights takes, however small the cache is.
    base = next((f for f in formats if f.name == "fp16"), formats[0])
    floor = min(f.linear_layers_seconds for f in formats)
    if floor > 0 and not any(f.requests_rejected for f in formats):
        bound = base.simulated_seconds / floor
        axes.axvline(bound, color="#8C8C8C", linewidth=1, linestyle=":")
        axes.annotate(
            "arithmetic bound",
            (bound, 1),
            (3, -2),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            va="top",
            color="#666666",
        )
        axes.set_xlim(0, 1.3 * max(bound, *values))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set(title=_setting(report), xlabel=f"Output tokens per second, {base.name} = 1")


def _hit_rate(report: SweepReport, figure: Any) -> None:
    axes = figure.subplots()
    names = list(dict.fromkeys(point.name for point in report.points))
    for name, line in zip(names, _styles(names)):
        points = [point for point in report.points if point.name == name]
        budgets = [point.budget_bytes / 2**30 for point in points]
        axes.plot(budgets, [100 * point.hit_rate for point in points], marker="o", **line)
    axes.axhline(100 * report.ideal_hit_rate, color="#8C8C8C", linewidth=1, linestyle=":")
    axes.annotate(
        "endless cache",
        (0, 100 * report.ideal_hit_rate),
        (3, -3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="top",
        color="#666666",
    )
    axes.set_xscale("log", base=2)
    budgets = sorted({point.budget_bytes / 2**30 for point in report.points})
    axes.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    axes.minorticks_off()
    axes.set(
        title=f"{report.num_requests} requests: {report.workload}",
        xlabel=f"Cache (GiB), {report.model.name}, pages of {report.page_size} tokens",
        ylabel="Prompt tokens found (%)",
        ylim=(0, None),
    )
    figure.legend(loc="outside right center")


def _lines(report: SimulationReport) -> list[tuple[FormatReport, dict[str, Any]]]:
    """Give each format a line."""
    return list(zip(report.formats, _styles([f.name for f in report.formats])))


def _styles(names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a line's style per format: a colour per codec pair, dashes without the window."""
    colours = dict(_BASELINES)
    styles = []
    for name in names:
        codec, dash, window = name.rpartition("-w")
        codec = codec if dash and window.isdigit() else name
        used = len(colours) - len(_BASELINES)
        colours.setdefault(codec, COLOURS[used % len(COLOURS)])
        style = "-" if codec == name else "--"
        styles.append({"color": colours[codec], "linestyle": style, "label": name})
    return styles


def _setting(report: SimulationReport) -> str:
    return (
        f"{report.model.name}, {format_bytes(report.budget_bytes)} of cache, "
        f"{report.hardware.name} cost model"
    )
