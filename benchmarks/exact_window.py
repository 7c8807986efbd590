"""What the exact window does to the error of attention when the newest keys matter most.

100 draws of a sequence whose keys follow a random walk, grown token by token from 1 token to four
pages. At every length each draw's last key, plus noise, is the query; outputs of the same cache
with the window on (one page and 4 sinks, the default) and off are compared with float64 attention
over the uncompressed keys and values.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq import PagedKVCache, preset

DIM, PAGE = 128, 64
#: Step of the walk: successive keys correlate by this much.
MEMORY = 0.95


def draw(draws: int, length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return keys (a stationary random walk) and values ``float32[draws, length, DIM]``."""
    keys = np.empty((draws, length, DIM))
    keys[:, 0] = rng.standard_normal((draws, DIM))
    for t in range(1, length):
        step = rng.standard_normal((draws, DIM)) * (1 - MEMORY**2) ** 0.5
        keys[:, t] = MEMORY * keys[:, t - 1] + step
    values = rng.standard_normal((draws, length, DIM))
    return keys.astype(np.float32), values.astype(np.float32)


def exact(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Attend in float64: ``[draws, DIM]``."""
    logits = np.einsum("bd,bnd->bn", query.astype(np.float64), keys) * DIM**-0.5
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    return np.einsum("bn,bnd->bd", weights, values)


def errors(name: str, draws: int, length: int, seed: int) -> dict[str, np.ndarray]:
    """Return the mean relative error ``[length]`` with the window on and off."""
    rng = np.random.default_rng(seed)
    keys, values = draw(draws, length, rng)
    caches = {}
    for label, window in (("on", None), ("off", 0)):
        config = preset(
            name,
            num_layers=1,
            num_kv_heads=1,
            head_dim=DIM,
            num_pages=draws * (length // PAGE + 1) + 1,
            num_window_slots=draws,
            window=window,
        )
        cache = PagedKVCache(config)
        caches[label] = cache, np.array([cache.open() for _ in range(draws)])
    result = {label: np.empty(length) for label in caches}
    for t in range(length):
        query = keys[:, t] + 0.5 * rng.standard_normal((draws, DIM)).astype(np.float32)
        want = exact(query, keys[:, : t + 1].astype(np.float64), values[:, : t + 1])
        size = np.linalg.norm(want, axis=1)
        for label, (cache, ids) in caches.items():
            cache.append(ids, keys[None, :, t, None], values[None, :, t, None], np.ones(draws, int))
            out, _ = cache.attend(0, query[:, None], ids)
            result[label][t] = np.mean(np.linalg.norm(out[:, 0] - want, axis=1) / size)
    return result


def main() -> None:
    options = arguments("exact_window", __doc__)
    draws, length = (10, 80) if options.quick else (100, 4 * PAGE)
    rows: list[dict[str, Any]] = []
    notes = []
    for name in ("k4v4", "k2v2"):
        result = errors(name, draws, length, options.seed)
        on, off = result["on"], result["off"]
        for tokens in (1, 4, 5, 63, 64, 65, 68, 96, 128, 129, 192, 193, 255, 256):
            if tokens <= length:
                a, b = on[tokens - 1], off[tokens - 1]
                row = {"format": name, "tokens": tokens, "error on": a, "error off": b}
                rows.append({**row, "on/off": a / b})
        worst = int(np.argmax(on / off))
        notes.append(
            f"{name}: lower with the window at {int((on < off).sum())} of {length} lengths; "
            f"worst ratio {on[worst] / off[worst]:.3f} at {worst + 1} tokens"
        )
    publish(
        "exact_window",
        rows,
        notes=notes,
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
