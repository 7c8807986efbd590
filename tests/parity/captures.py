"""What holds for steps that a device records and replays; see `claims`."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import (
    ArgumentError,
    StepError,
)
from tests.parity.cases import HEADS, make_config
from tests.parity.twins import Twins


def test_a_captured_graph_replays_after_lengths_grew(device):
    config = make_config("k4v4", 64, 16, window=16)
    twins = Twins(config, device)
    members = [twins.open(), twins.open()]
    twins.append(members, (30, 9))
    cache, backend = twins.cuda, twins.cuda.backend
    ids = twins.members(members, 1)
    plan = backend.plan(2, max_blocks=16)
    queries = device.upload(twins.queries(2, 4))
    out = device.zeros((2, 2, 8, 64), np.float32)
    lse = device.zeros((2, 2, 8), np.float32)

    def bring(new_queries) -> None:
        tables = cache.tables
        window = tables.window_slots(ids), tables.sink_records(ids)
        plan.update(tables.block_table(ids), tables.reads(ids, True), window=window)
        device.copy_in(queries, new_queries)

    def model() -> None:
        for layer in (0, 1):
            plan.attend(layer, queries, 0.125, out=out[layer], lse=lse[layer])

    bring(twins.queries(2, 4))
    model()
    with device.capture() as graph:
        model()
    for counts in ((0, 0), (1, 1), (90, 1), (3, 140)):
        if sum(counts):
            twins.append(members, counts)
        fresh = twins.queries(2, 4)
        bring(fresh)
        graph.launch()
        for layer in (0, 1):
            want = twins.host.attend(layer, fresh, twins.members(members, 0), sm_scale=0.125)
            twins.check_state(twins.fetch(out)[layer], twins.fetch(lse)[layer], *want)


def test_storing_is_captured_with_mappings_on_the_device(device):
    config = make_config("k4v4", 64, 16, window=16, num_layers=1)
    twins = Twins(config, device)
    host, backend = twins.host.backend, twins.cuda.backend
    host.page_owners = backend.page_owners = None
    keys, values = (device.zeros((3, HEADS, 64), np.float16) for _ in range(2))
    slots, rows, records = (device.upload(np.full(3, -1)) for _ in range(3))

    def model() -> None:
        backend.store(0, keys, values, slots)
        backend.window(0).write(backend.check(0, keys, values), rows, records)

    model()
    with device.capture() as graph:
        model()
    for step in range(3):
        fresh = [part.astype(np.float16) for part in twins.draw(3)]
        mappings = np.array([[16, 37, -1], [5, 16 + 9, 40], [-1, 4, 0]]) + step
        mappings[[0, 2], [2, 0]] = -1
        for target, source in zip((keys, values, slots, rows, records), (*fresh, *mappings)):
            device.copy_in(target, source)
        graph.launch()
        host.store(0, *fresh, mappings[0])
        host.window(0).write(host.check(0, *fresh), mappings[1], mappings[2])
        twins.check_pages()


def test_a_whole_decode_step_is_one_graph(device):
    config = make_config("k4v4", 64, 16, window=16)
    twins = Twins(config, device)
    members = [twins.open(), twins.open()]
    twins.append(members, (13, 30))
    cache, backend = twins.cuda, twins.cuda.backend
    ids, layers = twins.members(members, 1), range(config.num_layers)
    plan = backend.plan(2, max_blocks=8)
    kv = [device.zeros((2, 2, HEADS, 64), np.float16) for _ in range(2)]
    queries = device.zeros((2, 8, 64), np.float16)
    out, lse = device.zeros((2, 2, 8, 64), np.float32), device.zeros((2, 2, 8), np.float32)
    # A step seals at most a block per sequence; what is left over is skipped.
    sealed = {name: device.upload(np.full(2 * 16, -1)) for name in ("rows", "slots")}
    mappings = {name: device.upload(np.full(2, -1)) for name in ("store", "ring", "sink")}

    def model() -> None:
        for layer in layers:
            batch = backend.check(layer, kv[0][layer], kv[1][layer])
            backend.seal(layer, sealed["rows"], sealed["slots"])
            backend.write(layer, batch, mappings["store"])
            backend.window(layer).write(batch, mappings["ring"], mappings["sink"])
            plan.attend(layer, queries, 0.125, out=out[layer], lse=lse[layer])

    def bring(step) -> None:
        for name, values in (("rows", step.seal_rows), ("slots", step.seal_mapping)):
            padded = np.full(2 * 16, -1)
            padded[: values.size] = values
            device.copy_in(sealed[name], padded)
        for name, values in (
            ("store", step.store_mapping),
            ("ring", step.ring_mapping),
            ("sink", step.sink_mapping),
        ):
            device.copy_in(mappings[name], values)
        tables = cache.tables
        window = tables.window_slots(ids), tables.sink_records(ids)
        plan.update(tables.block_table(ids), tables.reads(ids, True), window=window)

    graph = None
    for _ in range(22):
        fresh = [part.astype(np.float16).reshape(2, 2, HEADS, 64) for part in twins.draw(4)]
        asked = twins.queries(2, 4).astype(np.float16)
        for target, source in zip((*kv, queries), (*fresh, asked)):
            device.copy_in(target, source)
        bring(cache.begin_step(ids, 1))
        if graph is None:
            model()
            with device.capture() as graph:
                model()
        else:
            graph.launch()
        cache.mark_stored()
        cache.commit()
        twins.host.append(twins.members(members, 0), *fresh, [1, 1])
        for layer in layers:
            want = twins.host.attend(layer, asked, twins.members(members, 0), sm_scale=0.125)
            twins.check_state(twins.fetch(out)[layer], twins.fetch(lse)[layer], *want)
    twins.check_pages()
    with pytest.raises(StepError, match="mark_stored needs an open step"):
        cache.mark_stored()


def test_nothing_is_allocated_or_copied_inside_a_capture(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), device)
    twins.append([twins.open()], [20])
    backend, ids = twins.cuda.backend, twins.members([0], 1)
    tables = twins.cuda.tables
    reads, table = tables.reads(ids, False), tables.block_table(ids)
    plan, queries = backend.plan(1, 8), device.upload(twins.queries(1, 4))
    out, lse = device.zeros((1, 8, 64), np.float32), device.zeros((1, 8), np.float32)
    plan.update(table, reads)
    with device.capture(), pytest.raises(StepError, match="captured"):
        plan.attend(0, queries, 0.1, out=out, lse=lse)
    plan.attend(0, queries, 0.1)
    with device.capture():
        with pytest.raises(ArgumentError, match="pass out and lse"):
            plan.attend(0, queries, 0.1)
        with pytest.raises(StepError, match="captured"):
            plan.update(table, reads._replace(stop=reads.stop - 1))
        plan.update(table, reads)
        plan.attend(0, queries, 0.1, out=out, lse=lse)
