"""What a captured graph refers to outlives what grows beside it.

A graph of a device holds addresses and keeps nothing alive; the harness's holds arrays. So its
launches are dropped here, and what they pointed to must live all the same.
"""

from __future__ import annotations

import gc
import weakref

import numpy as np
from harness_device import DeviceArray, HarnessDevice

from tests.parity.cases import make_config
from tests.parity.twins import Twins


def roots_of(graph):
    """Weak references to the memory that a graph's launches point to."""
    roots = {}
    for launch in graph.launches:
        for array in launch.arguments:
            while isinstance(array, DeviceArray) and isinstance(array.base, np.ndarray):
                array = array.base
            if isinstance(array, np.ndarray) and array.size:
                roots[id(array)] = weakref.ref(array)
    graph.launches.clear()
    return list(roots.values())


def test_memory_of_a_captured_graph_stays_when_work_arrays_grow():
    device = HarnessDevice()
    twins = Twins(make_config("k4v4", 64, 16, window=16, num_layers=1), device)
    twins.append([twins.open(), twins.open()], (40, 20))
    tables, ids = twins.cuda.tables, twins.members([0, 1], 1)
    plan = twins.cuda.backend.plan(2, 8)
    window = tables.window_slots(ids), tables.sink_records(ids)
    plan.update(tables.block_table(ids), tables.reads(ids, True), window=window)
    queries = device.upload(twins.queries(2, 1))
    out, lse = device.zeros((2, 2, 64), np.float32), device.zeros((2, 2), np.float32)
    plan.attend(0, queries, 0.1, out=out, lse=lse)
    with device.capture() as graph:
        plan.attend(0, queries, 0.1, out=out, lse=lse)
    roots = roots_of(graph)
    assert len(roots) > 8
    # The same plan, more query heads: everything that depends on them is too small now.
    plan.attend(0, twins.queries(2, 16), 0.1)
    gc.collect()
    assert all(root() is not None for root in roots)
