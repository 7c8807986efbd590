"""What only a device has: streams that overlap, and tensors of other libraries."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pagedtq import PagedKVCache
from pagedtq.backends.cuda import CudaBackend
from pagedtq.errors import OutOfPages
from tests.backends.engine_table import check_engine
from tests.parity.cases import make_config
from tests.parity.twins import BOUND, Twins


def test_two_caches_on_two_streams_do_not_meet(device):
    config = make_config("k4v4", 128, 64, window=64, num_pages=80)
    pairs = [Twins(config, device, seed=seed) for seed in (1, 2)]
    streams = [device.xp.cuda.Stream(non_blocking=True) for _ in pairs]
    device.synchronize()
    results = []
    for step in range(6):
        for twins, stream in zip(pairs, streams):
            with stream:
                if not step:
                    twins.open(), twins.open()
                twins.append([0, 1], (200, 90))
                queries = twins.queries(2, 4)
                for layer in (0, 1):
                    state = twins.cuda.attend(layer, queries, twins.members([0, 1], 1))
                    want = twins.host.attend(layer, queries, twins.members([0, 1], 0))
                    results.append((twins, stream, state, want))
    for twins, stream, state, want in results:
        with stream:
            twins.check_state(*map(twins.fetch, state), *want)
    for twins, stream in zip(pairs, streams):
        with stream:
            twins.check_pages()


SPIN = """
extern "C" __global__ void spin(long long cycles) {
    const long long begin = clock64();
    while (clock64() - begin < cycles) {
    }
}
"""


def test_pages_freed_behind_a_kernel_in_flight_come_back_when_it_has_run(device):
    """The pages of a sequence that a launch may still read are nobody else's until it has run."""
    config = make_config("k4v4", 128, 64, window=64, num_layers=1, num_pages=8)
    cache = PagedKVCache(config, partial(CudaBackend, device=device))
    rng = np.random.default_rng(5)
    keys, values = rng.standard_normal((2, 1, 7 * 64, 2, 128)).astype(np.float32)
    one, other = cache.open(), cache.open()
    cache.append(one, keys[:, :300], values[:, :300])
    queries = device.upload(rng.standard_normal((1, 4, 128)).astype(np.float32))
    before = device.download(cache.attend(0, queries, one)[0])
    stream = device.xp.cuda.Stream(non_blocking=True)
    device.synchronize()
    with stream:
        # Some hundred milliseconds, and behind them a launch that reads the pages.
        device.xp.RawKernel(SPIN, "spin")((1,), (1,), (np.int64(1_000_000_000),))
        late, _ = cache.attend(0, queries, one)
        event = device.record()
    fences, pool = cache.tables.fences, cache.tables.pool
    fences.open(event)
    cache.close(one)
    assert not event.done and fences.poll().size == 0
    assert (fences.num_parked, pool.num_free) == (5, 2)
    with pytest.raises(OutOfPages):
        cache.append(other, keys, values)
    cache.append(other, keys[:, :128], values[:, :128])
    event.synchronize()
    assert fences.poll().tolist() == [5, 4, 3, 2, 1]
    assert (fences.num_open, fences.num_parked, pool.num_free) == (0, 0, 5)
    with stream:
        np.testing.assert_array_equal(device.download(late), before)
    cache.append(other, keys[:, :320], values[:, :320])
    assert pool.num_free == 0


def test_long_work_enqueued_on_two_streams_does_not_meet(device):
    """Fifty replays of long attention per stream wait in line before anything is fetched."""
    config = make_config("k4v4", 128, 64, window=64, num_pages=300, num_layers=1)
    runs, held = [], []
    for seed in (1, 2):
        twins = Twins(config, device, seed=seed)
        members = [twins.open(), twins.open()]
        twins.append(members, (9000, 8200))
        ids, tables = twins.members(members, 1), twins.cuda.tables
        plan = twins.cuda.backend.plan(2, max_blocks=160)
        window = tables.window_slots(ids), tables.sink_records(ids)
        plan.update(tables.block_table(ids), tables.reads(ids, True), window=window)
        asked = twins.queries(2, 4)
        queries = device.upload(asked)
        out, lse = device.zeros((2, 8, 128), np.float32), device.zeros((2, 8), np.float32)
        plan.attend(0, queries, 0.1, out=out, lse=lse)
        with device.capture() as graph:
            plan.attend(0, queries, 0.1, out=out, lse=lse)
        want = twins.host.attend(0, asked, twins.members(members, 0), sm_scale=0.1)
        stream = device.xp.cuda.Stream(non_blocking=True)
        sums = device.zeros((2, 8, 128), np.float32)
        runs.append((twins, stream, graph, out, lse, sums, want))
        # A graph keeps none of these alive.
        held.append((plan, queries))
    device.synchronize()
    for _ in range(50):
        for _, stream, graph, out, _, sums, _ in runs:
            with stream:
                out.fill(0)
                graph.launch()
                # Every replay counts, not only the last one.
                device.xp.add(sums, out, out=sums)
    for twins, stream, _, out, lse, sums, want in runs:
        with stream:
            got = [twins.fetch(array) for array in (out, lse, sums)]
        twins.check_state(got[0], got[1], *want)
        twins.check_state(got[2] / 50, got[1], *want)


