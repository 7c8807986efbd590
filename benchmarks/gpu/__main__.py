"""Everything that needs a CUDA device, in one command of less than eight minutes.

Each stage is a process of its own with its share of the time: a fault, a hang or a missing library
costs that stage, and what it had measured until then is kept. After every stage the tables are
printed and ``benchmarks/results/gpu-<device>.json`` is written. ``--only`` picks stages.

Exit codes: 0 if nothing failed and every stage that was asked for and shows correctness passed; 1
if anything failed; 4 if nothing failed and correctness was not shown all the same, because a stage
ran out of time or lacks what it needs; 3 without a device.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.figures import SHOWING, file_name, unshown, verdict
from benchmarks.gpu.peer_folder import use_folder
from benchmarks.gpu.peer_stages import keep
from benchmarks.gpu.processes import (
    find_sanitizer,
    parallel_options,
    pytest_command,
    run_stage,
    sanitizer_command,
    simulate_command,
    skipped,
)
from benchmarks.report import RESULTS, table
from pagedtq.backends.cupy_device import missing_cuda
from pagedtq.telemetry import benchmark_receipt

#: Exit code where there is no device: nothing was measured, nothing failed.
NO_DEVICE = 3

#: File in which other libraries' times reach stage ``attend``.
PEER_TIMES = "peer-times.json"

#: Stages in order, with their share of 7.6 minutes; what one leaves over the next ones may use.
STAGES = {
    "build": 50.0,
    "ceilings": 10.0,
    "correctness": 34.0,
    "sdpa": 16.0,
    "flashinfer": 22.0,
    "vllm": 24.0,
    "attend": 92.0,
    "operations": 40.0,
    "step": 32.0,
    "simulate": 22.0,
    "suite": 58.0,
    "memcheck": 28.0,
    "racecheck": 28.0,
}
# A process may take so long to start, and to end after its last measurement.
_GRACE = 12.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    options = parse(argv)
    missing = missing_cuda()
    if missing is not None:
        print(f"not measured: the CUDA backend needs CuPy and a device: {missing}", file=sys.stderr)
        return NO_DEVICE
    for folder in options.peers:
        use_folder(folder)
    if options.inside:
        return inside(options)
    report = Report(options)
    begin = time.perf_counter()
    wanted = {name: STAGES[name] for name in STAGES if name in (options.only or STAGES)}
    scale = 60 * options.minutes / sum(wanted.values())
    ahead = 0.0
    with tempfile.TemporaryDirectory() as scratch:
        for name, share in wanted.items():
            ahead += share * scale
            seconds = ahead - (time.perf_counter() - begin)
            if seconds < 5:
                report.add(skipped(name, f"{options.minutes:g} minutes are over"))
                continue
            keep(report.rows, Path(scratch) / PEER_TIMES)
            report.add(*run_one(name, seconds, options, Path(scratch)))
    print(table([{k: stage[k] for k in ("stage", "state", "seconds")} for stage in report.stages]))
    left = [name for name in SHOWING if name not in wanted]
    for reason in [*unshown(report.stages), *(f"{name}: not asked for" for name in left)]:
        print(f"correctness not shown by {reason}", file=sys.stderr)
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
    parser.add_argument("--minutes", type=float, default=7.6, help="begin nothing after these")
    parser.add_argument(
        "--only", type=_stages, metavar="STAGE,...", help=f"of {', '.join(STAGES)}; all by default"
    )
    parser.add_argument(
        "--peers", type=Path, action="append", default=[], metavar="FOLDER",
        help="what prepare_flashinfer and prepare_vllm wrote",
    )  # fmt: skip
    parser.add_argument("--inside", choices=tuple(STAGES), help=argparse.SUPPRESS)
    parser.add_argument("--peer-times", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _stages(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in STAGES:
            raise argparse.ArgumentTypeError(f"no stage {name!r}; there are {', '.join(STAGES)}")
    return names


def inside(options: argparse.Namespace) -> int:
    """Run one stage in this process."""
    from benchmarks.gpu.correctness_stage import INSIDE
    from benchmarks.gpu.device_timing import CudaMeter
    from benchmarks.gpu.peer_stages import known
    from pagedtq.backends.cupy_device import CupyDevice

    device = CupyDevice()
    size = "quick" if options.quick else "full"
    bench = Bench(
        options.inside,
        device,
        CudaMeter(device),
        options.seconds,
        size,
        options.seed,
        options.json,
        partial(known, options.peer_times),
    )
    INSIDE[options.inside](bench)
    bench.finish()
    return int(bench.state == "failed")


def run_one(
    name: str, seconds: float, options: argparse.Namespace, scratch: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run one stage as a process; return how it ended and what it found."""
    known: dict[str, Any] = {}
    if name == "suite":
        picked = ["-k", "k4v4"] if options.quick else []
        return run_stage(name, pytest_command(*parallel_options(), *picked), seconds), known
    if name in ("memcheck", "racecheck"):
        path = find_sanitizer()
        if path is None:
            return skipped(name, "compute-sanitizer is not installed"), known
        extra = {"PAGEDTQ_GPU_POOL": "off"}
        return run_stage(name, sanitizer_command(name, path), seconds, extra), known
    if name == "simulate":
        folder = scratch / "simulate"
        stage = run_stage(name, simulate_command(folder, options.quick), seconds)
        return stage, {"rows": simulated(folder)}
    path = scratch / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--inside", name, "--json", str(path)]
    command += ["--seconds", str(max(5.0, seconds - _GRACE)), "--seed", str(options.seed)]
    command += ["--quick"] * options.quick
    command += ["--peer-times", str(scratch / PEER_TIMES)]
    for folder in options.peers:
        command += ["--peers", str(folder.resolve())]
    stage = run_stage(name, command, seconds)
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
    if stage["state"] == "passed":
        # The process ended well; what it left out is for it to say.
        stage["state"] = known.get("state", "failed")
    return stage, known


