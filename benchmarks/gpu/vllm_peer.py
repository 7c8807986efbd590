"""vLLM's Triton TurboQuant store and decode, from the files that ``prepare_vllm`` extracted."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

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


class Preset(NamedTuple):
    """A format of vLLM's: bits of keys and values, both with norm correction."""

    key_bits: int
    value_bits: int

    def key_bytes(self, dim: int) -> int:
        """Bytes of a key: codes and an f16 norm."""
        return -(-dim * self.key_bits // 8) + 2

    def slot_bytes(self, dim: int) -> int:
        """Bytes of a token and head: values have an f16 scale and an f16 offset."""
        size = self.key_bytes(dim) + -(-dim * self.value_bits // 8) + 4
        return size + size % 2


class Kernels:
    """vLLM's two functions on one cache, a layer of keys and values.

    Parameters
    ----------
    preset : Preset
        The format.
    num_blocks, page, heads, dim : int
        Shape of the cache.
    where : str
        PyTorch device.
    """

    def __init__(
        self, preset: Preset, num_blocks: int, page: int, heads: int, dim: int, where: str = "cuda"
    ) -> None:
        import torch

        add_package("vllm-turboquant")
        try:
            from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
            from vllm.v1.attention.ops import triton_turboquant_decode, triton_turboquant_store
        except Exception as error:
            raise NotHere(f"vLLM's files do not import: {type(error).__name__}: {error}") from error
        self.preset, self.dim = preset, dim
        self._decode = triton_turboquant_decode.triton_turboquant_decode_attention
        self._store = triton_turboquant_store.triton_turboquant_store
        shape = (num_blocks, heads, page, preset.slot_bytes(dim))
        # vLLM's order of the cache, seen as [blocks, page, heads, bytes].
        self.cache = torch.zeros(shape, dtype=torch.uint8, device=where).permute(0, 2, 1, 3)
        hadamard = np.ones((1, 1), np.float32)
        while len(hadamard) < dim:
            hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
        self.rotation = torch.from_numpy(hadamard / dim**0.5).float().to(where)
        self.centroids = get_centroids(dim, preset.key_bits).float().sort().values.to(where)
        self.midpoints = (self.centroids[1:] + self.centroids[:-1]) / 2

    def store(self, keys: Any, values: Any, slots: Any) -> None:
        """Encode ``[n, heads, dim]`` into slots ``int32[n]``."""
        preset = self.preset
        self._store(
            keys,
            values,
            self.cache,
            slots,
            self.rotation,
            self.midpoints,
            preset.key_bits,
            preset.key_bytes(self.dim),
            preset.value_bits,
        )

    def decode(self, queries: Any, table: Any, lengths: Any, **buffers: Any) -> Any:
        """Attend: ``queries [batch, heads, dim]``, int32 table and lengths."""
        preset = self.preset
        return self._decode(
            queries,
            self.cache,
            table,
            lengths,
            self.rotation,
            self.centroids,
            self.dim**-0.5,
            preset.key_bits,
            preset.key_bytes(self.dim),
            preset.value_bits,
            norm_correction=True,
            PiT=self.rotation,
            **buffers,
        )


def filled(preset: Preset, row: Workload, copies: int, where: str = "cuda") -> Kernels:
    """Return a cache with random tokens in all of its pages but the first."""
    import torch

    pages = 1 + copies * int(row.blocks.sum())
    kernels = Kernels(preset, pages, row.page, row.heads, row.dim, where)
    some = min(128, pages - 1)
    count = some * row.page
    shape = (2, count, row.heads, row.dim)
    keys, values = torch.randn(shape, device=where).to(torch.bfloat16)
    slots = torch.arange(row.page, row.page + count, dtype=torch.int32, device=where)
    kernels.store(keys, values, slots)
    for begin in range(1 + some, pages, some):
        part = kernels.cache[begin : begin + some]
        part.copy_(kernels.cache[1 : 1 + len(part)])
    return kernels


def error_of(preset: Preset, where: str = "cuda", dim: int = 128) -> float:
    """Return the relative error of store and decode against exact attention, float64.

    Quantisation alone makes it about 0.12 with 4 bits and 0.24 with 3 on normal tokens; wrong
    wiring makes it 1.
    """
    import torch

    heads, page, count = 2, 16, 40
    kernels = Kernels(preset, 4, page, heads, dim, where)
    keys, values = torch.randn(2, count, heads, dim, device=where)
    kernels.store(keys, values, torch.arange(page, page + count, dtype=torch.int32, device=where))
    queries = torch.randn(1, 4 * heads, dim, device=where)
    table = torch.tensor([[1, 2, 3]], dtype=torch.int32, device=where)
    lengths = torch.tensor([count], dtype=torch.int32, device=where)
    got = kernels.decode(queries, table, lengths)[0].double()
    grouped = queries[0].double().view(heads, 4, dim)
    logits = torch.einsum("hgd,thd->hgt", grouped, keys.double()) / dim**0.5
    want = torch.einsum("hgt,thd->hgd", logits.softmax(dim=2), values.double()).view_as(got)
    return float((got - want).norm() / want.norm())


def vllm_decode(preset: Preset, device: Any, row: Workload) -> Baseline:
    """Set up vLLM's decode."""
    torch = import_torch()
    nbytes = int(row.lens.sum()) * row.heads * preset.slot_bytes(row.dim)
    copies = copies_of(nbytes)
    kernels = filled(preset, row, copies)
    tables = 1 + np.random.default_rng(0).permutation(len(kernels.cache) - 1).astype(np.int32)
    if row.lengths:
        raise NotHere("only sequences of equal length are set up")
    lengths = torch.from_numpy(row.lens.astype(np.int32)).cuda()
    queries = torch.randn(row.batch, row.heads * row.group, row.dim, device="cuda")
    queries = queries.to(torch.bfloat16)
    calls = [
        partial(kernels.decode, queries, torch.from_numpy(table).cuda(), lengths)
        for table in tables.reshape(copies, row.batch, -1)
    ]
    return Baseline(torch_graph(torch, calls), copies, nbytes)


def plain_calls(row: Workload, copies: int, where: str = "cuda") -> list[Any]:
    """Return vLLM's Triton decode on bfloat16 pages, a call per copy of the batch."""
    import torch

    add_package("vllm-turboquant")
    from vllm.v1.attention.ops.triton_decode_attention import decode_attention_fwd

    kind, pages = torch.bfloat16, copies * int(row.blocks.sum())
    keys, values = torch.randn((2, pages, row.page, row.heads, row.dim), dtype=kind, device=where)
    splits = 32 if row.batch < 32 else 8
    heads = row.heads * row.group
    query = torch.randn(row.batch, heads, row.dim, dtype=kind, device=where)
    out = torch.empty_like(query)
    lse = torch.empty(row.batch, heads, dtype=torch.float32, device=where)
    shape = (row.batch, heads, splits, row.dim + 1)
    states = torch.empty(shape, dtype=torch.float32, device=where)
    lengths = torch.from_numpy(row.lens.astype(np.int32)).to(where)
    tables = np.random.default_rng(0).permutation(pages).astype(np.int32)
    one = torch.ones((), dtype=torch.float32, device=where)
    return [
        partial(
            decode_attention_fwd,
            *(query, keys, values, out, lse, torch.from_numpy(table).to(where), lengths),
            *(states, splits, row.dim**-0.5, row.page),
            k_scale=one,
            v_scale=one,
        )
        for table in tables.reshape(copies, row.batch, -1)
    ]


def vllm_plain(device: Any, row: Workload) -> Baseline:
    """Set up vLLM's Triton decode on bfloat16."""
    torch = import_torch()
    if row.lengths:
        raise NotHere("only sequences of equal length are set up")
    copies = copies_of(row.bf16_bytes())
    calls = plain_calls(row, copies)
    return Baseline(torch_graph(torch, calls), copies, row.bf16_bytes())


#: Formats of about our bytes: 134 against 132, 102 against 100.
BUILDERS: dict[str, Builder] = {
    "vLLM Triton bf16": vllm_plain,
    "vLLM turboquant_4bit_nc": partial(vllm_decode, Preset(4, 4)),
    "vLLM turboquant_3bit_nc": partial(vllm_decode, Preset(3, 3)),
}
