"""What compressed attention is compared with in the same run: plain kernels and PyTorch.

A baseline is set up for a workload's shape, timed and freed. Names say the type of what is stored,
``bf16`` or ``fp8``, as a word of their own. One that does not run here says why.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

from benchmarks.gpu.operations import Call, Replay, captured
from benchmarks.gpu.peer_folder import NotHere
from benchmarks.gpu.plain_decode import COLUMNS, PlainDecode, bfloat16_bits, e4m3_codes
from benchmarks.gpu.workloads import ROTATED_BYTES, Workload

#: How finely the plain kernels cut sequences; the better one counts.
FINENESS = (4, 12)
_DRAWN_PAGES = 128


class Baseline(NamedTuple):
    """A baseline that is ready to be timed.

    Attributes
    ----------
    call : callable
        Runs ``calls`` operations, each on memory of its own.
    calls : int
        How many.
    nbytes : int
        Of keys and values that one operation reads.
    """

    call: Call
    calls: int
    nbytes: int


Builder = Callable[[Any, Workload], Baseline]


def copies_of(nbytes: int) -> int:
    """Return how many sets of memory keep any cache from answering."""
    return max(1, min(32, -(-ROTATED_BYTES // max(1, nbytes))))


def plain(fp8: bool, fineness: int, device: Any, row: Workload) -> Baseline:
    """Set up our own kernel on plain pages."""
    if row.group > COLUMNS or row.dim not in (64, 128):
        raise NotHere(f"the plain kernels take groups up to {COLUMNS} and d 64 or 128")
    rng, blocks = np.random.default_rng(0), row.blocks
    nbytes = row.bf16_bytes() // (2 if fp8 else 1)
    copies = copies_of(nbytes)
    pages = copies * int(blocks.sum())
    pool = PlainDecode(device, row.dim, row.page, row.heads, row.group, pages + 1, fp8)
    pool.fill(*plain_content(fp8, (min(_DRAWN_PAGES, pages), *pool.keys.shape[1:])))
    order = 1 + rng.permutation(pages).astype(np.int32)
    shape = (len(blocks), row.heads * row.group, row.dim)
    queries = device.upload(bfloat16_bits(rng.standard_normal(shape)))
    launches = []
    for part in np.split(order, copies):
        table = np.zeros((len(blocks), int(blocks.max())), np.int32)
        ends = np.cumsum(blocks)
        for sequence, (end, count) in enumerate(zip(ends, blocks, strict=True)):
            table[sequence, :count] = part[end - count : end]
        launches += pool.plan(table, row.lens, queries, fineness)
    for launch in launches:
        device.launch(launch)
    return Baseline(captured(device, launches), copies, nbytes)


@cache
def plain_content(fp8: bool, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Return random bits for `PlainDecode.fill`; drawing and rounding them takes a while."""
    both = np.random.default_rng(1).standard_normal((2, *shape), np.float32)
    return [e4m3_codes(x) if fp8 else bfloat16_bits(x) for x in both]


def import_torch() -> Any:
    """Return PyTorch; `NotHere` without one that has a device."""
    try:
        import torch
    except ImportError as error:
        raise NotHere("PyTorch is not installed") from error
    if not torch.cuda.is_available():
        raise NotHere("this PyTorch has no CUDA")
    return torch


def torch_graph(torch: Any, calls: list[Call]) -> Replay:
    """Capture calls of PyTorch as one graph, after running each once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Replay(graph.replay, calls)


def sdpa(as_rows: bool, device: Any, row: Workload) -> Baseline:
    """Set up PyTorch's flash attention on contiguous bfloat16; pages cost it nothing."""
    torch = import_torch()
    if row.lengths:
        raise NotHere("PyTorch's attention takes sequences of equal length")
    copies = copies_of(row.bf16_bytes())
    shape = (copies, 2, row.batch, row.heads, row.tokens, row.dim)
    both = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
    heads, rows = (row.heads, row.group) if as_rows else (row.heads * row.group, 1)
    query = torch.randn(row.batch, heads, rows, row.dim, dtype=torch.bfloat16, device="cuda")
    options = {} if as_rows else {"enable_gqa": True}
    attend = partial(torch.nn.functional.scaled_dot_product_attention, query, **options)
    flash = torch.nn.attention.SDPBackend.FLASH_ATTENTION
    with torch.nn.attention.sdpa_kernel(flash):
        call = torch_graph(torch, [partial(attend, keys, values) for keys, values in both])
    return Baseline(call, copies, row.bf16_bytes())


#: Run at every shape.
PLAIN: dict[str, Builder] = {
    f"plain {kind} /{fineness}": partial(plain, kind == "fp8", fineness)
    for kind in ("bf16", "fp8")
    for fineness in FINENESS
}
TORCH: dict[str, Builder] = {
    "SDPA bf16 enable_gqa": partial(sdpa, False),
    "SDPA bf16 group as rows": partial(sdpa, True),
}


def shape_of(row: Workload) -> Workload:
    """Return what of a workload decides its baselines."""
    return row._replace(form="exact", window=0, order="layer_major", layers=1)