def test_a_graph_replays_after_its_plan_grew_and_freed_memory_was_written(device):
    twins = Twins(make_config("k4v4", 64, 16, window=16, num_layers=1), device)
    members = [twins.open(), twins.open()]
    twins.append(members, (200, 33))
    ids, tables = twins.members(members, 1), twins.cuda.tables
    plan = twins.cuda.backend.plan(2, max_blocks=16)
    asked = twins.queries(2, 1)
    queries = device.upload(asked)
    out, lse = device.zeros((2, 2, 64), np.float32), device.zeros((2, 2), np.float32)
    window = tables.window_slots(ids), tables.sink_records(ids)
    plan.update(tables.block_table(ids), tables.reads(ids, True), window=window)
    plan.attend(0, queries, 0.1, out=out, lse=lse)
    with device.capture() as graph:
        plan.attend(0, queries, 0.1, out=out, lse=lse)
    # More query heads than the captured call had: work arrays that are too small now.
    plan.attend(0, twins.queries(2, 16), 0.1)
    device.synchronize()
    # Whatever was given back is handed out again, and filled with NaN.
    taken = [device.empty((size,), np.uint8) for size in _sizes() for _ in range(8)]
    for array in taken:
        array.fill(0xFF)
    out.fill(0)
    graph.launch()
    want = twins.host.attend(0, asked, twins.members(members, 0), sm_scale=0.1)
    twins.check_state(twins.fetch(out), twins.fetch(lse), *want)


def _sizes():
    """Sizes of small allocations, to the pool's unit, and some large ones."""
    return [*range(512, 64 * 512, 512), *(1 << shift for shift in range(15, 24))]


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_torch_tensors_come_in_and_go_out_without_copies(device, kind):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    names = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
    config = make_config("k4v4", 128, 64, window=64, num_layers=1, kv_dtype=names[kind])
    cache = PagedKVCache(config, partial(CudaBackend, device=device))
    host = PagedKVCache(config, "host")
    generator = torch.Generator("cuda").manual_seed(1)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        keys, values = torch.randn(
            2, 1, 150, 2, 128, generator=generator, device="cuda", dtype=getattr(torch, kind)
        )
        ids = [each.open() for each in (cache, host)]
        cache.append(ids[0], keys, values)
        queries = torch.randn(1, 8, 128, generator=generator, device="cuda")
        out, lse = (torch.from_dlpack(a) for a in cache.attend(0, queries, ids[0]))
        doubled = 2 * out
    assert out.is_cuda and out.shape == (1, 8, 128) and lse.shape == (1, 8)
    torch.cuda.synchronize()
    if kind == "bfloat16":
        data = [part.view(torch.int16).cpu().numpy().view(np.uint16) for part in (keys, values)]
        host.append(ids[1], *data, dtype="bf16")
    else:
        host.append(ids[1], keys.cpu().numpy(), values.cpu().numpy())
    want, want_lse = host.attend(0, queries.cpu().numpy(), ids[1])
    got = doubled.cpu().numpy() / 2
    assert np.linalg.norm(got - want) <= BOUND * np.linalg.norm(want)
    np.testing.assert_allclose(lse.cpu().numpy(), want_lse, atol=BOUND)


def test_an_engines_table_stays_current_by_what_changed_alone(device):
    assert check_engine(device).num_resized > 1


def test_a_layer_of_the_pool_is_a_tensor_of_another_library(device):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    config = make_config("k4v4", 128, 64, window=0)
    backend = CudaBackend(config, device=device)
    view = torch.from_dlpack(backend.layout.layer_view(backend.pool, 1))
    view[3] = 7
    torch.cuda.synchronize()
    assert (backend.to_host(backend.layout.layer_view(backend.pool, 1))[3] == 7).all()
