"""FlashInfer's paged decode, where ``prepare_flashinfer`` left what it needs."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu.baselines import (
    Baseline,
    Builder,
    copies_of,
    import_torch,
    torch_graph,
)
from benchmarks.gpu.peer_folder import NotHere, add_package
from benchmarks.gpu.workloads import Workload

_WORKSPACE = 256 << 20


def load() -> Any:
    """Return ``flashinfer.decode``."""
    add_package("flashinfer-trimmed")
    try:
        import flashinfer.decode
    except Exception as error:
        raise NotHere(f"FlashInfer does not import: {type(error).__name__}: {error}") from error
    return flashinfer.decode


def flashinfer_decode(fp8: bool, tensor_cores: bool, device: Any, row: Workload) -> Baseline:
    """Set up ``BatchDecodeWithPagedKVCacheWrapper``; planning is left out of the time."""
    torch = import_torch()
    module = load()
    if row.dim != 128:
        raise NotHere("prepared for d 128 only")
    kind = torch.float8_e4m3fn if fp8 else torch.bfloat16
    nbytes = row.bf16_bytes() // (2 if fp8 else 1)
    copies, blocks = copies_of(nbytes), row.blocks
    per_copy = int(blocks.sum())
    shape = (copies * per_copy, 2, row.heads, row.page, row.dim)
    pages = torch.empty(shape, dtype=kind, device="cuda")
    some = torch.randn((min(128, len(pages)), *shape[1:]), device="cuda").to(kind)
    for begin in range(0, len(pages), len(some)):
        part = pages[begin : begin + len(some)]
        part.copy_(some[: len(part)])
    heads = row.heads * row.group
    query = torch.randn(len(blocks), heads, row.dim, dtype=torch.bfloat16, device="cuda")
    order = np.random.default_rng(0).permutation(len(pages)).astype(np.int32)
    indptr = torch.from_numpy(np.concatenate(([0], np.cumsum(blocks))).astype(np.int32))
    last = torch.from_numpy(((row.lens - 1) % row.page + 1).astype(np.int32))
    calls = []
    for indices in np.split(order, copies):
        workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device="cuda")
        wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=tensor_cores, backend="fa2"
        )
        wrapper.plan(
            indptr.cuda(),
            torch.from_numpy(indices).cuda(),
            last.cuda(),
            heads,
            row.heads,
            row.dim,
            row.page,
            q_data_type=torch.bfloat16,
            kv_data_type=kind,
        )
        calls.append(partial(wrapper.run, query, pages))
    return Baseline(torch_graph(torch, calls), copies, nbytes)


BUILDERS: dict[str, Builder] = {
    "FlashInfer bf16": partial(flashinfer_decode, False, True),
    "FlashInfer bf16 without tensor cores": partial(flashinfer_decode, False, False),
    "FlashInfer fp8": partial(flashinfer_decode, True, True),
}
