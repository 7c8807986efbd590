"""A device's result as Markdown: bars first, then what every stage measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]
Markdown = Callable[[list[Any], tuple[str, ...]], str]

NOT_MEASURED = (
    "**Not measured**: no result of a CUDA device is committed. `python -m benchmarks.gpu` on a "
    "machine with one writes it."
)


class Bar(NamedTuple):
    """A figure to reach.

    Attributes
    ----------
    what : str
        For people.
    where : mapping
        Columns that pick the row.
    column : str
        Its figure.
    limit : float
        The least of it, or the most if ``at_most``.
    at_most : bool
    """

    what: str
    where: Mapping[str, Any]
    column: str
    limit: float
    at_most: bool = False


def _attend(form: str, group: int, **where: Any) -> dict[str, Any]:
    shape = {"stage": "attend", "operation": "attend", "how": "graph", "batch": 64, "page": 64}
    return {**shape, "tokens": 32768, "d": 128, "format": form, "group": group, **where}


def _other(operation: str, how: str, **where: Any) -> dict[str, Any]:
    return {"stage": "operations", "operation": operation, "how": how, "format": "k4v4", **where}


_LONG = "64 sequences of 32 k tokens"
#: In the order of the page.
BARS = (
    *(
        bar
        for g in (4, 8)
        for bar in (
            Bar(f"k4v4, {_LONG}, group {g}: of copy bandwidth", _attend("k4v4", g), "of copy", 0.8),
            Bar(f"k4v4, group {g}: times the best bf16", _attend("k4v4", g), "x best bf16", 3.0),
            Bar(f"k4v4, group {g}: times the best fp8", _attend("k4v4", g), "x best fp8", 1.5),
            Bar(f"k3v3, group {g}: times the best bf16", _attend("k3v3", g), "x best bf16", 3.8),
            Bar(f"k2v2, group {g}: times the best bf16", _attend("k2v2", g), "x best bf16", 5.0),
        )
    ),
    Bar(
        "k4v4, group 4: times vLLM's Triton TurboQuant of the same bytes",
        _attend("k4v4", 4),
        "x vLLM turboquant_4bit_nc",
        4.0,
    ),
    Bar(
        "k4v4, 1 sequence of 8 k tokens: times the best bf16",
        _attend("k4v4", 4, batch=1, tokens=8192),
        "x best bf16",
        1.0,
    ),
    Bar(
        "exact window of 64 tokens and 4 sinks: slower by %",
        {"stage": "operations", "operation": "window on against off", "tokens": 32768},
        "slower %",
        5.0,
        True,
    ),
    Bar(
        "store, 8 192 tokens: of copy bandwidth", _other("store", "graph", batch=1), "of copy", 0.6
    ),
    Bar("store, a step of 64 sequences: us", _other("store", "graph", batch=64), "us", 6.0, True),
    Bar("score: of copy bandwidth", _other("score", "graph"), "of copy", 0.85),
    Bar("copy of pages of 32 layers: of copy bandwidth", _other("copy", "graph"), "of copy", 0.9),
    Bar("swap out: of a plain pinned copy", _other("swap", "swap out"), "of plain copy", 0.85),
)

#: Stage, what its table answers, its columns, and which rows it shows.
TABLES: tuple[tuple[str, str, tuple[str, ...], Callable[[Row], bool]], ...] = (
    (
        "ceilings",
        "Ceilings",
        (
            "how",
            "us",
            "GB/s",
            "T operations/s",
            "warp instructions per clock and SM",
            "unit",
        ),
        lambda row: True,
    ),
    (
        "attend",
        "Attention",
        (
            *("format", "batch", "tokens", "group", "d", "page", "lengths", "how", "us", "us p10"),
            *("us p90", "GB/s", "of copy", "x best bf16", "x best fp8"),
            *("x vLLM turboquant_4bit_nc",),
        ),
        lambda row: row["operation"] == "attend",
    ),
    (
        "attend",
        "Baselines",
        ("how", "batch", "tokens", "group", "d", "page", "lengths", "us", "GB/s", "of copy"),
        lambda row: row["operation"] == "baseline",
    ),
    (
        "attend",
        "Where bfloat16 stops being faster than k4v4 (ratios to the best bf16 by context)",
        (),
        lambda row: row["operation"] == "crossover",
    ),
    (
        "operations",
        "Other operations",
        (
            *("operation", "format", "batch", "tokens", "window", "pool", "how", "us", "us p10"),
            *("us p90", "GB/s", "of copy", "of plain copy", "slower %"),
        ),
        lambda row: True,
    ),
    (
        "step",
        "A decode step of 32 layers",
        (
            *("format", "batch", "tokens", "what", "how", "us", "us p10", "us p90", "us per layer"),
            *("steps/s", "tokens/s", "of copy", "pool GiB"),
        ),
        lambda row: True,
    ),
    ("simulate", "`pagedtq simulate --execute`", (), lambda row: True),
    (
        "correctness",
        "Against the host, on the same tokens",
        (
            *("operation", "format", "group", "d", "page", "window", "codes", "codes different"),
            *("norms different", "bytes different", "attend error", "lse error", "score error"),
            *("load error", "ok"),
        ),
        lambda row: True,
    ),
)


def bars(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Hold a result against the figures to reach."""
    lines = []
    for bar in BARS:
        found = [
            row[bar.column]
            for row in rows
            if row.get(bar.column) is not None
            and all(row.get(name) == value for name, value in bar.where.items())
        ]
        line: dict[str, Any] = {
            "what": bar.what,
            "bar": f"{'<=' if bar.at_most else '>='} {bar.limit:g}",
            "measured": "not measured",
            "reached": "",
        }
        if found:
            line["measured"] = found[0]
            reached = found[0] <= bar.limit if bar.at_most else found[0] >= bar.limit
            line["reached"] = "yes" if reached else "no"
        lines.append(line)
    return lines


def device_page(result: Mapping[str, Any], markdown: Markdown) -> str:
    """Return a device's sections, from a result and a way to write a table."""
    rows = result["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [
        f"`{result['command']}` on {result['date'][:10]}, {result['device']}; {versions}.",
        "#### Figures to reach",
        markdown(bars(rows), ()),
    ]
    for stage, title, columns, wanted in TABLES:
        some = [row for row in rows if row["stage"] == stage and "error" not in row and wanted(row)]
        if some:
            plain = [{k: v for k, v in row.items() if k != "stage"} for row in some]
            names = columns or tuple(dict.fromkeys(name for row in plain for name in row))
            parts += [f"#### {title}", markdown(plain, names)]
    missing = [row for row in rows if "error" in row]
    if missing:
        parts += ["#### Not measured", markdown([_reason(row) for row in missing], ())]
    states = ("stage", "state", "seconds", "tests")
    stages = [{**stage, "tests": _counts(stage["tests"])} for stage in result["stages"]]
    parts += ["#### Stages", markdown(stages, states)]
    return "\n\n".join([*parts, *(f"- {note}" for note in result["notes"])])


def _reason(row: Row) -> dict[str, Any]:
    names = ("how", "operation", "format", "batch", "tokens", "group", "d", "page", "what")
    what = ", ".join(f"{row[name]}" for name in names if row.get(name) not in (None, ""))
    return {"stage": row["stage"], "what": what, "reason": row["error"]}


def _counts(tests: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {word}" for word, count in tests.items())
