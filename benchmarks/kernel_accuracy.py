"""How exact the CUDA kernels are: pages beside the host's, outputs beside float64.

The kernels' own source runs on the CPU, on the harness of ``tests/simt`` (which needs g++), so what
is measured is their arithmetic, not a device's rounding of divisions and powers of two. Groups of
rows:

* store: codes and norms of the same vectors, of norms 1e-3 to 1e3, by kernel and by NumPy
* attend: largest relative error of outputs (L2 per query token and head) against float64 on the
  decoded vectors, for logits of spread 3, of each way to multiply
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.gpu.page_differences import compare_pages
from benchmarks.report import arguments, publish
from pagedtq.backends.host import HostBackend

# The harness's modules import each other by name.
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "simt"))

from tests.reference import softmax_attention
from tests.simt.device_attention import DeviceAttention
from tests.simt.device_layer import cache_config
from tests.simt.test_attend import make_cache
from tests.simt.test_store import FORMATS, store_both, tokens

STORED = ("k2v2", "k3v3", "k4v4", "k8v8", "prod4v4", "prod3v3", "searched4v3")
KINDS = ("f16", "bf16", "f32")
HEADS, GROUP, SPREAD = 2, 4, 3.0
#: Ways to multiply: keys, values as bytes.
WAYS = {"halves": (False, False), "keys as bytes": (True, False), "both as bytes": (True, True)}
DIMS = (64, 96, 128, 256)
COUNTED = ("codes", "codes that differ", "norms", "norms that differ")


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("kernel_accuracy", __doc__, argv)
    count = 40 if options.quick else 1_500
    formats = STORED[:2] if options.quick else STORED
    dims = DIMS[:1] if options.quick else DIMS
    rows = [store_row(form, count, options.seed) for form in formats]
    rows += [
        attend_row(name, dim, options.seed) for name in ("k2v2", "k3v3", "k4v4") for dim in dims
    ]
    publish(
        "kernel_accuracy",
        [{name: row.get(name) for name in ("what", *COUNTED, *WAYS)} for row in rows],
        notes=(
            f"store: head dim 128; {count} tokens of {HEADS} heads in each of {', '.join(KINDS)}",
            f"attend: sequences of 300 and 77 tokens, group {GROUP}, one query token each",
        ),
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def store_row(form: str, count: int, seed: int) -> dict[str, object]:
    """Store vectors of every type by kernel and host; count what differs."""
    totals = np.zeros(4, np.int64)
    for kind in KINDS:
        config = cache_config(*FORMATS[form], 128, page_size=64, num_pages=count // 64 + 3)
        host = HostBackend(config)
        slots = np.arange(64, 64 + count, dtype=np.int64)
        keys, values = tokens(count, HEADS, 128, kind, seed=seed)
        device = store_both(host, keys, values, slots, kind)
        found = compare_pages(host.layout, device.pool, host.pool)
        totals += (found.codes, found.codes_differ, found.norms, found.norms_differ)
    return {"what": f"store {form}", **dict(zip(COUNTED, totals.tolist(), strict=True))}


def attend_row(name: str, dim: int, seed: int) -> dict[str, object]:
    """Attend in every way; return the largest errors."""
    rng = np.random.default_rng(seed)
    cache = make_cache(name, dim, 64)
    ids, lengths = [cache.open(), cache.open()], (300, 77)
    for seq, length in zip(ids, lengths, strict=True):
        cache.append(seq, *rng.standard_normal((2, 1, length, HEADS, dim)).astype(np.float32))
    queries = rng.standard_normal((2, GROUP * HEADS, dim)).astype(np.float32)
    scale = SPREAD * dim**-0.5
    want = np.concatenate(
        [
            softmax_attention(
                queries[at : at + 1], *cache.load(0, seq), np.array([end - 1]), scale
            )[0]
            for at, (seq, end) in enumerate(zip(ids, lengths, strict=True))
        ]
    )
    table, reads = cache.tables.block_table(ids), cache.tables.reads(ids, False)
    device = DeviceAttention(cache.backend)
    row: dict[str, object] = {"what": f"attend {name}, head dim {dim}"}
    for way, (int8_keys, int8_values) in WAYS.items():
        if int8_values and name != "k2v2" and dim > 192:
            continue  # refused: registers do not hold them
        out, _ = device.attend(
            queries, table, reads, scale, int8_keys=int8_keys, int8_values=int8_values
        )
        errors = np.linalg.norm(out - want, axis=-1) / np.linalg.norm(want, axis=-1)
        row[way] = float(errors.max())
    return row


if __name__ == "__main__":
    main()
