"""Arithmetic error of host attention and scores against float64 on the decoded vectors.

What coding costs is not in here (see `distortion` and `exact_window`): both sides see the same
codes; the reference decodes them, and computes, in float64. Relative error is the maximum over
queries of |out - ref| / |ref|, L2. Multi-page ragged batches; every group size; window off, one
page, two pages.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq import PagedKVCache, preset

HEADS, DIM, PAGE = 2, 128, 64
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 16)


def reference(
    query: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Attend and score one query token in float64 over dense keys and values."""
    group = query.shape[0] // HEADS
    keys, values = (np.repeat(a.astype(np.float64), group, axis=1) for a in (keys, values))
    scores = np.einsum("hd,nhd->hn", query.astype(np.float64), keys)
    weights = np.exp(scale * (scores - scores.max(axis=1, keepdims=True)))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("hn,nhd->hd", weights, values), scores


def error(got: np.ndarray, want: np.ndarray) -> float:
    """Return the largest relative L2 error over the rows."""
    return float(np.max(np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)))


def measure(
    name: str, window: int, key_norm: float, logit_std: float, lengths: list[int], seed: int
) -> tuple[float, float]:
    """Return the largest error of outputs and of scores over all groups and sequences."""
    rng = np.random.default_rng(seed)
    config = preset(
        name,
        num_layers=1,
        num_kv_heads=HEADS,
        head_dim=DIM,
        num_pages=sum(n // PAGE + 1 for n in lengths) + 1,
        page_size=PAGE,
        window=window,
    )
    cache, decoder = PagedKVCache(config), PagedKVCache(config, accumulate="float64")
    ids, loaded = [], []
    for length in lengths:
        keys, values = rng.standard_normal((2, 1, length, HEADS, DIM)).astype(np.float32)
        keys *= np.float32(key_norm / DIM**0.5)
        ids.append(cache.open())
        cache.append(ids[-1], keys, values)
        seq = decoder.open()
        decoder.append(seq, keys, values)
        loaded.append(decoder.load(0, seq)[:2])
    scale = logit_std / key_norm
    worst = [0.0, 0.0]
    for group in GROUPS:
        queries = rng.standard_normal((len(ids), HEADS * group, DIM)).astype(np.float32)
        out, _ = cache.attend(0, queries, ids, sm_scale=scale)
        scores = cache.score(0, queries, ids)
        for index, (keys, values) in enumerate(loaded):
            want, want_scores = reference(queries[index], keys, values, scale)
            worst[0] = max(worst[0], error(out[index], want))
            worst[1] = max(worst[1], error(scores.of(index)[0], want_scores))
    return worst[0], worst[1]


def main() -> None:
    options = arguments("accuracy", __doc__)
    lengths = [1, 63, 200] if options.quick else [1, 63, 64, 65, 200, 1000, 4099]
    rows: list[dict[str, Any]] = []
    cases = [(DIM**0.5, 1.0), (DIM**0.5, 3.0), (DIM**0.5, 10.0), (800.0, 10.0)]
    for name in ("k4v4", "k3v3", "k2v2", "k8v8", "prod4v4", "exact"):
        for norm, std in cases:
            bar = 1e-4 if norm > 100 else 1e-5
            for window in (0, PAGE, 2 * PAGE):
                attend, score = measure(name, window, norm, std, lengths, options.seed)
                row = {"format": name, "key norm": norm, "logit std": std, "window": window}
                rows.append({**row, "attend error": attend, "score error": score, "bar": bar})
    worst = max(rows, key=lambda row: max(row["attend error"], row["score error"]) / row["bar"])
    publish(
        "accuracy",
        rows,
        notes=[
            f"closest to its bar: {worst['format']}, window {worst['window']}, attend "
            f"{worst['attend error']:.1e}, score {worst['score error']:.1e}, bar {worst['bar']:.0e}"
        ],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
