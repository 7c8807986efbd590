"""Draw the figures of the pages: ``python -m docs.figures [FOLDER]`` (needs ``plots``).

Byte offsets come from ``PageLayout``, so the page figure cannot drift from the format. Text on
fills is dark; the rest is of `benchmarks.figure_style`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from benchmarks.figure_style import GREY, LINE, STYLE
from docs.plots import EXACT, KEYS, NORMS, SHARED, VALUES, digest_of, measured_figures
from pagedtq import preset
from pagedtq.paging.layout import PageLayout

INK, EMPTY = "#15202b", "none"


def box(axes: Axes, x: float, y: float, w: float, h: float, fill: str, text: str = "") -> None:
    """Draw one filled rectangle with centred text."""
    axes.add_patch(Rectangle((x, y), w, h, facecolor=fill, edgecolor=LINE, linewidth=0.8))
    ink = GREY if fill == EMPTY else INK
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", color=ink, fontsize=8)


def canvas(width: float, height: float, right: float, top: float) -> tuple[plt.Figure, Axes]:
    """Open a figure whose axes run from 0 to ``right`` and ``top`` and show nothing themselves."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set(xlim=(0, right), ylim=(0, top))
    axes.axis("off")
    figure.subplots_adjust(0.005, 0.01, 0.995, 0.99)
    return figure, axes


def page() -> plt.Figure:
    """Sequence to page, page to extent, extent to planes."""
    figure, axes = canvas(8.4, 4.9, 100, 59)

    def heading(y: float, title: str, rest: str) -> None:
        axes.text(0.5, y, title, fontsize=10, fontweight="bold", va="center")
        axes.text(13, y, rest, va="center")

    heading(57, "sequence", "blocks of 64 tokens in order; the page table names the page of each")
    colours = {3: SHARED, 7: KEYS, 1: KEYS, 5: VALUES}
    for row, (name, pages) in enumerate({"A": (3, 7, 1), "B": (3, 5)}.items()):
        y = 49.5 - 6 * row
        axes.text(9.5, y + 2, name, fontweight="bold", va="center")
        for block, page_id in enumerate(pages):
            part = "open" if block == len(pages) - 1 else "full"
            label = f"{part} \N{RIGHTWARDS ARROW} {page_id}"
            box(axes, 13 + 9.5 * block, y, 9, 4, colours[page_id], label)
    axes.text(33, 45.5, "B is a fork of A:\nthey share page 3", va="center", fontsize=8)

    axes.text(55, 52.4, "pool of pages", fontweight="bold", va="center")
    for page_id in range(9):
        box(axes, 55 + 4.9 * page_id, 45, 4.4, 5, colours.get(page_id, EMPTY), str(page_id))
    axes.text(55, 42.6, "page 0 is the null page: never handed out", va="center", fontsize=8)

    heading(37, "page", "one block for all layers and KV heads; layers may differ in size")
    for layer, name in enumerate(("layer 0", "layer 1", "last layer")):
        for head in range(4):
            chosen = (layer, head) == (2, 2)
            fill = SHARED if chosen else EMPTY
            box(axes, 13 + 11 * head, 30 - 4.2 * layer, 10.5, 3.7, fill, f"{name}, h{head}")
    axes.text(59, 32.6, "one (layer, KV head): an extent", fontweight="bold", va="center")
    axes.text(
        59,
        26.6,
        "The pool keeps the extents of a layer together\n"
        "(layer-major) or those of a page (page-major);\n"
        "the bytes inside an extent are the same.",
        va="center",
        fontsize=8,
    )

    config = preset("k4v4", num_layers=1, num_kv_heads=1, head_dim=128, num_pages=2)
    extent = PageLayout(config).extents[0]
    heading(11.4, "extent", "")
    fills = {"key_codes": KEYS, "value_codes": VALUES}
    notes = {
        "key_codes": "64 rows of 64 bytes,\none token each",
        "value_codes": "32 rows of 64 \N{MULTIPLICATION SIGN} 2 bytes,\none token pair each",
        "key_norms": "64 \N{MULTIPLICATION SIGN} f16",
        "value_norms": "64 \N{MULTIPLICATION SIGN} f16",
    }
    x = 13.0
    for name, plane in extent.planes.items():
        # Norm planes are 32 times smaller than code planes: widened to be seen.
        width = 30.0 if name in fills else 12.5
        box(axes, x, 9, width, 4.8, fills.get(name, NORMS), name)
        axes.text(x, 7.5, str(plane.offset), ha="center", va="center", fontsize=7.5)
        axes.text(x + width / 2, 4.9, notes[name], ha="center", va="center", fontsize=8)
        x += width
    axes.text(x, 7.5, str(extent.nbytes), ha="center", va="center", fontsize=7.5)
    per_token = extent.nbytes // config.page_size
    axes.text(
        13,
        1.3,
        f"k4v4, head_dim 128, page_size 64: {extent.nbytes} bytes, {per_token} per token "
        "(widths not to scale)",
        va="center",
    )
    for top, bottom in ((35, 13), (45.5, x)):
        axes.plot([top, bottom], [21.4, 14], color=LINE, linewidth=0.7, linestyle=":")
    return figure