def simulated(folder: Path) -> list[dict[str, Any]]:
    """Read what ``pagedtq simulate --execute`` measured."""
    rows = []
    for path in sorted(folder.glob("*.json")):
        for form in json.loads(path.read_text(encoding="utf-8")).get("formats", []):
            if form.get("execution"):
                rows.append({"stage": "simulate", "format": form["name"], **form["execution"]})
    return rows


class Report:
    """What is known so far, on disk after every stage."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, "unknown device"
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.stages: list[dict[str, Any]] = []

    def add(self, stage: dict[str, Any], known: dict[str, Any] | None = None) -> None:
        """Keep and print how a stage ended, and what it found."""
        known = known or {}
        self.device = known.get("device", self.device)
        rows = known.get("rows", [])
        self.rows += rows
        self.notes += [note for note in known.get("notes", []) if note not in self.notes]
        self.stages.append(stage)
        print(f"\n{stage['stage']}: {stage['state']}, {stage['seconds']:.0f} s {stage['tests']}")
        for columns in {tuple(row): None for row in rows}:
            print(table([row for row in rows if tuple(row) == columns]))
        if stage["state"] != "passed":
            print(stage["output"], file=sys.stderr)
        sys.stdout.flush()
        self.save()

    def save(self) -> None:
        """Write the JSON."""
        if self.options.json is None and self.options.quick:
            return
        name = file_name(self.device)
        here = Path(__file__).parent
        receipt = benchmark_receipt(
            name,
            self.rows,
            command="python -m benchmarks.gpu",
            notes=self.notes,
            seed=self.options.seed,
            quick=self.options.quick,
            inputs=[
                path.read_bytes() for path in sorted(here.rglob("*.*")) if path.suffix in _CODE
            ],
        )
        answer = json.loads(receipt.to_json()) | {"device": self.device, "stages": self.stages}
        path = self.options.json or RESULTS / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(answer, indent=2) + "\n", encoding="utf-8")


_CODE = (".py", ".cu", ".cuh")

if __name__ == "__main__":
    sys.exit(main())
