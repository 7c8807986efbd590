"""Calls to measure, set up on a backend; the tests run them on a device made of host memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import numpy as np

from benchmarks.gpu.plain_decode import bfloat16_bits
from benchmarks.gpu.workloads import Workload
from pagedtq.backends.cuda import CudaBackend
from pagedtq.backends.page_launches import Launch
from pagedtq.paging.table_views import Reads

Call = Callable[[], Any]

# Tokens drawn at random; pages beyond them are copies.
_DRAWN = 8192


class Recorder:
    """A device that can note what is launched on it."""

    def __init__(self, device: Any) -> None:
        self._device, self._notes = device, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._device, name)

    def launch(self, launch: Launch) -> None:
        """Run a kernel."""
        if self._notes is not None:
            self._notes.append(launch)
        self._device.launch(launch)

    @contextmanager
    def recording(self) -> Iterator[list[Launch]]:
        """Note the launches made inside."""
        self._notes = notes = []
        try:
            yield notes
        finally:
            self._notes = None


class Replay:
    """A captured graph, and what must live as long: graphs hold addresses, not arrays."""

    def __init__(self, replay: Call, keeps: Any) -> None:
        self._replay, self.keeps = replay, keeps

    def __call__(self) -> None:
        """Launch it."""
        self._replay()


def captured(device: Any, launches: list[Launch]) -> Replay:
    """Return launches as one graph; all of them have run before, so nothing is built."""
    with device.capture() as graph:
        for launch in launches:
            device.launch(launch)
    return Replay(graph.launch, launches)


class Prepared:
    """A workload whose pages are filled, and its kernels as a graph.

    Parameters
    ----------
    workload : Workload
        What to run.
    device : Device
        Where.
    seed : int
        Of keys, values, queries and the order of pages.
    fill : bool
        Only fill the pages.

    Attributes
    ----------
    graph : callable or None
        Launches the kernels of ``calls`` operations, each on pages of its own; None for what goes
        to the host.
    calls : int
        How many.
    eager : callable
        One operation as a program makes it, argument checks and uploads included.
    """

    def __init__(self, workload: Workload, device: Any, seed: int = 0, fill: bool = False) -> None:
        self.workload, self.device = workload, Recorder(device)
        self.rng = np.random.default_rng(seed)
        self.backend = CudaBackend(workload.config(), device=self.device)
        # Pages in no order, as after some hours of serving.
        self.order = 1 + self.rng.permutation(workload.pages - 1)
        self.launches: list[Launch] = []
        self.calls = 0
        if fill:
            self._fill()
            return
        self.eager: Call = getattr(self, "_" + workload.operation)()
        self.graph = captured(self.device, self.launches) if self.launches else None

    def _note(self, call: Call) -> None:
        """Run a call twice, and note the kernels of the second: tables are on the device then."""
        call()
        with self.device.recording() as launches:
            call()
        self.launches += launches
        self.calls += 1

    def _fill(self) -> None:
        row, order = self.workload, self.order
        count = min(_DRAWN // row.page, len(order))
        keys, values = drawn(self.device, count * row.page, row.heads, row.dim)
        slots = (order[:count, None] * row.page + np.arange(row.page)).reshape(-1)
        for layer in range(row.layers):
            self.backend.store(layer, keys, values, slots)
        while count < len(order):
            more = min(count, len(order) - count)
            self.backend.copy_pages(order[:more], order[count : count + more])
            count += more

    def tables(self) -> Iterator[np.ndarray]:
        """Page tables of every copy of the batch."""
        blocks = self.workload.blocks
        ends = np.cumsum(np.tile(blocks, self.workload.copies)).reshape(-1, len(blocks))
        for row in ends:
            table = np.zeros((len(blocks), int(blocks.max())), np.int32)
            for sequence, (end, count) in enumerate(zip(row, blocks, strict=True)):
                table[sequence, :count] = self.order[end - count : end]
            yield table

    def reads(self) -> Reads:
        """Everything, the exact window's share left to it."""
        lens, nothing = self.workload.lens, np.zeros_like(self.workload.lens)
        if not self.workload.window:
            return Reads(lens, nothing, lens, nothing, nothing)
        sinks = np.minimum(self.backend.config.num_sinks, lens)
        ring = np.maximum(lens - self.workload.window, sinks)
        return Reads(lens, sinks, ring, nothing, nothing)

    def queries(self) -> Any:
        """One query token of every sequence, on the device."""
        row = self.workload
        shape = (len(row.lens), row.heads * row.group, row.dim)
        return self.device.upload(self.rng.standard_normal(shape).astype(np.float16))

    def _overlay(self) -> tuple[Any, Any] | None:
        if not self.workload.window:
            return None
        window = self.backend.window(0)
        for rows in (window.ring, window.sink):
            content = self.rng.standard_normal((1, *rows.shape[1:])).astype(np.float16)
            rows[...] = self.device.upload(content)
        slots = np.arange(len(self.workload.lens), dtype=np.int32)
        return slots, slots

    def _attend(self) -> Call:
        self._fill()
        reads, queries, row = self.reads(), self.queries(), self.workload
        overlay = self._overlay()
        out = self.device.zeros(queries.shape, np.float32)
        lse = self.device.zeros(queries.shape[:2], np.float32)
        for table in self.tables():
            plan = self.backend.plan(*table.shape)
            plan.update(table, reads, window=overlay)
            # Of many layers a few, far apart.
            for layer in range(0, row.layers, max(1, row.layers // 4)):

                def attend(plan: Any = plan, layer: int = layer) -> None:
                    plan.attend(layer, queries, row.dim**-0.5, out=out, lse=lse)

                self._note(attend)
        backend = self.backend
        return lambda: backend.attend(0, queries, table, reads, row.dim**-0.5, window=overlay)

    def _score(self) -> Call:
        self._fill()
        table, reads, queries = next(self.tables()), self.reads(), self.queries()

        def score() -> Any:
            return self.backend.score(0, queries, table, reads)

        self._note(score)
        return score

    def _store(self) -> Call:
        row = self.workload
        count = row.batch * row.tokens
        slots = (self.order[:, None] * row.page + np.arange(row.page)).reshape(-1)
        if row.tokens == 1:  # a step of a batch: one token in each sequence's page
            slots = slots.reshape(-1, row.page)[:, 5]
        for part in slots[: row.copies * count].reshape(-1, count):
            mapping = self.device.upload(part)
            # Inputs of its own for every copy: they are half of what is read.
            keys, values = drawn(self.device, count, row.heads, row.dim, "bf16")
            self._note(partial(self.backend.store, 0, keys, values, mapping, "bf16"))
        return lambda: self.backend.store(0, keys, values, part, dtype="bf16")

    def _copy(self) -> Call:
        self._fill()
        half = self.workload.batch
        src, dst = self.order[:half], self.order[half : 2 * half]
        self._note(lambda: self.backend.copy_pages(src, dst))
        return lambda: self.backend.copy_pages(src, dst)

    def _swap(self) -> Call:
        self._fill()
        return lambda: self.backend.swap_out(self.order)


def drawn(device: Any, count: int, heads: int, dim: int, kind: str = "f16") -> list[Any]:
    """Return normal keys and values ``[count, heads, dim]`` on the device."""
    both = _normal(count, heads, dim)
    return [
        device.upload(bfloat16_bits(x) if kind == "bf16" else x.astype(np.float16)) for x in both
    ]


@cache
def _normal(count: int, heads: int, dim: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((2, count, heads, dim), np.float32)