def window() -> plt.Figure:
    """Sinks, coded body and ring of one sequence, token by token."""
    page_size, rows, sinks, length = 16, 16, 4, 88
    coded = page_size * (length // page_size)
    ring = length - rows
    figure, axes = canvas(8.4, 3.9, 102, 46)
    left = 11.0

    def cells(y: float, fills: dict[range, str], height: float = 3.4) -> None:
        for token in range(96):
            fill = next((colour for span, colour in fills.items() if token in span), EMPTY)
            style = "-" if token < length else ":"
            axes.add_patch(
                Rectangle(
                    (left + 0.93 * token, y),
                    0.93,
                    height,
                    facecolor=fill,
                    edgecolor=LINE,
                    linewidth=0.35,
                    linestyle=style,
                )
            )

    def at(token: float) -> float:
        return left + 0.93 * token

    def mark(token: int, y: float, text: str, side: str = "center") -> None:
        axes.plot([at(token)] * 2, [y - 0.9, y + 0.4], color=LINE, linewidth=0.8)
        axes.text(at(token), y + 1.9, text, ha=side, va="center", fontsize=8)

    for block in range(6):
        state = "open" if block == 5 else "sealed"
        axes.text(
            at(16 * block + 8),
            43.9,
            f"block {block}, {state}",
            ha="center",
            va="center",
            fontsize=8,
        )
        for edge in (16 * block, 16 * block + 16):
            for y in (17, 27, 35):
                axes.plot([at(edge)] * 2, [y - 0.8, y + 4.2], color=LINE, linewidth=1.2)
            axes.plot([at(edge)] * 2, [43, 45], color=LINE, linewidth=0.5)
    for y, name in ((35, "exact"), (27, "codes"), (17, "read by\nattend")):
        axes.text(0, y + 1.7, name, va="center", fontweight="bold")
    cells(35, {range(sinks): EXACT, range(ring, length): EXACT})
    cells(27, {range(coded): KEYS})
    cells(17, {range(sinks): EXACT, range(sinks, ring): KEYS, range(ring, length): EXACT})
    mark(sinks, 39.2, f"s = {sinks}")
    mark(ring, 39.2, f"r = {ring}")
    mark(length, 39.2, f"L = {length}")
    mark(coded, 31.2, f"c = {coded}")
    axes.text(
        at(36), 33.0, "[r, c) exists twice: attend takes the exact copy", va="center", fontsize=8
    )
    parts = ((0, sinks, "sinks"), (sinks, ring, "body, from codes"), (ring, length, "ring"))
    for start, stop, text in parts:
        axes.text(at((start + stop) / 2), 14.8, text, ha="center", va="center", fontsize=8)
    axes.text(0, 8.7, "ring rows", va="center", fontweight="bold")
    for row in range(rows):
        position = next(p for p in range(ring, length) if p % rows == row)
        box(axes, left + 5.58 * row, 7, 5.58, 3.4, EXACT, str(position))
    axes.text(
        left,
        3.6,
        f"position p sits in row p mod {rows}; the next token, {length}, takes the row of {ring}.\n"
        f"When block 5 is full, its {page_size} rows are encoded into its page and stay here.",
        va="center",
        fontsize=8,
    )
    return figure


def draw_all(folder: Path) -> None:
    """Write a file per figure into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (page, window, *measured_figures):
        metadata = {"Date": None}
        if draw in measured_figures:
            metadata["Description"] = digest_of(measured_figures[draw])
        with mpl.rc_context(STYLE):
            figure = draw()
            figure.savefig(folder / f"{draw.__name__}.svg", metadata=metadata)
        plt.close(figure)


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "_static")
