"""What every benchmark shares: its options, its table on the screen, its JSON with the conditions.

A result without its conditions cannot be compared, so the JSON always names versions, machine,
date, command and seed. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import pagedtq

RESULTS = Path(__file__).parent / "results"

#: Distributions whose version is recorded when the benchmark has loaded them.
_PEERS = ("torch", "cupy", "scipy", "transformers", "turboquant", "threadpoolctl")


def arguments(
    name: str, description: str | None, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the options all benchmarks have.

    Parameters
    ----------
    name : str
        Module name below ``benchmarks``.
    description : str or None
        What is measured; pass the module's ``__doc__``.
    argv : sequence of str, optional
        Instead of the process's arguments.

    Returns
    -------
    argparse.Namespace
        ``json`` (Path or None), ``quick`` (bool), ``seed`` (int).
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the JSON")
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, to see that it runs; keeps no JSON"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random inputs")
    return parser.parse_args(argv)


def publish(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    *,
    notes: Sequence[str] = (),
    json_path: str | os.PathLike[str] | None = None,
    seed: int = 0,
    quick: bool = False,
) -> Path | None:
    """Print one aligned table and write it, with its conditions, as JSON.

    Parameters
    ----------
    name : str
        Name of the benchmark's module, and of its file in ``benchmarks/results``.
    rows : sequence of mapping
        One per table line. The keys of the first row are the columns; further keys of other rows
        reach the JSON only.
    notes : sequence of str
        Lines below the table: what a reader must know to judge it.
    json_path : path, optional
        Instead of ``benchmarks/results/<name>.json``.
    seed : int
        Recorded with the result.
    quick : bool
        The run was a trial: nothing is written unless ``json_path`` says where.

    Returns
    -------
    Path or None
        The file written.
    """
    print("\n".join([f"{name}", table(rows), *notes]))
    if json_path is None and quick:
        return None
    path = RESULTS / f"{name}.json" if json_path is None else Path(json_path)
    result = {
        "name": name,
        "rows": [{key: _plain(value) for key, value in row.items()} for row in rows],
        "notes": list(notes),
        "versions": _versions(),
        "machine": _machine(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": _command(name),
        "seed": seed,
        "quick": quick,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Lay rows out in aligned columns, numbers to the right.

    Parameters
    ----------
    rows : sequence of mapping
        The keys of the first one are the columns; a key that a later row lacks stays blank.

    Returns
    -------
    str
        Header, rule and lines, without a final newline.
    """
    if not rows:
        return "(no rows)"
    columns = list(rows[0])
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    right = [
        all(isinstance(row.get(column), (int, float, np.number, type(None))) for row in rows)
        for column in columns
    ]

    def line(texts: Sequence[str]) -> str:
        padded = (
            text.rjust(width) if flush else text.ljust(width)
            for text, width, flush in zip(texts, widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    return "\n".join([line(columns), "  ".join("-" * w for w in widths), *map(line, cells)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, (float, np.floating)):
        number = float(value)
        if number and not 1e-3 <= abs(number) < 1e6:
            return f"{number:.3g}"
        return f"{number:.4g}" if abs(number) < 1000 else f"{number:,.0f}"
    return str(value)


def _plain(value: Any) -> Any:
    """Return what JSON can hold: NumPy scalars as Python's, NaN and infinity as text."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def _versions() -> dict[str, str]:
    versions = {
        "pagedtq": pagedtq.__version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "msgspec": metadata.version("msgspec"),
    }
    for peer in _PEERS:
        module = sys.modules.get(peer)
        if module is not None:
            versions[peer] = str(getattr(module, "__version__", "unknown"))
    return versions


def _machine() -> dict[str, Any]:
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for entry in cpuinfo.read_text(encoding="utf-8").splitlines():
            if entry.startswith("model name"):
                model = entry.partition(":")[2].strip()
                break
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return {"cpu": model, "cores": cores, "system": f"{platform.system()} {platform.machine()}"}


def _command(name: str) -> str:
    # argv[0] is the module's path on this machine; the command a reader can repeat is `-m`.
    return shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])
