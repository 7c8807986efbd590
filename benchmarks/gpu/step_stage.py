"""Stage ``step``: a whole decode step of 32 layers in one graph, up to a pool of 128 GiB."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.operations import Prepared, drawn
from benchmarks.gpu.workloads import LAYERS, Workload, at_size
from pagedtq.paging.layout import PageLayout

#: Memory whose largest batch is looked for, and the context of every sequence in it.
BUDGET, CONTEXT = 128 << 30, 8192


class Step(NamedTuple):
    """A decode step, both ways.

    Attributes
    ----------
    graph, eager : callable
        Store a token of every sequence and attend, all layers.
    """

    graph: Callable[[], Any]
    eager: Callable[[], Any]


def step(bench: Bench) -> None:
    """Measure steps of several sizes, then the largest that fits."""
    for form in ("k4v4", "exact"):
        for batch, tokens in ((1, 64), (1, 8192), (64, 4096)):
            row = Workload("step", form, batch, tokens, layers=LAYERS)
            (row,) = at_size([row], bench.size)
            bench.attempt(row.label(), lambda row=row: one(bench, row))
    for form in ("k4v4", "exact"):
        (row,) = at_size([largest(form, BUDGET)], bench.size)
        bench.attempt(row.label(), lambda row=row: one(bench, row, "128 GiB pool"))


def largest(form: str, budget: int) -> Workload:
    """Return the step with as many sequences of `CONTEXT` tokens as pages of a budget hold."""
    row = Workload("step", form, 1, CONTEXT, layers=LAYERS)
    pages = budget // PageLayout(row.config()).page_bytes - 1
    return row._replace(batch=max(1, pages // int(row.blocks[0])))


def one(bench: Bench, row: Workload, what: str = "") -> None:
    """Measure a step."""
    layout = PageLayout(row.config())
    if not bench.fits(row.label(), layout.pool_bytes + (2 << 30)):
        return
    made = make_step(bench, row)
    for how, call in made._asdict().items():
        times = bench.meter.measure(call)
        bench.row(
            row.label(),
            how=how,
            what=what,
            **{
                "us": 1e6 * times.median,
                "us p10": 1e6 * times.percentile(0.1),
                "us p90": 1e6 * times.percentile(0.9),
                "us per layer": 1e6 * times.median / row.layers,
                "steps/s": 1 / times.median,
                "tokens/s": row.batch / times.median,
                "of copy": row.lens.sum() * layout.token_bytes / times.median / bench.copy_rate,
                "pool GiB": layout.pool_bytes / (1 << 30),
            },
        )


def make_step(bench: Bench, row: Workload) -> Step:
    """Fill the pages and capture a step."""
    prepared = Prepared(row, bench.device, bench.seed, fill=True)
    device, backend = prepared.device, prepared.backend
    table, reads = next(prepared.tables()), prepared.reads()
    plan = backend.plan(*table.shape)
    plan.update(table, reads)
    queries = prepared.queries()
    out, lse = (device.zeros(shape, np.float32) for shape in (queries.shape, queries.shape[:2]))
    keys, values = drawn(device, row.batch, row.heads, row.dim)
    last = (row.lens - 1) % row.page + row.page * table[np.arange(row.batch), row.blocks - 1]
    mapping = device.upload(last.astype(np.int64))

    def layers() -> None:
        for layer in range(row.layers):
            backend.store(layer, keys, values, mapping)
            plan.attend(layer, queries, row.dim**-0.5, out=out, lse=lse)

    layers()
    with device.capture() as graph:
        layers()
    return Step(graph.launch, layers)
