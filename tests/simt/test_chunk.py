"""A chunk's own keys and values as exact pages: `store`, then `attend`, against the host's twin."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.backends.chunk_pages import chunk_layout, chunk_reads, chunk_slots, chunk_table
from pagedtq.backends.host import HostBackend
from pagedtq.backends.host_chunk import attend_chunk
from pagedtq.backends.queries import check_queries
from pagedtq.backends.tokens import TokenBatch
from pagedtq.errors import ArgumentError
from tests.reference import relative_error
from tests.simt.device_attention import DeviceAttention
from tests.simt.device_layer import DeviceLayer, as_kind, cache_config
from tests.simt.test_attend import BOUND
from tests.simt.test_store import FORMATS

HEADS = 2


def raw_chunk(q_lens, head_dim, group, kv_dtype, rng):
    total = sum(q_lens)
    queries = rng.standard_normal((total, HEADS * group, head_dim)).astype(np.float32)
    keys, values = rng.standard_normal((2, total, HEADS, head_dim)).astype(np.float32)
    return queries, as_kind(keys, kv_dtype), as_kind(values, kv_dtype)


def attend_by_kernels(config, queries, keys, values, kind, q_lens, sm_scale, **options):
    """Store the chunk into poisoned scratch pages and attend over them."""
    layout = chunk_layout(config, len(q_lens), max(q_lens))
    scratch = HostBackend(layout.config)
    scratch.pool[:] = 0xFF
    device = DeviceLayer(scratch)
    device.store(keys, values, chunk_slots(q_lens, max(q_lens)), kind)
    scratch.pool[:] = device.pool
    splits = np.full(len(q_lens), 2, np.int32)
    table = chunk_table(len(q_lens), max(q_lens))
    return DeviceAttention(scratch).attend(
        queries, table, chunk_reads(q_lens), sm_scale, q_lens, splits, **options
    )


@pytest.mark.parametrize("options", [{}, {"soft_cap": 4.0}, {"window_left": 30}], ids=str)
@pytest.mark.parametrize(
    ("kv_dtype", "head_dim", "group"), [("f16", 128, 4), ("bf16", 64, 20), ("f32", 80, 1)]
)
def test_a_chunk_equals_the_host(kv_dtype, head_dim, group, options):
    rng = np.random.default_rng(1)
    config = cache_config(*FORMATS["k4v4"], head_dim, kv_dtype=kv_dtype)
    q_lens = (1, 70, 16, 130)
    queries, keys, values = raw_chunk(q_lens, head_dim, group, kv_dtype, rng)
    tokens = check_queries(
        queries, chunk_reads(q_lens), q_lens, HEADS, head_dim, options.get("window_left")
    )
    batch = TokenBatch(keys, values, kv_dtype, kv_dtype)
    want, want_lse = attend_chunk(tokens, batch, 0.2, options.get("soft_cap"), np.float64)
    out, lse = attend_by_kernels(config, queries, keys, values, kv_dtype, q_lens, 0.2, **options)
    assert relative_error(out, want.reshape(out.shape)) <= BOUND
    np.testing.assert_allclose(lse, want_lse.reshape(lse.shape), rtol=0, atol=BOUND)


def test_magnitudes_beyond_f16_saturate_instead_of_spreading_infinities():
    config = cache_config(*FORMATS["k4v4"], 64, kv_dtype="bf16")
    queries, keys, values = raw_chunk((3,), 64, 1, "f32", np.random.default_rng(2))
    keys[1, 0, 5], values[1, 1, 7] = 1e6, -1e6
    keys, values = as_kind(keys, "bf16"), as_kind(values, "bf16")
    out, lse = attend_by_kernels(config, queries, keys, values, "bf16", (3,), 0.1)
    assert np.isfinite(out).all() and np.isfinite(lse).all()
    assert np.abs(out).max() <= 65504


def test_slots_of_a_step_are_distinct_and_in_the_pages_of_their_sequence():
    q_lens = np.array([64, 0, 1, 65])
    slots, table = chunk_slots(q_lens, 65), chunk_table(4, 65)
    owners = np.repeat(np.arange(4), q_lens)
    assert len(np.unique(slots)) == len(slots)
    within = np.concatenate([np.arange(n) for n in q_lens])
    assert np.array_equal(slots // 64, table[owners, within // 64])
    assert np.array_equal(slots % 64, within % 64)
    with pytest.raises(ArgumentError, match="at most 64 tokens, got one of 65"):
        chunk_slots(q_lens, 64)
