"""Host encoding into pages, against the ``turboquant`` package from PyPI.

Vectors of 128 float32 numbers. Ours are checked, rounded to float16, encoded with their norm,
packed and written into pages; ``searched`` chooses the best codes of eight stretches. The peer's
`TurboQuantMSE.quantize` takes unit vectors and returns one byte per index of 4 bits. The peer needs
``pip install --no-deps turboquant==0.2.0`` beside the ``bench`` extra; without it only our rows are
printed.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from benchmarks.host_attend import THREADS, rounds
from benchmarks.report import arguments, publish
from pagedtq import PagedKVCache, preset

HEADS, DIM = 8, 128
PEER = "turboquant 0.2.0, 4 bits"


def label(name: str, searched: bool, threads: int, dtype: str = "float32") -> str:
    """Name a row of ours."""
    return f"pagedtq {name}{' searched' * searched}, {dtype} in, {threads} thread(s)"


def stores(tokens: int, vectors: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Return calls that store ``2 * tokens * HEADS`` vectors (keys and values)."""
    calls: dict[str, Callable[[], Any]] = {}
    slots = np.arange(64, 64 + tokens)
    shape = {"num_layers": 1, "num_kv_heads": HEADS, "head_dim": DIM, "num_pages": tokens // 64 + 3}
    for name, searched in itertools.product(("k4v4", "k3v3", "k2v2"), (False, True)):
        config = preset(name, window=0, **shape)
        if searched:
            keys, values = (
                msgspec.structs.replace(codec, scale="searched")
                for codec in (config.keys, config.values)
            )
            config = config.replace(keys=keys, values=values)
        dtypes = (np.float32, np.float16) if name == "k4v4" and not searched else (np.float32,)
        for threads in (1, THREADS):
            cache = PagedKVCache(config, num_threads=threads)
            # The slots belong to no sequence here: the backend is used on its own.
            cache.backend.page_owners = None
            for dtype in dtypes:
                data = vectors.reshape(2, tokens, HEADS, DIM).astype(dtype)
                what = label(name, searched, threads, np.dtype(dtype).name)
                calls[what] = lambda b=cache.backend, d=data: b.store(0, d[0], d[1], slots)
    return calls


def peer(vectors: np.ndarray) -> dict[str, Callable[[], Any]]:
    """Return the PyPI peer's encoder on the same number of unit vectors."""
    try:
        import torch
    except ImportError:
        return {}
    # The package calls a function that NumPy has renamed.
    if not hasattr(np, "trapz"):
        setattr(np, "trapz", np.trapezoid)  # noqa: B010
    try:
        from turboquant import TurboQuantMSE
    except ImportError:
        return {}
    torch.set_num_threads(THREADS)
    flat = vectors.reshape(-1, DIM)
    unit = torch.from_numpy(flat / np.linalg.norm(flat, axis=1, keepdims=True))
    codec = TurboQuantMSE(DIM, 4, device="cpu")
    return {PEER: lambda: codec.quantize(unit)}


def main() -> None:
    options = arguments("host_store", __doc__)
    tokens = 512 if options.quick else 4096
    rng = np.random.default_rng(options.seed)
    vectors = rng.standard_normal((2 * tokens * HEADS, DIM)).astype(np.float32)
    calls = {**peer(vectors), **stores(tokens, vectors)}
    times = rounds(calls, 3 if options.quick else 5)
    base = times.get(PEER)
    rows = []
    for name, seconds in times.items():
        row: dict[str, Any] = {
            "what": name,
            "vectors": len(vectors),
            "ms median": 1e3 * statistics.median(seconds),
            "k vectors/s": len(vectors) / statistics.median(seconds) / 1e3,
            "speed vs turboquant": None,
        }
        if base is not None:
            row["speed vs turboquant"] = statistics.median(b / s for b, s in zip(base, seconds))
        rows.append(row)
    notes = []
    for name, threads in itertools.product(("k4v4", "k3v3", "k2v2"), (1, THREADS)):
        plain, searched = (times[label(name, which, threads)] for which in (False, True))
        cost = statistics.median(s / p for p, s in zip(plain, searched))
        notes.append(
            f"{name} on {threads} thread(s): searching takes {cost:.1f} times as long "
            f"(median over rounds)"
        )
    publish(
        "host_store",
        rows,
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
        notes=notes,
    )


if __name__ == "__main__":
    main()
