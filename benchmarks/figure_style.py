"""How figures of results and pages look: readable on light and on dark pages.

The ground is transparent, text and lines are of a grey in between.
"""

from __future__ import annotations

from typing import Any

GREY, LINE = "#808890", "#8a939c"

#: For ``matplotlib.rc_context``.
STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": LINE,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "svg.hashsalt": "pagedtq",  # the same file from every run
    "svg.fonttype": "path",
    "savefig.transparent": True,
}
