"""A device's result as two figures: attention by format, and batch and context of the crossover."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.figure_style import LINE, STYLE


def draw(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the figures a result has rows for; return their paths. Needs matplotlib."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    written = []
    with mpl.rc_context(STYLE):
        for name, make in (("attend", _attend), ("crossover", _crossover)):
            figure, axes = plt.subplots(figsize=(7.2, 3.4))
            if make(axes, result["rows"]):
                path = folder / f"{result['name']}-{name}.svg"
                figure.tight_layout()
                figure.savefig(path, metadata={"Date": None})
                written.append(path)
            plt.close(figure)
    return written


def _attend(axes: Any, rows: list[dict[str, Any]]) -> bool:
    """Draw the time of attention over 64 sequences of 32 k tokens, baselines beside formats."""
    shape = {"batch": 64, "tokens": 32768, "group": 4, "d": 128, "page": 64, "lengths": "equal"}
    found: dict[str, float] = {}
    for row in rows:
        same = all(row.get(name) == value for name, value in shape.items())
        if row["stage"] == "attend" and same and row.get("us") and row.get("how") != "eager":
            ours = row["operation"] == "attend"
            name = f"pagedtq {row['format']}" if ours else row["how"].partition(" /")[0]
            found[name] = min(row["us"], found.get(name, float("inf")))
    names = sorted(found, key=found.__getitem__, reverse=True)
    for name in names:
        ours, ms = name.startswith("pagedtq"), found[name] / 1e3
        axes.plot(ms, name, "o", color="#3f9a74" if ours else "#9aa3ab")
        axes.annotate(f"{ms:.3g}", (ms, name), (6, -3), textcoords="offset points")
    axes.grid(axis="y", linewidth=0.4)
    axes.margins(x=0.12)
    axes.set_xscale("log")
    axes.set(xlabel="ms per layer: 64 sequences of 32 k tokens, 8 KV heads, group 4, d 128")
    axes.spines[["top", "right"]].set_visible(False)
    return bool(found)


def _crossover(axes: Any, rows: list[dict[str, Any]]) -> bool:
    """Draw how many times faster than the best bfloat16 kernel, a line per batch size."""
    drawn = False
    for row in rows:
        if row["stage"] == "attend" and row.get("operation") == "crossover":
            points = sorted(
                (int(name.split()[0]), ratio)
                for name, ratio in row.items()
                if name.endswith(" tokens") and ratio is not None
            )
            axes.plot(*zip(*points, strict=True), marker="o", label=f"batch {row['batch']}")
            drawn = True
    if drawn:
        axes.axhline(1, color=LINE, linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g} k")
        axes.set(xlabel="tokens of each sequence", ylabel="k4v4, times the best bf16 kernel")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        axes.spines[["top", "right"]].set_visible(False)
    return drawn
