"""From times to figures: medians, spreads, bandwidths, ratios. Pure arithmetic."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple


class Times(NamedTuple):
    """Seconds of one call, measured several times."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of all rounds."""
        return statistics.median(self.seconds)

    def percentile(self, share: float) -> float:
        """Return the round that ``share`` of them do not exceed."""
        ranked = sorted(self.seconds)
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))]


def time_columns(times: Times, nbytes: int, copy_rate: float | None = None) -> dict[str, Any]:
    """Describe a measurement of something that moves ``nbytes``.

    ``copy_rate`` is the ceiling in bytes per second, read plus written.
    """
    rate = nbytes / times.median
    return {
        "us": 1e6 * times.median,
        "us p10": 1e6 * times.percentile(0.1),
        "us p90": 1e6 * times.percentile(0.9),
        "GB/s": rate / 1e9,
        "of copy": rate / copy_rate if copy_rate else None,
    }


def ratios(times: Times, baselines: Mapping[str, Times]) -> dict[str, float]:
    """Return how many times faster a call is than each baseline, and than the best of a kind."""
    rows = {f"x {name}": other.median / times.median for name, other in baselines.items()}
    for kind in ("bf16", "fp8"):
        best = [other.median for name, other in baselines.items() if kind in name.split()]
        if best:
            rows[f"x best {kind}"] = min(best) / times.median
    return rows


def crossover(rows: Iterable[Mapping[str, Any]], form: str = "k4v4") -> list[dict[str, Any]]:
    """Return, per batch size of the grid, the contexts at which bfloat16 is faster, and not."""
    found: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        plain = tuple(row.get(name) for name in ("format", "group", "d", "page", "lengths"))
        if plain == (form, 4, 128, 64, "equal") and row.get("x best bf16") is not None:
            found.setdefault(row["batch"], []).append((row["tokens"], row["x best bf16"]))
    return [
        {
            "batch": batch,
            "bf16 faster up to": max((t for t, x in pairs if x < 1), default=0),
            f"{form} faster from": min((t for t, x in pairs if x >= 1), default=None),
            **{f"{tokens} tokens": ratio for tokens, ratio in sorted(pairs)},
        }
        for batch, pairs in sorted(found.items())
    ]


def file_name(device: str) -> str:
    """Return the name of a device's result file: ``NVIDIA H200`` becomes ``gpu-nvidia-h200``."""
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def suite_counts(output: str) -> dict[str, int]:
    """Read ``passed``, ``failed``, ``skipped``, ``error`` from the end of pytest's output."""
    words = re.findall(r"(\d+) (passed|failed|skipped|error)", output.rstrip().rpartition("\n")[2])
    return {word: int(count) for count, word in words}


#: Stages that show that results are right. A run in which one did not pass has not shown it.
SHOWING = ("correctness", "suite", "memcheck", "racecheck")

#: Exit codes of a run: all is well, something failed, nothing failed but correctness was not shown.
PASSED, FAILED, NOT_SHOWN = 0, 1, 4


def verdict(stages: Sequence[Mapping[str, Any]]) -> int:
    """Return the exit code of a run, from the stages that were asked for.

    A stage of `SHOWING` that ran out of time, or did not run, shows nothing: that is no success.
    """
    states = {stage["stage"]: stage["state"] for stage in stages}
    if "failed" in states.values():
        return FAILED
    return PASSED if not unshown(stages) else NOT_SHOWN


def unshown(stages: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what was asked for to show correctness and did not, with the reason."""
    return [
        f"{stage['stage']}: {stage['state']}"
        for stage in stages
        if stage["stage"] in SHOWING and stage["state"] != "passed"
    ]
