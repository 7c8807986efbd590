"""Calls to measure, set up on a backend; the tests run them on a device made of host memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.gpu.workloads import DIM, GROUP, KV_HEADS, PAGE, Workload
from pagedtq.backends.cuda import CudaBackend
from pagedtq.paging.table_views import Reads

Call = Callable[[], Any]

# Tokens stored at a time while pages are filled.
_CHUNK = 8192


class Prepared:
    """A workload whose pages are filled.

    Parameters
    ----------
    workload : Workload
        What to run.
    device : Device
        Where.
    seed : int
        Of keys, values, queries and the order of pages.

    Attributes
    ----------
    eager : callable
        The call as a program makes it, argument checks included.
    captured : callable or None
        The same work as a captured graph; None for operations that go to the host.
    """

    def __init__(self, workload: Workload, device: Any, seed: int = 0) -> None:
        self.workload, self.device = workload, device
        self.rng = np.random.default_rng(seed)
        self.backend = CudaBackend(workload.config(), device=device)
        # Pages in no order, as after some hours of serving.
        self.order = 1 + self.rng.permutation(workload.pages - 1)
        self.captured: Call | None = None
        self.eager: Call = getattr(self, "_" + workload.operation)()

    def _fill(self) -> None:
        keys, values = self._tokens(min(_CHUNK, len(self.order) * PAGE))
        slots = (self.order[:, None] * PAGE + np.arange(PAGE)).reshape(-1)
        for begin in range(0, slots.size, len(keys)):
            part = slots[begin : begin + len(keys)]
            self.backend.store(0, keys[: part.size], values[: part.size], part)

    def _tokens(self, count: int) -> list[Any]:
        shape = (2, count, KV_HEADS, DIM)
        return list(map(self.device.upload, self.rng.standard_normal(shape).astype(np.float16)))

    def _batch(self) -> tuple[Any, Reads]:
        batch, tokens = self.workload.batch, self.workload.tokens
        table = self.order.reshape(batch, -1).astype(np.int32)
        lengths, nothing = np.full(batch, tokens), np.zeros(batch, np.int64)
        return table, Reads(lengths, nothing, lengths, nothing, nothing)

    def _queries(self) -> Any:
        shape = (self.workload.batch, KV_HEADS * GROUP, DIM)
        return self.device.upload(self.rng.standard_normal(shape).astype(np.float16))

    def _attend(self) -> Call:
        self._fill()
        (table, reads), queries = self._batch(), self._queries()
        plan = self.backend.plan(self.workload.batch, table.shape[1])
        plan.update(table, reads)
        out = self.device.zeros(queries.shape, np.float32)
        lse = self.device.zeros(queries.shape[:2], np.float32)

        def planned() -> None:
            plan.attend(0, queries, DIM**-0.5, out=out, lse=lse)

        planned()
        self._capture(planned)
        return lambda: self.backend.attend(0, queries, table, reads, DIM**-0.5)

    def _score(self) -> Call:
        self._fill()
        (table, reads), queries = self._batch(), self._queries()
        return lambda: self.backend.score(0, queries, table, reads)

    def _store(self) -> Call:
        keys, values = self._tokens(self.workload.tokens)
        slots = (self.order[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[: len(keys)]
        mapping = self.device.upload(slots)
        self.backend.store(0, keys, values, mapping)
        self._capture(lambda: self.backend.store(0, keys, values, mapping))
        return lambda: self.backend.store(0, keys, values, slots)

    def _load(self) -> Call:
        self._fill()
        slots = (self.order[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[: self.workload.tokens]
        mapping = self.device.upload(slots)
        return lambda: self.backend.load(0, mapping, "bf16")

    def _copy(self) -> Call:
        half = self.workload.batch
        src, dst = self.order[:half], self.order[half : 2 * half]
        return lambda: self.backend.copy_pages(src, dst)

    def _swap(self) -> Call:
        pages = self.order[: self.workload.batch]
        return lambda: self.backend.swap_out(pages)

    def _capture(self, call: Call) -> None:
        with self.device.capture() as graph:
            call()
        self.captured = graph.launch
