"""How figures look, and their way into PNG files. Needs matplotlib (the ``plots`` extra)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import ArgumentError, UnsupportedError

# Okabe and Ito's colours, told apart with any kind of colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

_STYLE: dict[Any, Any] = {
    "figure.figsize": (6.4, 3.6),
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
}


def require_plots() -> None:
    """Raise ``UnsupportedError`` unless figures can be drawn here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UnsupportedError('plots need matplotlib: pip install "pagedtq[plots]"') from error


def draw_figures(figures: Mapping[str, Callable[[Any], None]], folder: str | Path) -> list[Path]:
    """Draw figures into ``<folder>/<name>.png``; the folder is made.

    Parameters
    ----------
    figures : mapping of name to callable
        Each fills the matplotlib figure that it is given.
    folder : path
        Where to.

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    UnsupportedError
        If matplotlib is not installed.
    ArgumentError
        If a file cannot be written.
    """
    require_plots()
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    paths = []
    for name, draw in figures.items():
        path = Path(folder) / f"{name}.png"
        # Figures of our own, without pyplot: no global state, no display.
        with matplotlib.rc_context(_STYLE):
            figure = Figure()
            FigureCanvasAgg(figure)
            draw(figure)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(path)
            except OSError as error:
                raise ArgumentError(f"cannot write {path}: {error.strerror or error}") from error
        paths.append(path)
    return paths
