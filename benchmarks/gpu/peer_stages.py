"""Stages ``sdpa``, ``flashinfer``, ``vllm``: other libraries, at the shapes with figures to reach.

Each is a process of its own: a library that was built elsewhere may end the process it runs in, and
must not take our own figures along. What they measured goes to stage ``attend`` as a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu import flashinfer_peer, vllm_peer
from benchmarks.gpu.attend_stage import chosen, is_bar, time_baseline
from benchmarks.gpu.baselines import TORCH, Builder, import_torch, shape_of
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.figures import Times
from benchmarks.gpu.workloads import Workload

BUILDERS: dict[str, dict[str, Builder]] = {
    "sdpa": TORCH,
    "flashinfer": flashinfer_peer.BUILDERS,
    "vllm": vllm_peer.BUILDERS,
}
#: Error of quantisation, generously; wrong wiring makes it 1.
_LARGEST_ERROR = 0.4


def peer(library: str, bench: Bench) -> None:
    """Measure a library's calls at every shape with a figure to reach."""
    if library == "vllm":
        for preset in (vllm_peer.Preset(4, 4), vllm_peer.Preset(3, 3)):
            form = f"k{preset.key_bits}v{preset.value_bits}"
            label = {"operation": "vLLM turboquant against exact", "format": form}
            bench.attempt(label, partial(_check_vllm, bench, label, preset))
    shapes = dict.fromkeys(
        shape_of(row) for row in chosen(bench) if bench.size != "full" or is_bar(row)
    )
    for shape in shapes:
        for name, build in BUILDERS[library].items():
            time_baseline(bench, name, build, shape)


def _check_vllm(bench: Bench, label: Mapping[str, Any], preset: vllm_peer.Preset) -> None:
    import_torch()
    error = vllm_peer.error_of(preset)
    bench.row(label, **{"attend error": error}, ok=error < _LARGEST_ERROR)


def key_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what of a row says which shape it is of."""
    return tuple(row[name] for name in ("batch", "tokens", "group", "d", "page", "lengths"))


def keep(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Write what peers measured."""
    found = [row for row in rows if row.get("operation") == "baseline" and "us" in row]
    path.write_text(json.dumps(found), encoding="utf-8")


def known(path: Path | None, shape: Workload) -> dict[str, Times]:
    """Read what peers measured at a shape; nothing without a file."""
    if path is None or not path.exists():
        return {}
    wanted = key_of(shape.label())
    rows = json.loads(path.read_text(encoding="utf-8"))
    return {row["how"]: Times((1e-6 * row["us"],)) for row in rows if key_of(row) == wanted}
