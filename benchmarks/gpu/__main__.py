"""Everything that needs a CUDA device, in one command of less than eight minutes.

Measures ceilings and operations, beside attention on bfloat16 in the same run; then runs the GPU
suite, and compute-sanitizer where it is installed. Prints tables and writes
``benchmarks/results/gpu-<device>.json`` after every stage, so that a run cut short keeps what it
has. Without a device it says so and exits with code 3.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import Times, ceiling_row, file_name, row_of, verdict
from benchmarks.gpu.stages import (
    find_sanitizer,
    pytest_command,
    run_stage,
    sanitizer_command,
    skipped,
)
from benchmarks.gpu.workloads import Workload, fitting, full, quick
from benchmarks.report import RESULTS, table
from pagedtq.backends.cupy_device import CupyDevice
from pagedtq.errors import BackendUnavailable
from pagedtq.telemetry import benchmark_receipt

#: Exit code where there is no device: nothing was measured, nothing failed.
NO_DEVICE = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse(argv)
    try:
        device = CupyDevice()
    except BackendUnavailable as error:
        print(f"not measured: {error}", file=sys.stderr)
        return NO_DEVICE
    started = time.perf_counter()
    report = Report(device.name, options)

    def left() -> float:
        return 60 * options.minutes - (time.perf_counter() - started)

    rows, notes = measure_all(device, options, left)
    report.write(rows, notes)
    suite = pytest_command(*(["-k", "k4v4"] if options.quick else []))
    report.add(run_stage("GPU suite", suite, left()))
    path = find_sanitizer()
    for tool in ("memcheck", "racecheck"):
        name = f"compute-sanitizer {tool}"
        if path is None:
            report.add(skipped(name, "compute-sanitizer is not installed"))
        elif left() < 20:
            report.add(skipped(name, f"{options.minutes} minutes are over"))
        else:
            command = sanitizer_command(tool, path)
            report.add(run_stage(name, command, left() / 2, {"PAGEDTQ_GPU_POOL": "off"}))
    print(table([{k: stage[k] for k in ("stage", "state", "seconds")} for stage in report.stages]))
    return verdict(report.stages)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the options."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="where to write the JSON")
    parser.add_argument("--quick", action="store_true", help="small sizes; keeps no JSON")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random inputs")
    parser.add_argument("--minutes", type=float, default=7.5, help="stop what runs longer")
    return parser.parse_args(argv)


class Report:
    """What is known so far, on disk after every stage."""

    def __init__(self, device: str, options: argparse.Namespace) -> None:
        self.name, self.device, self.options = file_name(device), device, options
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.stages: list[dict[str, Any]] = []

    def write(self, rows: list[dict[str, Any]], notes: list[str]) -> None:
        """Keep and print what was measured."""
        self.rows, self.notes = rows, [f"device: {self.device}", *notes]
        print("\n".join([self.name, table(rows), *self.notes]))
        self.save()

    def add(self, stage: dict[str, Any]) -> None:
        """Keep and print how a stage ended."""
        self.stages.append(stage)
        print(f"{stage['stage']}: {stage['state']}, {stage['seconds']:.0f} s {stage['tests']}")
        if "output" in stage:
            print(stage["output"], file=sys.stderr)
        self.save()

    def save(self) -> None:
        """Write the JSON."""
        if self.options.json is None and self.options.quick:
            return
        receipt = benchmark_receipt(
            self.name,
            self.rows,
            command="python -m benchmarks.gpu",
            notes=self.notes,
            seed=self.options.seed,
            quick=self.options.quick,
            inputs=[part.read_bytes() for part in sorted(Path(__file__).parent.glob("*.py"))],
        )
        answer = json.loads(receipt.to_json()) | {"device": self.device, "stages": self.stages}
        path = self.options.json or RESULTS / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(answer, indent=2) + "\n", encoding="utf-8")


def measure_all(
    device: CupyDevice, options: argparse.Namespace, left: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    """Measure ceilings, then workloads until three minutes are left for the other stages."""
    from benchmarks.gpu.device_timing import ceilings, measure

    cupy = device.xp
    size = 1 << (24 if options.quick else 30)
    found = ceilings(cupy, device, size)
    rows = [ceiling_row(name, nbytes, times) for name, (nbytes, times) in found.items()]
    copy_rate = next(row["GB/s"] for row in rows if row["how"] == "device copy")
    free = cupy.cuda.runtime.memGetInfo()[0]
    fit, large = fitting(quick() if options.quick else full(), free)
    notes = [f"not measured, too large: {row}" for row in large]
    baselines: dict[tuple[int, int], Times | None] = {}
    for number, workload in enumerate(fit):
        if left() < 60 * min(4.5, options.minutes / 2):
            notes += [f"not measured, out of time: {row}" for row in fit[number:]]
            break
        base = None
        if workload.operation == "attend":
            shape = workload.batch, workload.tokens
            if shape not in baselines:
                baselines[shape] = _baseline(cupy, workload, rows, notes)
            base = baselines[shape]
        rows += _measured(device, workload, options.seed, copy_rate, base, measure)
        # Calls and what they captured refer to each other.
        gc.collect()
        cupy.get_default_memory_pool().free_all_blocks()
    return rows, notes


def _measured(
    device: CupyDevice,
    workload: Workload,
    seed: int,
    copy_rate: float,
    base: Times | None,
    measure: Any,
) -> list[dict[str, Any]]:
    from benchmarks.gpu.operations import Prepared

    prepared = Prepared(workload, device, seed)
    calls = {"as a graph": prepared.captured, "eager": prepared.eager}
    rows = []
    for how, call in calls.items():
        if call is not None:
            rows.append(row_of(workload, how, measure(device.xp, call), copy_rate, base))
    return rows


def _baseline(
    cupy: Any, workload: Workload, rows: list[dict[str, Any]], notes: list[str]
) -> Times | None:
    """Measure bfloat16 attention; return its best form's times, and add rows."""
    from benchmarks.gpu.device_timing import measure, torch_baselines

    calls, reason = torch_baselines(workload)
    if reason is not None:
        note = f"no bfloat16 baseline: {reason}"
        if note not in notes:
            notes.append(note)
        return None
    import torch

    best: Times | None = None
    # Nobody chose a stream: both libraries use the default one, and one pair of events times both.
    while calls:
        name, call = calls.popitem()
        times = measure(cupy, call)
        row = {**ceiling_row(name, workload.bf16_bytes(), times), "operation": "baseline"}
        rows.append(row | {"batch": workload.batch, "tokens": workload.tokens})
        best = times if best is None or times.median < best.median else best
    del call
    torch.cuda.empty_cache()
    return best


if __name__ == "__main__":
    sys.exit(main())
