"""Attention over the pages of a host cache by the kernels' source, for the tests beside it."""

from __future__ import annotations

import numpy as np

from pagedtq.backends.attend_kernel import attend_kernel
from pagedtq.backends.attend_shape import attend_shape, table_entries
from pagedtq.backends.queries import check_queries, prepare_queries, unrotate_outputs
from pagedtq.backends.states import merge_states
from tests.simt.harness import compile_kernels

LOG2_E = 1.4426950408889634


def share_out(reads, q_lens, group, columns, splits):
    """Plan units on the host: every sequence's column tiles, each in ``splits[b]`` parts."""
    tiles = -(-np.asarray(q_lens) * group // columns)
    counts = tiles * splits
    first = np.cumsum(counts) - counts
    sequences = np.repeat(np.arange(len(q_lens)), counts)
    return sequences.astype(np.int32), first.astype(np.int32), np.asarray(splits, np.int32)


def f16_rows(rows, scale):
    """Return rows as f16 bits near 2**9, and what a product must be multiplied by (log2 units)."""
    top = np.abs(rows).max(axis=-1)
    power = np.where(top > 0, np.exp2(9 - np.floor(np.log2(np.where(top > 0, top, 1)))), 1)
    halves = (rows * power[..., None]).astype(np.float16)
    return halves.view(np.uint16), (scale * LOG2_E / power).astype(np.float32), power


class DeviceAttention:
    """`attend` of one layer of a host backend, partial states merged on the host.

    Parameters
    ----------
    backend : HostBackend
        Holds the pages.
    layer : int
        The layer.
    """

    def __init__(self, backend, layer=0):
        self.backend, self.layer = backend, layer
        self.host = backend.layers[layer]

    def parts(
        self,
        queries,
        table,
        reads,
        sm_scale,
        q_lens,
        splits,
        *,
        soft_cap=None,
        window_left=None,
        int8_keys=None,
        int8_values=None,
        arch=80,
        seed=0,
    ):
        """Return per-unit states ``out [units, heads, columns, dim]``, ``lse`` and the plan."""
        layout, config = self.backend.layout, self.backend.config
        heads, dim = config.num_kv_heads, config.head_dim
        q_lens = np.ones(len(reads.kv_lens), np.int64) if q_lens is None else np.asarray(q_lens)
        tokens = check_queries(queries, reads, q_lens, heads, dim, window_left)
        prepared = prepare_queries(tokens, self.host.codecs[0], self.host.mean, 1.0)
        group = tokens.values.shape[2]
        rows = int(q_lens.max()) * group
        kernel = attend_kernel(
            layout, self.layer, rows, soft_cap is not None, int8_keys, arch, int8_values
        )
        rows, scales, power = f16_rows(prepared.keys.reshape(-1, dim), sm_scale)
        sketches = None
        if prepared.qjl is not None:
            flat = prepared.qjl.reshape(-1, dim) * power[:, None]
            sketches = flat.astype(np.float16).view(np.uint16)
        offsets = None
        if prepared.offset is not None:
            offsets = (prepared.offset * sm_scale).astype(np.float32).reshape(-1)
        sequences, first, splits = share_out(reads, q_lens, group, kernel.columns, splits)
        shape = attend_shape(
            layout,
            self.layer,
            table_stride=table.shape[1],
            batch=len(q_lens),
            group=group,
            window_left=window_left,
            soft_cap=soft_cap,
            has_offsets=offsets is not None,
            int8_values=kernel.int8_values,
        )
        out = np.full((len(sequences), heads, kernel.columns, dim), np.nan, np.float32)
        lse = np.full(out.shape[:3], np.nan, np.float32)
        pool = self.backend.pool[layout.layer_offsets[self.layer] :]
        codecs = config.layer_codecs(self.layer)
        starts = np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32)
        compile_kernels("attend.cu", kernel.macros()).launch(
            "attend", (len(sequences), heads), 128,
            _frozen(pool), shape, _frozen(table), _frozen(np.stack([reads.kv_lens, *reads[1:]])),
            _frozen(starts), _frozen(rows), _frozen(scales), sketches, offsets,
            _frozen(table_entries(codecs[0], dim)), _frozen(table_entries(codecs[1], dim)),
            sequences, first, splits, out, lse, seed=seed,
        )  # fmt: skip
        return out, lse, (first, splits, kernel.columns, group, tokens)

    def attend(self, queries, table, reads, sm_scale, q_lens=None, splits=None, **options):
        """Return ``out [tokens, num_q_heads, dim]`` and ``lse`` like the host backend."""
        if splits is None:
            splits = np.ones(len(reads.kv_lens), np.int32)
        out, lse, plan = self.parts(queries, table, reads, sm_scale, q_lens, splits, **options)
        first, splits, columns, group, tokens = plan
        total = np.zeros(tokens.values.shape)
        mass = np.full(total.shape[:3], -np.inf)
        row = 0
        for b, count in enumerate(tokens.q_lens):
            for column in range(count * group):
                units = first[b] + column // columns * splits[b] + np.arange(splits[b])
                at = (row + column // group, slice(None), column % group)
                total[at], mass[at] = merge_states(
                    out[units, :, column % columns].astype(np.float64),
                    lse[units, :, column % columns].astype(np.float64),
                )
            row += count
        out = unrotate_outputs(self.host.codecs[1], total)
        tokens_, heads, group, dim = out.shape
        return out.reshape(tokens_, heads * group, dim), mass.reshape(tokens_, heads * group)


def _frozen(array):
    """An input the kernel must leave alone."""
    array = np.ascontiguousarray(array)
    array.setflags(write=False)
    return array
