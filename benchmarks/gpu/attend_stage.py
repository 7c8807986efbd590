"""Stage ``attend``: attention over compressed pages beside plain pages, shape by shape."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from benchmarks.gpu.baselines import PLAIN, Builder, shape_of
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.figures import Times, crossover, ratios, time_columns
from benchmarks.gpu.operations import Prepared
from benchmarks.gpu.workloads import Workload, at_size, attend_rows

#: Where the trace lies if somebody put it there.
TRACES = Path(os.environ.get("PAGEDTQ_TRACES", Path(__file__).parents[3] / "shared" / "traces"))
TRACE = TRACES / "AzureLLMInferenceTrace_conv_2023.csv"
# Seconds that a shape with its baselines may need.
_SHAPE_SECONDS = 4.0


def attend(bench: Bench) -> None:
    """Measure every workload, those with figures to reach first."""
    known: dict[Workload, dict[str, Times]] = {}
    rows = chosen(bench)
    if not bench.peers(shape_of(rows[0])):
        bench.note("no other library's times: the best of a type is our own plain kernel")
    for row in rows:
        shape = shape_of(row)
        if shape not in known and bench.left() > _SHAPE_SECONDS:
            known[shape] = bench.peers(shape) | measure_baselines(bench, shape)
        bench.attempt(
            row.label(), lambda row=row, shape=shape: one(bench, row, known.get(shape, {}))
        )
    for line in crossover(bench.rows):
        bench.row({"operation": "crossover", "format": "k4v4"}, **line)


def one(bench: Bench, row: Workload, base: dict[str, Times]) -> None:
    """Measure a workload, as a graph and, where a figure is asked for, as a program calls it."""
    if not bench.fits(row.label(), row.memory()):
        return
    prepared = Prepared(row, bench.device, bench.seed)
    assert prepared.graph is not None
    times = bench.meter.measure(prepared.graph, prepared.calls)
    columns = time_columns(times, row.bytes_moved(), bench.copy_rate)
    bench.row(row.label(), how="graph", **columns, **ratios(times, base))
    if is_bar(row):
        eager = bench.meter.measure(prepared.eager)
        columns = time_columns(eager, row.bytes_moved(), bench.copy_rate)
        bench.row(row.label(), how="eager", **columns)


def measure_baselines(bench: Bench, shape: Workload) -> dict[str, Times]:
    """Time our own plain kernels at a shape; of each type the better cut counts."""
    found: dict[str, Times] = {}
    for name, build in PLAIN.items():
        times = time_baseline(bench, name, build, shape)
        if times is not None:
            short = name.partition(" /")[0]
            best = found.get(short)
            if best is None or times.median < best.median:
                found[short] = times
    return found


def time_baseline(bench: Bench, name: str, build: Builder, shape: Workload) -> Times | None:
    """Set a baseline up, time it and free it; None, and a row with the reason, if it fails."""
    label = {**shape.label(), "operation": "baseline", "format": "", "how": name}

    def work() -> Times | None:
        # Pools are drawn with float32 arrays beside them.
        if not bench.fits(label, shape.bf16_bytes() + (3 << 30)):
            return None
        base = build(bench.device, shape)
        return bench.timed(label, base.call, base.calls, base.nbytes)

    return bench.attempt(label, work)


def is_bar(row: Workload) -> bool:
    """Whether a figure is asked for at this shape, so that peers are measured too."""
    shapes = ((64, 32768), (1, 8192))
    long = (row.batch, row.tokens) in shapes and not row.lengths
    return long and row.page == 64 and row.dim == 128 and row.group in (4, 8)


def chosen(bench: Bench) -> list[Workload]:
    """Return the workloads of a size."""
    return at_size(attend_rows(azure_lengths(bench)), bench.size)


def azure_lengths(bench: Bench) -> tuple[int, ...]:
    """Return lengths of requests in the middle of their output; none without the trace."""
    if not TRACE.exists():
        bench.note("ragged lengths: not measured, there is no Azure trace beside the repository")
        return ()
    from pagedtq.sim.traces import read_trace

    trace = read_trace(f"azure:{TRACE}")
    lengths = trace.prompt_tokens + trace.output_tokens // 2
    picked = np.random.default_rng(0).permutation(len(lengths))[:320]
    return tuple(lengths[picked].tolist())
