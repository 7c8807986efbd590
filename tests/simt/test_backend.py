"""All of the CUDA backend, its kernels' source included, run on the CPU."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from harness_device import HarnessDevice

from pagedtq import Exact, LayerOverride
from tests.parity.captures import *  # noqa: F403
from tests.parity.cases import make_config, small_cases
from tests.parity.claims import *  # noqa: F403
from tests.parity.operands import *  # noqa: F403
from tests.parity.poison import *  # noqa: F403
from tests.parity.twins import Twins


@pytest.fixture
def device():
    return HarnessDevice()


@pytest.fixture(params=small_cases(), ids=str)
def case(request):
    return request.param


def test_tables_and_mappings_are_sent_once_per_step(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0), device)
    members = [twins.open(), twins.open()]
    twins.append(members, (20, 33))
    cache, ids = twins.cuda, twins.members(members, 1)
    queries = device.upload(twins.queries(2, 4))
    kv = [device.upload(part.astype(np.float16)) for part in twins.draw(2)]
    cache.debug = False
    cache.begin_step(ids, 1)
    sent = []
    for layer in (0, 1):
        before, planned = device.copies, _count(device, "plan_splits")
        cache.store(layer, *kv)
        cache.attend(layer, queries, ids)
        sent.append((device.copies - before, _count(device, "plan_splits") - planned))
    assert sent == [(2, 1), (0, 0)]  # the slot mapping; tables and ranges together
    cache.commit()


@pytest.mark.parametrize("int8_values", [None, True, False])
def test_a_backend_multiplies_values_as_bytes_where_it_is_asked_to(device, int8_values):
    override = LayerOverride(layers=(1,), keys=Exact(), values=Exact())
    config = make_config("k3v3", 64, 16, window=0, overrides=(override,))
    twins = Twins(config, device, backend={"int8_values": int8_values}, seed=3)
    members = [twins.open(), twins.open()]
    twins.append(members, (20, 33))
    for layer in (0, 1):
        twins.check_attend(layer, members, 4, None)
    macros = [launch.macros for launch in device.log if launch.kernel == "attend"]
    assert [one["VALUE_INT8"] for one in macros] == [int(int8_values is True), 0]


def _count(device, kernel):
    return sum(launch.kernel == kernel for launch in device.log)


def test_arrays_of_the_device_and_of_numpy_do_not_mix(device):
    with pytest.raises(TypeError, match="mixes"):
        device.zeros((3,), np.float32) + np.ones(3, np.float32)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_captured_graph_holds_the_planner_once_per_pass_over_the_layers(device, num_layers):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=num_layers), device)
    twins.append([twins.open()], [40])
    tables, ids = twins.cuda.tables, twins.members([0], 1)
    plan = twins.cuda.backend.plan(1, 8)
    plan.update(tables.block_table(ids), tables.reads(ids, False))
    queries = device.upload(twins.queries(1, 4))
    state = {
        "out": device.zeros((1, 8, 64), np.float32),
        "lse": device.zeros((1, 8), np.float32),
    }
    plan.attend(0, queries, 0.1, **state)
    for _ in range(2):
        with device.capture() as graph:
            for layer in range(num_layers):
                plan.attend(layer, queries, 0.1, **state)
        kernels = [launch.kernel for launch in graph.launches]
        assert kernels.count("plan_splits") == 1 and kernels[0] == "plan_splits"
        assert kernels.count("attend") == num_layers


def test_work_arrays_that_a_captured_graph_writes_outlive_larger_ones(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), device)
    twins.append([twins.open()], [40])
    tables, ids = twins.cuda.tables, twins.members([0], 1)
    plan = twins.cuda.backend.plan(1, 8)
    plan.update(tables.block_table(ids), tables.reads(ids, False))

    def attend(group):
        queries = device.upload(twins.queries(1, group))
        out, lse = plan.attend(0, queries, 0.1)
        with device.capture() as graph:
            plan.attend(0, queries, 0.1, out=out, lse=lse)
        return graph, (queries, out, lse)

    graph, held = attend(4)
    memory = [
        weakref.ref(_memory(argument))
        for launch in graph.launches
        for argument in launch.arguments
        if isinstance(argument, np.ndarray)
    ]
    # A graph on a device knows addresses, and keeps nothing alive.
    del graph
    attend(16)
    gc.collect()
    assert held and len(memory) > 20 and all(one() is not None for one in memory)


def _memory(array):
    while array.base is not None and isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_what_a_captured_graph_refers_to_stays_on_the_device(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), device)
    constant = twins.cuda.backend.operands.constant
    kept, refers = constant(np.arange(3)), constant(np.arange(4))
    with device.capture():
        assert constant(np.arange(4)) is refers
    for length in range(5, 40):
        constant(np.arange(length))
    assert constant(np.arange(4)) is refers
    assert constant(np.arange(3)) is not kept
