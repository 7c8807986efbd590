"""Figures of measured results, from ``benchmarks/results``; `docs.figures` writes the files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.figure_style import GREY
from pagedtq import PRESETS

KEYS, VALUES, NORMS, EXACT = "#7fb3e6", "#f2b36b", "#b9a5e2", "#6cc49a"
SHARED = "#c3c9cf"


def measured(name: str) -> list[dict[str, Any]]:
    """Return the rows of a committed result."""
    results = Path(__file__).parents[1] / "benchmarks" / "results" / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8"))["rows"]
    return rows


def digest_of(name: str) -> str:
    """Return what a figure keeps of the result it was drawn from, to be known as stale by."""
    return hashlib.sha256(json.dumps(measured(name), sort_keys=True).encode()).hexdigest()


def append() -> plt.Figure:
    """Cost of appending one token, by the length of the cache, as measured."""
    rows = measured("compat_append")
    figure, axes = plt.subplots(figsize=(6.4, 3.0), layout="constrained")
    names = {"mse": "MSE keys", "prod": "Prod keys", "mse, full": "MSE keys, dropping the oldest"}
    for (kind, name), colour in zip(names.items(), (KEYS, VALUES, EXACT), strict=True):
        line = [row for row in rows if row["keys"] == kind]
        tokens = [row["tokens"] for row in line]
        cost = [row["push us (best)"] + row["move us per token"] for row in line]
        axes.plot(tokens, cost, "o-", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(tokens, [f"{count // 1024}k" for count in tokens])
    axes.set(xlabel="tokens in the cache", ylabel="us per token", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def step_cost() -> plt.Figure:
    """Cost of a decode step of the control plane, by pool size and by sequences, as measured."""
    rows = measured("step_cost")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.2), layout="constrained")
    callers = {
        "tables": (KEYS, "-"),
        "tables, shared": (KEYS, "--"),
        "scheduler": (VALUES, "-"),
        "scheduler, shared": (VALUES, "--"),
    }
    for axes, axis, field in ((left, "pool", "pages"), (right, "sequences", "sequences")):
        for caller, (colour, style) in callers.items():
            line = [row for row in rows if (row["axis"], row["caller"]) == (axis, caller)]
            places = [row[field] for row in line]
            cost = [row["min us"] for row in line]
            axes.plot(places, cost, marker="o", linestyle=style, color=colour, label=caller)
    left.set_xscale("log")
    left.set(xlabel="pages of the pool, 1024 sequences", ylim=(0, None))
    left.set_ylabel("us, least of 200 steps")
    right.set(xlabel="running sequences, 100 000 pages", xlim=(0, None), ylim=(0, None))
    figure.legend(
        *left.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return figure


def hit_rate() -> plt.Figure:
    """Prompt tokens found in pages by memory and format: the Mooncake conversation trace."""
    rows = measured("hit_rate")
    figure, axes = plt.subplots(figsize=(6.4, 3.2), layout="constrained")
    colours = {"fp16": GREY, "fp8": NORMS, "k4v4": KEYS, "k2v2": VALUES}
    for name, colour in colours.items():
        line = [row for row in rows if row["format"] == name]
        budgets = [row["GiB"] for row in line]
        axes.plot(budgets, [row["found %"] for row in line], "o-", color=colour, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.minorticks_off()
    axes.set(xlabel="memory for the cache (GiB)", ylabel="prompt tokens found (%)", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def fidelity() -> plt.Figure:
    """Divergence of a trained decoder by bytes, own settings and those of others, as measured."""
    rows = [row for row in measured("fidelity") if row["context"] == 2048]
    settings = [row for row in rows if row["part"] == "settings" and row["KL mnat"] > 1e-3]
    own = [row for row in settings if row["setting"].startswith((*PRESETS, "prod"))]
    others = [row for row in settings if row not in own]
    plain = [row for row in own if row["setting"].endswith("-w0")]
    centred = [row for row in own if row["setting"].endswith("-w0-centred")]
    windowed = [row for row in own if "centred" in row["setting"] and row not in centred]
    figure, axes = plt.subplots(figsize=(8.4, 5.2), layout="constrained")
    # Centred settings lie below the plain ones of the same bytes, whose names serve both.
    _points(axes, plain, NORMS, "o", "plain", (-5, 4), "right")
    _points(axes, centred, KEYS, "s", "keys centred", None, "right")
    _points(axes, windowed, EXACT, "D", "keys centred, exact window", (-6, -9), "right")
    layers = [row for row in rows if row["part"] == "bits by layer"]
    _points(axes, layers, SHARED, "v", "bits by layer, keys centred", None, "right")
    _points(axes, others, VALUES, "X", "other systems", (6, 2), "left")
    axes.set_xscale("log", base=2)
    axes.set_xticks([32, 64, 128, 256], ["32", "64", "128", "256"])
    axes.set(xlabel="bytes per token and KV head", yscale="log", xlim=(27, 300))
    axes.set_ylabel("KL of next-token distributions (millinats)")
    axes.legend(frameon=False, loc="lower left")
    return figure


#: Names that would lie on others, or on markers: their offsets, and which end is at the marker.
_BESIDE = {
    "vllm-3bit_nc": ((6, 8), "left"),
    "k3v4": ((2, 6), "center"),
    "kivi2-r128": ((-6, -5), "right"),
    "k3v3-w64": ((-8, -2), "right"),
    "k4v4-w16, page 16": ((8, 1), "left"),
}


def _points(
    axes: Axes,
    rows: list[dict[str, Any]],
    colour: str,
    marker: str,
    label: str,
    offset: tuple[int, int] | None,
    side: str,
) -> None:
    xs, ys = [row["B/token/head"] for row in rows], [row["KL mnat"] for row in rows]
    axes.plot(xs, ys, marker, color=colour, label=label, markersize=6)
    for row, x, y in zip(rows, xs, ys, strict=True):
        name = row["setting"].split(" (")[0].replace("-centred", "").replace("-w0", "")
        if offset is not None:
            place, at = _BESIDE.get(name, (offset, side))
            axes.annotate(name, (x, y), place, textcoords="offset points", fontsize=6.5, ha=at)


def sensitivities() -> plt.Figure:
    """Divergence when one stream of one layer is coded alone, as measured."""
    rows = [row for row in measured("fidelity") if row["part"] == "sensitivity"]
    widths = sorted({row["bits"] for row in rows})
    layers = sorted({row["layer"] for row in rows})
    found = {(row["stream"], row["layer"], row["bits"]): row["KL mnat"] for row in rows}
    low, high = (np.log10(max(f(found.values()), 1e-6)) for f in (min, max))
    figure, both = plt.subplots(1, 2, figsize=(8.4, 2.8), sharey=True, layout="constrained")
    for axes, stream in zip(both, ("keys", "values"), strict=True):
        grid = np.array([[found[stream, layer, bits] for bits in widths] for layer in layers])
        logs = np.log10(np.maximum(grid, 1e-6))
        axes.imshow(logs, aspect="auto", cmap="viridis", vmin=low, vmax=high)
        for (row, column), kl in np.ndenumerate(grid):
            ink = "white" if logs[row, column] < (low + high) / 2 else "black"
            axes.text(column, row, f"{kl:.2g}", ha="center", va="center", fontsize=7.5, color=ink)
        axes.set_xticks(range(len(widths)), [str(bits) for bits in widths])
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        axes.set(xlabel=f"bits of the {stream}")
    both[0].set_ylabel("layer")
    return figure


#: Every figure, and the result that it shows.
measured_figures = {
    append: "compat_append",
    step_cost: "step_cost",
    hit_rate: "hit_rate",
    fidelity: "fidelity",
    sensitivities: "fidelity",
}
