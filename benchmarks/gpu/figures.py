"""From times to figures: medians, bandwidths, shares of a ceiling, ratios. Pure arithmetic."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.gpu.workloads import Workload


class Times(NamedTuple):
    """Seconds of one call, several times."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Of all calls."""
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        """The fastest call."""
        return min(self.seconds)


def row_of(
    workload: Workload,
    how: str,
    times: Times,
    copy_gb_per_s: float | None,
    baseline: Times | None = None,
) -> dict[str, Any]:
    """Describe one measurement.

    ``copy_gb_per_s`` is the ceiling in bytes read plus bytes written; ``baseline`` the same
    attention in bfloat16, measured in the same run.
    """
    speed = workload.bytes_moved() / times.median / 1e9
    return {
        "operation": workload.operation,
        "format": workload.form,
        "batch": workload.batch,
        "tokens": workload.tokens,
        "how": how,
        "ms median": 1e3 * times.median,
        "ms best": 1e3 * times.best,
        "GB moved": workload.bytes_moved() / 1e9,
        "GB/s": speed,
        "of copy bandwidth": speed / copy_gb_per_s if copy_gb_per_s else None,
        "speed vs torch bf16": baseline.median / times.median if baseline is not None else None,
    }


def ceiling_row(name: str, nbytes: int, times: Times) -> dict[str, Any]:
    """Describe a ceiling: ``nbytes`` counts what is read and what is written."""
    return {
        "operation": "ceiling",
        "format": "",
        "batch": 1,
        "tokens": 0,
        "how": name,
        "ms median": 1e3 * times.median,
        "ms best": 1e3 * times.best,
        "GB moved": nbytes / 1e9,
        "GB/s": nbytes / times.median / 1e9,
        "of copy bandwidth": None,
        "speed vs torch bf16": None,
    }


def file_name(device: str) -> str:
    """Return the name of a device's result file: ``NVIDIA H200`` becomes ``gpu-nvidia-h200``."""
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def suite_counts(output: str) -> dict[str, int]:
    """Read ``passed``, ``failed``, ``skipped``, ``error`` from the end of pytest's output."""
    words = re.findall(r"(\d+) (passed|failed|skipped|error)", output.rstrip().rpartition("\n")[2])
    return {word: int(count) for count, word in words}


def verdict(stages: Sequence[Mapping[str, Any]]) -> int:
    """Return the exit code: 0 if every stage that ran passed, 1 otherwise."""
    return int(any(stage["state"] == "failed" for stage in stages))
