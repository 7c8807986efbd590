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


#: Formats of about our bytes: 134 against 132, 102 against 100.
BUILDERS: dict[str, Builder] = {
    "vLLM turboquant_4bit_nc": partial(vllm_decode, Preset(4, 4)),
    "vLLM turboquant_3bit_nc": partial(vllm_decode, Preset(3, 3)),
}
