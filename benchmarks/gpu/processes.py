"""What runs as a process of its own: a fault of one stage leaves the others alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import suite_counts

ROOT = Path(__file__).parents[2]

#: What is small enough to run under compute-sanitizer: every kind of kernel first, then claims.
SMALL = "a_little or prefix or captured or swapped or caps"
SMALL_FILES = ("tests/gpu/test_device_checked.py", "tests/gpu/test_device_backend.py")
_PLACES = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/cuda/bin")


def pytest_command(*options: str, files: Sequence[str] = ("tests/gpu",)) -> list[str]:
    """Return the command of the GPU suite, or of some of its files."""
    return [sys.executable, "-m", "pytest", *files, "-q", "-p", "no:cacheprovider", *options]


def parallel_options() -> list[str]:
    """Return pytest's options for several processes on one device, where that is installed.

    Most of their time goes to the host's side of a comparison.
    """
    workers = max(2, min(12, (os.cpu_count() or 2) - 2))
    return ["-n", str(workers)] if importlib.util.find_spec("xdist") is not None else []


def find_sanitizer() -> str | None:
    """Return compute-sanitizer's path; None if it is not installed."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        return found
    return next((f for p in _PLACES if os.access(f := f"{p}/compute-sanitizer", os.X_OK)), None)


def sanitizer_command(tool: str, path: str) -> list[str]:
    """Return the command of one tool over the small part of the suite."""
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    return [path, *options, *pytest_command("-x", "-k", SMALL, files=SMALL_FILES)]


def simulate_command(report: Path, quick: bool) -> list[str]:
    """Return the command that stores and decodes an 8B model's requests for real."""
    counts = ("2", "2") if quick else ("16", "8")
    return [
        *(sys.executable, "-m", "pagedtq", "simulate", "--model", "llama-3.1-8b"),
        *("--formats", "fp16,k4v4", "--requests", "64", "--budget", "128GiB"),
        *("--execute", counts[0], "--execute-steps", counts[1], "--backend", "cuda"),
        *("--no-plots", "--json", "--out", str(report)),
    ]


def run_stage(
    name: str,
    command: Sequence[str],
    seconds: float,
    extra: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Run a command and describe how it ended.

    Returns
    -------
    dict
        ``stage``, ``state`` (``passed``, ``failed``, ``out of time``), ``seconds``, ``tests``, the
        end of its ``output``.
    """
    begin = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PAGEDTQ_REQUIRE_GPU": "1", **(extra or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, seconds))
        state = "passed" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        # What it started goes too: it would hold the device's memory.
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        state = "out of time"
    return {
        "stage": name,
        "state": state,
        "seconds": time.perf_counter() - begin,
        "tests": suite_counts(output),
        "output": output[-4000:],
    }


def skipped(name: str, reason: str) -> dict[str, Any]:
    """Describe a stage that did not run."""
    return {"stage": name, "state": f"not run: {reason}", "seconds": 0.0, "tests": {}, "output": ""}
