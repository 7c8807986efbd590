"""Stages ``build`` and ``correctness``: compile what the run needs, and hold it to the host.

``build`` walks the other stages and the suite's matrices on a device that runs nothing, so that
every kernel they need is in the cache before anything is timed. ``correctness`` compares every
format, head dimension, page size and group that is measured with the host backend, on the same
tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu import attend_stage, ceilings, operation_stage, peer_stages, step_stage
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device_timing import TrialMeter
from benchmarks.gpu.listing_device import ListingDevice
from benchmarks.gpu.page_differences import compare_pages
from benchmarks.gpu.plain_decode import PlainDecode, bfloat16_bits, e4m3_codes, e4m3_table
from benchmarks.gpu.suite_kernels import walk_suite
from benchmarks.gpu.workloads import Workload
from pagedtq.backends.cuda import CudaBackend
from pagedtq.backends.host import HostBackend
from pagedtq.backends.page_launches import Launch
from pagedtq.paging.table_views import Reads

#: Relative error of outputs, and of scores against the size of query times key.
BOUND = 2e-3
_LENGTHS = (330, 65, 7)


def build(bench: Bench) -> None:
    """Compile every kernel of the other stages, side by side."""
    launches = listing(bench)
    compile_one = getattr(bench.device, "build", None)
    if compile_one is None:
        bench.row({"what": "kernels that a run launches"}, kernels=len(launches))
        return
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 2) - 2)) as pool:
        waiting = [(launch, pool.submit(compile_one, launch)) for launch in launches]
        for launch, done in waiting:
            bench.attempt({"what": f"{launch.kernel} {dict(launch.macros)}"}, done.result)
        # Out of time: what has not begun compiles when it is needed.
        pool.shutdown(cancel_futures=True)
    bench.row({"what": "kernels compiled"}, kernels=len(launches))


def listing(bench: Bench) -> list[Launch]:
    """Return a launch of every specialisation that other stages need, the measuring ones first."""
    device = ListingDevice(bench.device.arch, bench.device.multiprocessors)
    size = "tiny" if bench.size == "tiny" else "listing"
    for stage in (
        ceilings.ceilings,
        attend_stage.attend,
        operation_stage.operations,
        step_stage.step,
    ):
        trial = Bench("build", device, TrialMeter(), 1e6, size, bench.seed)
        stage(trial)
        for row in trial.rows:
            if str(row.get("error", "")).startswith("failed"):
                bench.row({"what": f"listing {stage.__name__}"}, error=row["error"])
    if bench.size == "full":
        bench.attempt({"what": "listing the suite"}, lambda: walk_suite(device))
    return list(device.launches.values())


def correctness(bench: Bench) -> None:
    """Compare every specialisation that is measured with the host."""
    for row in specialisations(bench):
        bench.attempt(row.label(), lambda row=row: compare(bench, row))
    for fp8 in (False, True):
        for dim in (64, 128):
            label = {"operation": "plain decode", "format": "fp8" if fp8 else "bf16", "d": dim}
            bench.attempt(label, lambda a=fp8, d=dim, la=label: compare_plain(bench, la, a, d))


def specialisations(bench: Bench) -> Iterator[Workload]:
    """Name what is measured, each kernel once."""
    seen = set()
    for row in [*attend_stage.chosen(bench), *operation_stage.chosen(bench)]:
        small = row._replace(
            operation="attend", batch=3, tokens=0, lengths=_LENGTHS, heads=2, layers=1
        )
        if small not in seen:
            seen.add(small)
            yield small


def compare(bench: Bench, row: Workload) -> None:
    """Store, attend, score, load and move the same tokens on both backends."""
    config = row.config()
    host, cuda = HostBackend(config), CudaBackend(config, device=bench.device)
    rng = np.random.default_rng(bench.seed)
    blocks, lens = row.blocks, row.lens
    order = 1 + rng.permutation(int(blocks.sum())).astype(np.int32)
    table = np.zeros((len(blocks), int(blocks.max())), np.int32)
    for sequence, end in enumerate(np.cumsum(blocks)):
        table[sequence, : blocks[sequence]] = order[end - blocks[sequence] : end]
    places = [np.arange(length) for length in lens]
    slots = np.concatenate(
        [table[s, at // row.page].astype(np.int64) * row.page + at % row.page
         for s, at in enumerate(places)]
    )  # fmt: skip
    shape = (len(slots), row.heads, row.dim)
    keys, values = (rng.standard_normal(shape).astype(np.float16) for _ in range(2))
    queries = rng.standard_normal((len(lens), row.heads * row.group, row.dim)).astype(np.float32)
    nothing = np.zeros_like(lens)
    reads, window = Reads(lens, nothing, lens, nothing, nothing), None
    for each in (host, cuda):
        each.clear_norms(order)
        each.store(0, keys, values, slots)
    fetch = cuda.to_host
    pool = fetch(cuda.pool)
    found = compare_pages(host.layout, pool, host.pool)
    columns: dict[str, Any] = {
        "bytes different": int((pool != host.pool).sum()),
        "codes": found.codes,
        "codes different": found.codes_differ,
        "norms different": found.norms_differ,
    }
    if row.window:
        reads, window = _overlay(row, reads, host, cuda, rng)
    want, want_lse = host.attend(0, queries, table, reads, row.dim**-0.5, window=window)
    got, lse = map(fetch, cuda.attend(0, queries, table, reads, row.dim**-0.5, window=window))
    columns["attend error"] = _relative(got, want)
    columns["lse error"] = float(np.abs(lse - want_lse).max())
    scores = [each.score(0, queries, table, reads, window=window).values for each in (host, cuda)]
    size = np.linalg.norm(queries, axis=-1).max() * (2 * row.dim) ** 0.5
    columns["score error"] = float(np.abs(scores[0] - fetch(scores[1])).max() / size)
    some = slots[::7]
    columns["load error"] = max(
        _relative(fetch(b), a) for a, b in zip(host.load(0, some), cuda.load(0, some), strict=True)
    )
    slabs = [
        fetch(each.gather(order)) if each is cuda else each.gather(order) for each in (host, cuda)
    ]
    moved = int((slabs[0] != slabs[1]).sum())
    ok = (
        found.within_bounds
        and moved <= columns["bytes different"]
        and max(columns["attend error"], columns["score error"], columns["load error"]) <= BOUND
        and columns["lse error"] <= BOUND
    )
    bench.row(row.label(), **columns, ok=bool(ok))


def _overlay(
    row: Workload, reads: Reads, host: HostBackend, cuda: CudaBackend, rng: np.random.Generator
) -> tuple[Reads, tuple[Any, Any]]:
    """Fill rings and sinks of both alike."""
    lens = row.lens
    sinks = np.minimum(host.config.num_sinks, lens)
    ring = np.maximum(lens - row.window, sinks)
    for name in ("ring", "sink"):
        ours, theirs = getattr(host.window(0), name), getattr(cuda.window(0), name)
        content = rng.standard_normal(ours.shape).astype(ours.dtype)
        ours[...] = content
        theirs[...] = cuda.device.upload(content)
    slots = np.arange(len(lens), dtype=np.int32)
    return reads._replace(first=sinks, stop=ring), (slots, slots)


def compare_plain(bench: Bench, label: dict[str, Any], fp8: bool, dim: int) -> None:
    """Compare the plain kernels with float64 attention."""
    heads, group, page, lengths = 2, 4, 16, np.array([700, 33])
    rng, device = np.random.default_rng(bench.seed), bench.device
    blocks = -(-lengths // page)
    pool = PlainDecode(device, dim, page, heads, group, int(blocks.sum()) + 1, fp8)
    drawn = rng.standard_normal((2, *pool.keys.shape), np.float32)
    bits = [e4m3_codes(x) if fp8 else bfloat16_bits(x) for x in drawn]
    pool.fill(*bits)
    real = [e4m3_table()[x] if fp8 else (x.astype(np.uint32) << 16).view(np.float32) for x in bits]
    table = np.zeros((2, int(blocks.max())), np.int32)
    table[0, : blocks[0]] = np.arange(1, blocks[0] + 1)
    table[1, : blocks[1]] = np.arange(blocks[0] + 1, blocks.sum() + 1)
    query_bits = bfloat16_bits(rng.standard_normal((2, heads * group, dim)))
    queries = (query_bits.astype(np.uint32) << 16).view(np.float32)
    launches = pool.plan(table, lengths, device.upload(query_bits), 4)
    for launch in launches:
        device.launch(launch)
    got = device.download(launches[-1].arguments[-1])
    worst = 0.0
    for sequence, length in enumerate(lengths):
        keys, values = (
            x[table[sequence, : blocks[sequence]]].transpose(1, 0, 2, 3).reshape(heads, -1, dim)
            for x in real
        )
        want = dense(keys[:, :length], values[:, :length], queries[sequence])
        worst = max(worst, _relative(got[sequence], want))
    bench.row(label, **{"attend error": worst}, ok=worst < 5e-3)


def dense(keys: Any, values: Any, queries: Any) -> Any:
    """Return float64 attention of ``[heads * group, d]`` over ``[heads, n, d]``."""
    grouped = queries.astype(np.float64).reshape(len(keys), -1, queries.shape[-1])
    logits = np.einsum("hgd,htd->hgt", grouped, keys.astype(np.float64)) / keys.shape[-1] ** 0.5
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    return np.einsum("hgt,htd->hgd", weights, values.astype(np.float64)).reshape(queries.shape)


def _relative(got: Any, want: Any) -> float:
    error = np.linalg.norm((got - want).astype(np.float64), axis=-1)
    size = np.linalg.norm(want.astype(np.float64), axis=-1)
    return float((error / np.maximum(size, 1e-30)).max())


Stage = Callable[[Bench], None]
#: Stages that need the device in their own process.
INSIDE: dict[str, Stage] = {
    "build": build,
    "ceilings": ceilings.ceilings,
    "correctness": correctness,
    **{library: partial(peer_stages.peer, library) for library in peer_stages.BUILDERS},
    "attend": attend_stage.attend,
    "operations": operation_stage.operations,
    "step": step_stage.step,
}
