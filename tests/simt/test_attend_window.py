"""The exact window's kernel source against the host backend in float64, run on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq import CacheConfig, PagedKVCache, TurboQuant
from pagedtq.backends.host import HostBackend
from pagedtq.backends.queries import without_chunk
from pagedtq.paging.kernel_macros import DTYPE_NUMBERS
from tests.reference import relative_error
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
    out = np.full(queries.shape, np.nan, np.float32)
    lse = np.full(queries.shape[:2], np.nan, np.float32)
    num_rows = lse.size
    macros = {**cache.backend.layout.kernel_macros(0), "INPUT_DTYPE": DTYPE_NUMBERS["f32"]}
    compile_kernels("attend_window.cu", macros).launch(
        "attend_window", -(-num_rows // 4), 128, queries, np.stack(list(read)), reads.kv_lens,
        np.concatenate([[0], np.cumsum(q_lens)]).astype(np.int32), slots, records,
        window.ring, np.int32(window.rows), window.sink, np.int32(window.sinks),
        *map(np.int32, (len(ids), num_rows, HEADS * group, HEADS)), np.float32(0.3),
        np.float32(options.get("soft_cap", 0.0)), np.int32(options.get("window_left", -1)),
        out, lse,
    )  # fmt: skip
    assert relative_error(out, want) <= 1e-5
    np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-5)
