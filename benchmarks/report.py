"""What every benchmark shares: its options, its table on the screen, its JSON with the conditions.

A result without its conditions cannot be compared, so the JSON always names versions, machine,
date, command and seed. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pagedtq.telemetry import benchmark_receipt

RESULTS = Path(__file__).parent / "results"


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
    source = Path(__file__).with_name(f"{name}.py")
    receipt = benchmark_receipt(
        name,
        rows,
        command=_command(name),
        notes=notes,
        seed=seed,
        quick=quick,
        # All inputs follow from the program and its seed.
        inputs=[source.read_bytes()] if source.is_file() else [],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(receipt.to_json())
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


def _command(name: str) -> str:
    # argv[0] is the module's path on this machine; the command a reader can repeat is `-m`. Where
    # the result went is a path of this machine too.
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--json")
    rest = given.parse_known_args()[1]
    return shlex.join(["python", "-m", f"benchmarks.{name}", *rest])
