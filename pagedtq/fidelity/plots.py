"""Figures of an evaluation. Needs matplotlib (the ``plots`` extra)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..figures import COLOURS, draw_figures
from .evaluation import Evaluation
from .measures import Fidelity


def draw_plots(report: Evaluation, folder: str | Path) -> list[Path]:
    """Draw divergence and perplexity against bytes, and the sensitivities if they were measured.

    Parameters
    ----------
    report : Evaluation
        What was found.
    folder : path
        Where to; it is made.

    Returns
    -------
    list of Path
        ``divergence_by_bytes.png``, ``perplexity_by_bytes.png``, ``sensitivities.png``.

    Raises
    ------
    UnsupportedError, ArgumentError
        As `draw_figures`.
    """
    figures = {
        "divergence_by_bytes": lambda figure: _divergence(report, figure),
        "perplexity_by_bytes": lambda figure: _perplexity(report, figure),
    }
    if report.sensitivities:
        figures["sensitivities"] = lambda figure: _sensitivities(report, figure)
    return draw_figures(figures, folder)


def _groups(report: Evaluation) -> list[tuple[str, str, str, list[Fidelity]]]:
    """Return label, colour, marker and members of every kind of setting."""
    own = [f for f in report.settings if not f.name.startswith("exact")]
    plain = [f for f in own if f.name.endswith("-w0")]
    centred = [f for f in own if f.name.endswith("-w0-centred")]
    windowed = [f for f in own if f not in plain and f not in centred]
    groups = [
        ("pagedtq", COLOURS[0], "o", plain),
        ("pagedtq, centred keys", COLOURS[2], "s", centred),
        ("pagedtq, exact window", COLOURS[5], "D", windowed),
        ("other systems", COLOURS[1], "x", report.peers),
    ]
    if report.recommended is not None:
        groups.append(("recommended", COLOURS[3], "*", [report.recommended]))
    return [group for group in groups if group[3]]


def _divergence(report: Evaluation, figure: Any) -> None:
    axes = _by_bytes(report, figure, lambda f: 1e3 * f.kl)
    axes.set(ylabel="KL of next-token distributions (millinats)", yscale="log")


def _perplexity(report: Evaluation, figure: Any) -> None:
    axes = _by_bytes(report, figure, lambda f: 100 * f.perplexity_change)
    axes.axhline(0, color="#8C8C8C", linewidth=1, linestyle=":")
    axes.set(ylabel="Change of perplexity (%)", yscale="symlog")


def _by_bytes(report: Evaluation, figure: Any, value: Any) -> Any:
    figure.set_size_inches(7.6, 5.0)
    axes = figure.subplots()
    heads = report.shape.num_layers * report.shape.num_kv_heads
    for label, colour, marker, members in _groups(report):
        xs = [f.bytes_per_token / heads for f in members]
        ys = [value(f) for f in members]
        axes.plot(xs, ys, marker, color=colour, label=label, markersize=5)
        for f, x, y in zip(members, xs, ys):
            name = f.name.removesuffix("-centred").removesuffix("-w0")
            axes.annotate(
                name, (x, y), (4, 3), textcoords="offset points", fontsize=6.5, color=colour
            )
    axes.set(
        title=f"{report.model}, {report.plan.context} tokens of context",
        xlabel="Bytes per token and KV head, everything counted",
    )
    axes.legend(loc="upper right")
    return axes


def _sensitivities(report: Evaluation, figure: Any) -> None:
    widths = sorted({s.bits for s in report.sensitivities})
    layers = report.shape.num_layers
    figure.set_size_inches(7.6, 1.6 + 0.28 * layers)
    both = figure.subplots(1, 2, sharey=True)
    table = {(s.layer, s.stream, s.bits): 1e3 * s.kl for s in report.sensitivities}
    grids = {
        stream: np.array([[table[i, stream, bits] for bits in widths] for i in range(layers)])
        for stream in ("keys", "values")
    }
    # Divergences span orders of magnitude; both halves share the colours.
    logs = {stream: np.log10(np.maximum(grid, 1e-6)) for stream, grid in grids.items()}
    low, high = min(x.min() for x in logs.values()), max(x.max() for x in logs.values())
    for axes, (stream, grid) in zip(both, grids.items()):
        axes.imshow(logs[stream], aspect="auto", cmap="viridis", vmin=low, vmax=high)
        for (row, column), kl in np.ndenumerate(grid):
            dark = logs[stream][row, column] < (low + high) / 2
            axes.text(
                column,
                row,
                f"{kl:.2g}",
                ha="center",
                va="center",
                fontsize=7,
                color="white" if dark else "black",
            )
        axes.set_xticks(range(len(widths)), [str(bits) for bits in widths])
        axes.set_yticks(range(layers), [str(layer) for layer in range(layers)])
        axes.grid(visible=False)
        axes.set(title=f"{stream}: millinats, this stream alone coded", xlabel="Bits")
    both[0].set_ylabel("Layer")
