"""The exact window's kernel source against the host backend in float64, run on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq import CacheConfig, PagedKVCache, TurboQuant
from pagedtq.backends.host import HostBackend
from pagedtq.backends.queries import without_chunk
from pagedtq.paging.kernel_macros import DTYPE_NUMBERS
from tests.reference import relative_error, softmax_attention
from tests.simt.harness import compile_kernels

HEADS = 2


@pytest.mark.parametrize("apart", [False, True], ids=["whole", "chunk-apart"])
@pytest.mark.parametrize("options", [{}, {"soft_cap": 4.0}, {"window_left": 9}], ids=str)
@pytest.mark.parametrize(
    ("kv_dtype", "head_dim", "group"), [("f16", 64, 4), ("bf16", 80, 3), ("f32", 20, 1)]
)
def test_the_window_equals_the_host_over_sinks_and_ring(kv_dtype, head_dim, group, options, apart):
    rng = np.random.default_rng(1)
    codec = TurboQuant(bits=4, rotation="dense" if head_dim == 20 else "hadamard")
    config = CacheConfig(
        num_layers=1, num_kv_heads=HEADS, head_dim=head_dim, num_pages=40, page_size=16, window=32,
        sinks=3, num_window_slots=8, keys=codec, values=codec, kv_dtype=kv_dtype,
    )  # fmt: skip
    cache = PagedKVCache(config, debug=True, num_threads=1)
    ids, q_lens = [], (1, 2, 4, 1)
    for length in (1, 40, 75, 120):
        ids.append(cache.open())
        shape = (2, 1, length, HEADS, head_dim)
        cache.append(ids[-1], *rng.standard_normal(shape).astype(np.float32))
    cache.tables.set_start(ids[3], 1, 60)
    reads = cache.tables.reads(ids, True)
    slots, records = cache.tables.window_slots(ids), cache.tables.sink_records(ids)
    queries = rng.standard_normal((sum(q_lens), HEADS * group, head_dim)).astype(np.float32)
    host = HostBackend(config, accumulate="float64", num_threads=1)
    window = host.layers[0].window
    window.ring, window.sink = (getattr(cache.backend.window(0), n) for n in ("ring", "sink"))
    want, want_lse = host.attend_window(
        0, queries, slots, records, reads, 0.3, np.array(q_lens), chunk_apart=apart, **options
    )
    read = without_chunk(reads, np.array(q_lens)) if apart else reads
    out, lse = attend_window(cache, queries, ids, read, reads.kv_lens, q_lens, 0.3, **options)
    assert relative_error(out, want) <= 1e-5
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)


def attend_window(cache, queries, ids, reads, lengths, q_lens, sm_scale, **options):
    """Run the kernel: ``out, lse`` over sinks and ring, with float32 queries."""
    out = np.full(queries.shape, np.nan, np.float32)
    lse = np.full(queries.shape[:2], np.nan, np.float32)
    window = cache.backend.window(0)
    macros = {**cache.backend.layout.kernel_macros(0), "INPUT_DTYPE": DTYPE_NUMBERS["f32"]}
    compile_kernels("attend_window.cu", macros).launch(
        "attend_window", -(-lse.size // 4), 128, queries, np.stack(list(reads)), lengths,
        np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32),
        cache.tables.window_slots(ids), cache.tables.sink_records(ids),
        window.ring, np.int32(window.rows), window.sink, np.int32(window.sinks),
        *map(np.int32, (len(ids), lse.size, queries.shape[1], HEADS)), np.float32(sm_scale),
        np.float32(options.get("soft_cap", 0.0)), np.int32(options.get("window_left", -1)),
        out, lse,
    )  # fmt: skip
    return out, lse


@pytest.mark.parametrize("window_left", [None, 5])
def test_query_tokens_among_the_sinks_see_nothing_that_comes_after_them(window_left):
    # Prompts longer than the ring: their first query tokens lie before the sinks' end. Keys and
    # values of the window are exact, so float64 is the truth.
    rng = np.random.default_rng(2)
    codec = TurboQuant(bits=4, rotation="dense")
    config = CacheConfig(
        num_layers=1, num_kv_heads=HEADS, head_dim=20, num_pages=40, page_size=16, window=16,
        sinks=8, num_window_slots=8, keys=codec, values=codec, kv_dtype="f32",
    )  # fmt: skip
    cache = PagedKVCache(config, debug=True, num_threads=1)
    q_lens = (3, 35, 50)
    keys, values = rng.standard_normal((2, sum(q_lens), HEADS, 20)).astype(np.float32)
    ids = [cache.open() for _ in q_lens]
    cache.append(np.array(ids), keys[None], values[None], list(q_lens))
    queries = rng.standard_normal((sum(q_lens), 2 * HEADS, 20)).astype(np.float32)
    reads = cache.tables.reads(ids, True)
    assert reads.first.tolist() == [0, 8, 8]
    options = {} if window_left is None else {"window_left": window_left}
    out, lse = attend_window(cache, queries, ids, reads, reads.kv_lens, q_lens, 0.3, **options)
    for i, end in enumerate(np.cumsum(q_lens)):
        part, place = slice(end - q_lens[i], end), np.arange(q_lens[i])
        held = np.flatnonzero((place < reads.first[i]) | (place >= reads.stop[i]))
        want, want_lse = softmax_attention(
            queries[part], keys[part][held], values[part][held], held, place, 0.3,
            floor=None if window_left is None else place - window_left,
        )  # fmt: skip
        assert relative_error(out[part], want) <= 1e-5
        np.testing.assert_allclose(lse[part], want_lse, rtol=1e-5, atol=1e-5)
