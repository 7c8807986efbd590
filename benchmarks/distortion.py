"""Distortion of the codec against its exact expectation, for every width, scale and projection.

MSE: mean squared error of decoded random unit vectors, per scale mode. The bar is ``none`` within
1 % of the exact Lloyd-Max distortion of the rotated coordinate's density (by quadrature).

Prod: error of estimated inner products of random unit vectors, over many independent projections
``S``. Bars for Gaussian ``S``: slope of the estimate on the true product 1 +- 0.005, mean squared
error within 3 % of ``(pi/2 - 1/d) D_mse(bits - 1) / d``. Orthogonal ``S`` has no closed form in
use here; its own value is printed.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq.codec import TurboQuantCodec, codebook
from pagedtq.config import TurboQuant

HEAD_DIMS = (64, 128, 256)
SCALES = ("none", "norm_corrected", "unbiased")
MSE_BAR, PROD_BAR, SLOPE_BAR = 0.01, 0.03, 0.005

#: Heads of one codec; each has its own signs and its own projection.
HEADS = 16


def unit_vectors(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """Draw vectors uniformly from the unit sphere, ``float32[*shape]``."""
    vectors = rng.standard_normal(shape)
    vectors /= np.linalg.norm(vectors, axis=2, keepdims=True)
    return vectors.astype(np.float32)


def measure(
    head_dim: int, bits: int, vectors: np.ndarray, counts: tuple[int, int, int], seed: int
) -> dict[str, Any]:
    """Measure one dimension and width: MSE in every scale, Prod with both projections."""
    exact = codebook(head_dim, bits).optimal_distortion
    row: dict[str, Any] = {"d": head_dim, "bits": bits, "mse exact": exact}
    for scale in SCALES:
        codec = TurboQuantCodec(TurboQuant(bits=bits, scale=scale), head_dim, HEADS, seed=seed)
        error = codec.decode(codec.encode(vectors)).astype(np.float64) - vectors
        row[f"{scale} %"] = 100 * (float(np.mean(np.sum(error**2, axis=2))) / exact - 1)
    held = abs(row["none %"]) <= 100 * MSE_BAR
    names = ("prod exact", "gaussian %", "gaussian slope", "orthogonal", "orthogonal slope")
    row.update(dict.fromkeys(names))
    if bits > 1:
        inner = codebook(head_dim, bits - 1).optimal_distortion
        row["prod exact"] = expected = math.pi / 2 * inner - inner / head_dim
        slope, error_times_d = _measure_prod("gaussian", head_dim, bits, counts, seed)
        row["gaussian %"] = 100 * (error_times_d / expected - 1)
        row["gaussian slope"] = slope
        slope, error_times_d = _measure_prod("orthogonal", head_dim, bits, counts, seed)
        row["orthogonal"] = error_times_d
        row["orthogonal slope"] = slope
        held = held and abs(row["gaussian %"]) <= 100 * PROD_BAR
        held = held and abs(row["gaussian slope"] - 1) <= SLOPE_BAR
    row["bar"] = "ok" if held else "MISSED"
    return row


def _measure_prod(
    kind: str, head_dim: int, bits: int, counts: tuple[int, int, int], seed: int
) -> tuple[float, float]:
    """Return the slope of estimates on true products, and the mean squared error times d."""
    num_keys, num_queries, draws = counts
    rng = np.random.default_rng(seed)
    config = TurboQuant(bits=bits, estimator="prod", projection=kind)
    moments = np.zeros(3)
    for first in range(0, draws, HEADS):
        codec = TurboQuantCodec(config, head_dim, HEADS, seed=seed, first_kv_head=first)
        keys = unit_vectors(rng, (num_keys, HEADS, head_dim))
        queries = unit_vectors(rng, (num_queries, HEADS, head_dim)).astype(np.float64)
        encoded = codec.encode(keys)
        estimates = codec.inner_products(queries, encoded)
        true = np.einsum("bhd,thd->bht", queries, keys)
        moments += (
            np.sum(estimates * true),
            np.sum(true * true),
            np.mean((estimates - true) ** 2) * HEADS / draws,
        )
    return float(moments[0] / moments[1]), float(moments[2]) * head_dim


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns 1 if a bar was missed in a full run."""
    options = arguments("distortion", __doc__, argv)
    count = 2_000 if options.quick else 200_000
    counts = (64, 64, HEADS) if options.quick else (256, 256, 4 * HEADS)
    rows = []
    for head_dim in HEAD_DIMS:
        rng = np.random.default_rng(options.seed)
        vectors = unit_vectors(rng, (count // HEADS, HEADS, head_dim))
        for bits in range(1, 9):
            rows.append(measure(head_dim, bits, vectors, counts, options.seed))
            if sys.stderr.isatty():
                print(f"\rd={head_dim} bits={bits} ", end="", file=sys.stderr)
    publish(
        "distortion",
        rows,
        notes=[
            f"MSE: {count} random unit vectors per line; % against the exact optimum.",
            f"Prod: {math.prod(counts)} pairs over {counts[2]} projections per line; squared "
            "errors of inner products, times d; % against (pi/2 - 1/d) D_mse(bits - 1).",
            f"Bars: |none %| <= {100 * MSE_BAR:.0f}, |gaussian %| <= {100 * PROD_BAR:.0f}, "
            f"|gaussian slope - 1| <= {SLOPE_BAR}.",
        ],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )
    missed = any(row["bar"] != "ok" for row in rows)
    return 1 if missed and not options.quick else 0


if __name__ == "__main__":
    raise SystemExit(main())
