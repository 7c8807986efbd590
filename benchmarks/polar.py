"""Distortion of polar codes beside MSE and Prod, ordered by the bytes of a vector.

Random unit keys and queries at d = 128. ``mse`` is the squared error of the decoded key (for codes
with a sketch: of the part without it). ``d * ip error`` is the squared error of estimated inner
products, times d; ``slope`` is the regression of the estimates on the true products (1: unbiased).
Bytes are those of the planes that hold a key. No bar: the table is there to choose by.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.distortion import unit_vectors
from benchmarks.report import arguments, publish
from pagedtq import CacheConfig, Polar, TurboQuant
from pagedtq.codec import PolarCodec, TurboQuantCodec
from pagedtq.config import Codec, Exact
from pagedtq.paging.layout import PageLayout

DIM, HEADS = 128, 8


def codecs() -> list[tuple[str, Codec]]:
    """Return what is compared, with labels."""
    listed: list[tuple[str, Codec]] = []
    for bits in range(1, 9):
        listed.append((f"mse {bits}", TurboQuant(bits=bits)))
    for bits in range(2, 9):
        listed.append((f"prod {bits}", TurboQuant(bits=bits, estimator="prod")))
    for bits in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16):
        listed.append((f"polar {bits}", Polar(bits=bits)))
    for bits in (2, 3, 4, 5, 6, 7, 8):
        listed.append((f"polar + qjl {bits}", Polar(bits=bits, mode="polar_qjl")))
    # The defaults of the crate whose arrangement this is: f32 radii, a quarter of d projections.
    crate = Polar(bits=8, mode="polar_qjl", projections=DIM // 4, radii="f32")
    listed.append(("polar + qjl 8, f32 radii, 32 signs", crate))
    return listed


def key_bytes(form: Codec) -> float:
    """Return the bytes of one key's planes."""
    config = CacheConfig(
        num_layers=1, num_kv_heads=1, head_dim=DIM, num_pages=2, keys=form, values=Exact()
    )
    extent = PageLayout(config).extents[0]
    planes = [plane for name, plane in extent.planes.items() if name.startswith("key")]
    return sum(plane.nbytes for plane in planes) / config.page_size


def measure(
    label: str, form: Codec, counts: tuple[int, int], draws: int, seed: int
) -> dict[str, Any]:
    """Measure one codec over several independent rotations and projections."""
    num_keys, num_queries = counts
    rng = np.random.default_rng(seed)
    kind = PolarCodec if isinstance(form, Polar) else TurboQuantCodec
    error = estimated = crossed = squared = 0.0
    for draw in range(draws):
        codec: Any = kind(form, DIM, HEADS, seed=seed, first_kv_head=HEADS * draw)  # type: ignore[arg-type]
        keys = unit_vectors(rng, (num_keys, HEADS, DIM))
        queries = unit_vectors(rng, (num_queries, HEADS, DIM)).astype(np.float64)
        encoded = codec.encode(keys)
        rotated = codec.rotation.forward(keys.astype(np.float64))
        residual = codec.decode_rotated(encoded, np.float64) - rotated
        error += float(np.mean(np.sum(residual**2, axis=2)))
        estimates = codec.inner_products(queries, encoded)
        true = np.einsum("bhd,thd->bht", queries, keys)
        estimated += float(np.mean((estimates - true) ** 2))
        crossed += float(np.sum(estimates * true))
        squared += float(np.sum(true * true))
    size = key_bytes(form)
    return {
        "codec": label,
        "bytes": size,
        "bits per coordinate": 8 * size / DIM,
        "mse": error / draws,
        "d * ip error": DIM * estimated / draws,
        "slope": crossed / squared,
    }


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("polar", __doc__, argv)
    counts, draws = ((32, 32), 2) if options.quick else ((256, 128), 8)
    rows = []
    for label, form in codecs():
        rows.append(measure(label, form, counts, draws, options.seed))
        print(f"{label} done", file=sys.stderr)
    rows.sort(key=lambda row: row["bytes"])
    publish(
        "polar",
        rows,
        notes=[
            f"{counts[0] * HEADS * draws} keys, {counts[0] * counts[1] * HEADS * draws} pairs, "
            f"{HEADS * draws} rotations and projections per line. float16 keys take 256 bytes.",
        ],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
