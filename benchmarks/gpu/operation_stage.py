"""Stage ``operations``: store, score, copies, swapping, the exact window, the order of the pool."""

from __future__ import annotations

import time

import numpy as np

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.figures import Times, time_columns
from benchmarks.gpu.operations import Prepared
from benchmarks.gpu.workloads import Workload, at_size, operation_rows


def operations(bench: Bench) -> None:
    """Measure every other operation with a figure to reach."""
    times: dict[Workload, Times] = {}
    for row in chosen(bench):
        measured = bench.attempt(row.label(), lambda row=row: one(bench, row))
        if measured is not None:
            times[row] = measured
    for row, taken in times.items():
        for field, first, what in (
            ("window", 0, "window on against off"),
            ("order", "layer_major", "page-major against layer-major"),
        ):
            other = times.get(row._replace(**{field: first}))
            if getattr(row, field) != first and other is not None:
                share = taken.median / other.median - 1
                bench.row({**row.label(), "operation": what}, **{"slower %": 100 * share})


def one(bench: Bench, row: Workload) -> Times | None:
    """Measure a workload as a graph, and as a program calls it."""
    if not bench.fits(row.label(), row.memory()):
        return None
    prepared = Prepared(row, bench.device, bench.seed)
    rates = (row.bytes_moved(), bench.copy_rate)
    times = None
    if prepared.graph is not None:
        times = bench.meter.measure(prepared.graph, prepared.calls)
        bench.row(row.label(), how="graph", **time_columns(times, *rates))
    if row.operation == "swap":
        _swap(bench, row, prepared)
    elif row.layers == 1 or row.operation == "copy":
        eager = bench.meter.measure(prepared.eager)
        bench.row(row.label(), how="eager", **time_columns(eager, *rates))
    return times


def _swap(bench: Bench, row: Workload, prepared: Prepared) -> None:
    """Time swapping against a plain copy of as many bytes to memory that is pinned already."""
    device, nbytes = bench.device, row.bytes_moved()
    plain, slabs = device.pinned((nbytes,), np.uint8), device.zeros((nbytes,), np.uint8)
    copies = bench.meter.measure(lambda: device.copy_out(plain, slabs))
    bench.row(row.label(), how="plain pinned copy", **time_columns(copies, nbytes))
    start = time.perf_counter()
    prepared.eager().wait()
    first = time.perf_counter() - start
    swaps = bench.meter.measure(prepared.eager)
    columns = time_columns(swaps, nbytes)
    share = copies.median / swaps.median
    bench.row(
        row.label(), how="swap out", **columns, **{"of plain copy": share, "first us": 1e6 * first}
    )


def chosen(bench: Bench) -> list[Workload]:
    """Return the workloads of a size."""
    return at_size(operation_rows(), bench.size)
