"""What a trained decoder loses under each setting, beside the formats of other systems.

The model is `small_decoder`'s. Key means come from 512 tokens of calibration text, per-layer bits
from two other windows of it, and every figure from evaluation text that neither saw. Divergences
are of next-token distributions from the same model's with an exact cache, over the second half of
every window. Bytes are per token and KV head at the window's length, everything counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from benchmarks.report import arguments, publish
from benchmarks.small_decoder import CONTEXT, trained, windows
from pagedtq.config import Exact, LayerOverride, preset
from pagedtq.fidelity.evaluation import probe
from pagedtq.fidelity.formats import CacheFormat, KVFormat, Uncompressed
from pagedtq.fidelity.measures import Reference
from pagedtq.fidelity.peer_formats import peer_formats, vllm_preset
from pagedtq.fidelity.sensitivity import recommend, sweep
from pagedtq.fidelity.settings import config_fields, setting
from pagedtq.models import ModelShape

WIDTHS = (2, 3, 4, 5, 6, 8)


def plain_settings(shape: ModelShape, means: np.ndarray) -> list[CacheFormat]:
    """Return every preset, plain, centred, and with windows."""
    names = []
    for name in ("k8v8", "k4v4", "k3v4", "k3v3", "k2v2"):
        names += [f"{name}-w0", f"{name}-w0-centred", f"{name}-w64", f"{name}-w64-centred"]
    names += ["k2v2-w128-centred", "k2v2-w256-centred", "prod4v4-w0", "prod3v3-w0", "exact-w0"]
    return [setting(name, shape, means) for name in names]


def small_pages(shape: ModelShape, means: np.ndarray) -> Iterator[CacheFormat]:
    """Yield k4v4 with the small overlays that small pages allow."""
    for page_size in (16, 32):
        config = preset("k4v4", **config_fields(shape), window=page_size, page_size=page_size)
        yield CacheFormat(f"k4v4-w{page_size}-centred (page {page_size})", config, means)


def compositions(shape: ModelShape, means: np.ndarray) -> Iterator[CacheFormat]:
    """Yield what can be bought with the same bytes: exact layers, a window, more bits.

    Two exact layers of a 3-bit cache cost much more than a window; the uniform setting nearest in
    bytes stands beside each.
    """
    for count in (1, 2):
        ends = (*range(count), *range(-count, 0))
        exact = LayerOverride(layers=ends, keys=Exact(), values=Exact())
        for name in ("k2v2", "k3v3", "k4v4"):
            for window in (0, 64):
                config = preset(name, **config_fields(shape), overrides=(exact,), window=window)
                label = f"{name}-w{window}-centred+{count}x2 exact"
                yield CacheFormat(label, config, means)


def rows_of(
    reference: Reference, formats: Sequence[KVFormat], exact: KVFormat, shape: ModelShape
) -> Iterator[dict[str, Any]]:
    """Measure formats one after the other."""
    heads = shape.num_layers * shape.num_kv_heads
    for form in formats:
        found = reference.measure(form, exact)
        worst = found.worst_heads[0]
        yield {
            "context": reference.context,
            "setting": found.name,
            "B/token/head": found.bytes_per_token / heads,
            "compression": found.compression,
            "KL mnat": 1e3 * found.kl,
            "+-": 1e3 * found.kl_deviation,
            "perplexity %": 100 * found.perplexity_change,
            "top-1 %": 100 * found.top1_agreement,
            "output error": found.output_error,
            "worst layer.head": f"{worst.layer}.{worst.head}",
        }


def windows_by_context(shape: ModelShape, means: np.ndarray) -> list[CacheFormat]:
    """Return the windows among which the default for a context is chosen."""
    names = [f"{name}-w{w}-centred" for name in ("k4v4", "k3v3") for w in (0, 64, 128, 192)]
    return [setting(name, shape, means) for name in names]


def main() -> None:
    options = arguments("fidelity", __doc__)
    torch.manual_seed(options.seed)
    count = 1 if options.quick else 8
    model = LlamaForCausalLM.from_pretrained(trained(options.seed)).eval()
    calibration = windows("calibration", 1 if options.quick else 3, seed=options.seed)
    shape, means = probe(model, calibration[0, :512], "small decoder")
    dims = shape.num_layers, shape.num_kv_heads, shape.head_dim
    exact = Uncompressed(*dims)
    scored = windows("evaluation", count, seed=options.seed)
    rows: list[dict[str, Any]] = []

    reference = Reference(model, scored)
    peers: list[KVFormat] = [*peer_formats(dims)]
    peers += [vllm_preset(name, dims, 2) for name in ("4bit_nc", "3bit_nc")]
    own: list[KVFormat] = [*plain_settings(shape, means), *small_pages(shape, means)]
    own += compositions(shape, means)
    rows += rows_of(reference, [*own, *peers], exact, shape)

    selection = Reference(model, calibration[-1:] if options.quick else calibration[1:])
    sensitivities = sweep(selection, shape, means, (2, 4) if options.quick else WIDTHS)
    heads = shape.num_layers * shape.num_kv_heads
    found: list[KVFormat] = []
    for bytes_per_head in (36.0, 44.0, 52.0, 60.0, 68.0):
        best = recommend(sensitivities, shape, bytes_per_head * heads, CONTEXT)
        bits = f"k{''.join(map(str, best.key_bits))} v{''.join(map(str, best.value_bits))}"
        found.append(CacheFormat(f"recommended {bytes_per_head:g} B: {bits}", best.config, means))
    rows += rows_of(reference, found, exact, shape)

    for context in (512, 1024):
        shorter = Reference(model, scored.reshape(-1, context)[:: 1 if options.quick else 2])
        rows += rows_of(shorter, windows_by_context(shape, means), exact, shape)
    rows += rows_of(reference, windows_by_context(shape, means), exact, shape)
    publish(
        "fidelity",
        rows,
        notes=[
            f"perplexity per byte with an exact cache: {reference.perplexity:.4f}; "
            f"{count} windows of {CONTEXT} bytes",
            "sensitivities (millinats, one stream coded): "
            + "; ".join(f"{s.stream[0]}{s.layer}@{s.bits} {1e3 * s.kl:.3g}" for s in sensitivities),
        ],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
