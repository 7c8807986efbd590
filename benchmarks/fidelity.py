"""What a trained decoder loses under each setting, beside the formats of other systems.

The model is `small_decoder`'s. Key means come from calibration text, as many tokens as the
context, per-layer bits from other windows of it, and every figure from evaluation text that
neither saw. Divergences are of next-token distributions from the same model's with an exact cache,
over the second half of every window. Bytes are per token and KV head at the window's length,
everything counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from benchmarks.report import arguments, publish
from benchmarks.small_decoder import CONTEXT, trained, windows
from pagedtq.config import CacheConfig, Exact, LayerOverride, TurboQuant, preset
from pagedtq.fidelity.evaluation import probe
from pagedtq.fidelity.formats import CacheFormat, KVFormat, Uncompressed
from pagedtq.fidelity.measures import Fidelity, Reference
from pagedtq.fidelity.peer_formats import peer_formats, vllm_preset
from pagedtq.fidelity.sensitivity import Sensitivity, recommend, sweep
from pagedtq.fidelity.settings import config_fields, setting, settings
from pagedtq.models import ModelShape

WIDTHS = (2, 3, 4, 5, 6, 8)
#: Bytes per token and head: those of k2v2, k3v3 and k4v4 without a window, and some between.
BUDGETS = (44.0, 52.0, 60.0, 68.0)
#: Bytes per token and head that compositions may take.
EQUAL_BYTES = 80.0
#: Settings that are measured at shorter contexts too.
PLAIN = ("k4v4-w0", "k4v4-w0-centred", "k3v3-w0", "k3v3-w0-centred")
#: Tokens of the exact window.
WINDOWS = (0, 16, 32, 64, 128, 256)


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
        yield CacheFormat(f"k4v4-w{page_size}-centred, page {page_size}", config, means)


def compositions(
    shape: ModelShape, means: np.ndarray, sensitivities: Sequence[Sensitivity]
) -> Iterator[CacheFormat]:
    """Yield what at most ``EQUAL_BYTES`` per token and head buy.

    More bits, exact layers, a window and bits by layer, each alone and together.
    """
    for name in ("k4v4-w64", "k4v4-w64-centred", "k3v3-w192-centred", "k2v2-w320-centred"):
        yield setting(name, shape, means)
    wider = CacheConfig(
        **config_fields(shape), keys=TurboQuant(bits=5), values=TurboQuant(bits=4), window=0
    )
    yield CacheFormat("k5v4-w0-centred", wider, means)
    for layer in (0, shape.num_layers - 1):
        exact = LayerOverride(layers=(layer,), keys=Exact(), values=Exact())
        for window in (0, 64):
            config = preset("k2v2", **config_fields(shape), overrides=(exact,), window=window)
            yield CacheFormat(f"k2v2-w{window}-centred, layer {layer} exact", config, means)
    for window in (0, 64, 128):
        yield by_layer(shape, means, sensitivities, EQUAL_BYTES, window)


def by_layer(
    shape: ModelShape,
    means: np.ndarray,
    sensitivities: Sequence[Sensitivity],
    bytes_per_head: float,
    window: int = 0,
) -> CacheFormat:
    """Return the bits by layer that were found best for a budget per token and head."""
    budget = bytes_per_head * shape.num_layers * shape.num_kv_heads
    best = recommend(sensitivities, shape, budget, CONTEXT, window=window)
    bits = f"k{''.join(map(str, best.key_bits))} v{''.join(map(str, best.value_bits))}"
    return CacheFormat(f"{bits}, w{window}, centred", best.config, means)


class Table:
    """Rows of the result; a setting that answers several questions is measured once.

    Parameters
    ----------
    exact : KVFormat
        What compression is relative to.
    shape : ModelShape
        The model's.
    """

    def __init__(self, exact: KVFormat, shape: ModelShape) -> None:
        self.rows: list[dict[str, Any]] = []
        self._exact, self._heads = exact, shape.num_layers * shape.num_kv_heads
        self._known: dict[tuple[int, str], Fidelity] = {}

    def add(self, part: str, reference: Reference, formats: Iterable[KVFormat]) -> None:
        """Measure formats one after the other."""
        for form in tqdm(list(formats), desc=f"{part}, {reference.context} tokens", disable=None):
            # A name says all about a format at one context.
            key = reference.context, form.name
            found = self._known.get(key) or reference.measure(form, self._exact)
            self._known[key] = found
            worst = found.worst_heads[0]
            self.rows.append(
                {
                    "part": part,
                    "context": reference.context,
                    "setting": found.name,
                    "B/token/head": found.bytes_per_token / self._heads,
                    "compression": found.compression,
                    "KL mnat": 1e3 * found.kl,
                    "+-": 1e3 * found.kl_deviation,
                    "perplexity %": 100 * found.perplexity_change,
                    "top-1 %": 100 * found.top1_agreement,
                    "output error": found.output_error,
                    "worst layer.head": f"{worst.layer}.{worst.head}",
                }
            )


def windows_by_context(shape: ModelShape, means: np.ndarray) -> Iterator[CacheFormat]:
    """Yield the windows among which the default for a context is chosen."""
    for name in ("k4v4", "k3v3"):
        for size in WINDOWS:
            page_size = min(size, 64) or 64
            config = preset(name, **config_fields(shape), window=size, page_size=page_size)
            pages = f", page {page_size}" if page_size < 64 else ""
            yield CacheFormat(f"{name}-w{size}-centred{pages}", config, means)


def main() -> None:
    options = arguments("fidelity", __doc__)
    torch.manual_seed(options.seed)
    count = 1 if options.quick else 8
    model = LlamaForCausalLM.from_pretrained(trained(options.seed)).eval()
    calibration = windows("calibration", 1 if options.quick else 5, seed=options.seed)
    shape, means = probe(model, calibration[0], "small decoder")
    dims = shape.num_layers, shape.num_kv_heads, shape.head_dim
    exact = Uncompressed(*dims)
    scored = windows("evaluation", count, seed=options.seed)
    selection = Reference(model, calibration[-1:] if options.quick else calibration[1:])
    sensitivities = sweep(selection, shape, means, (2, 3, 5) if options.quick else WIDTHS)

    reference = Reference(model, scored)
    peers: list[KVFormat] = [*peer_formats(dims)]
    peers += [vllm_preset(name, dims, 2) for name in ("4bit_nc", "3bit_nc")]
    own = [*plain_settings(shape, means), *small_pages(shape, means)]
    found = [by_layer(shape, means, sensitivities, budget) for budget in BUDGETS]
    table = Table(exact, shape)
    table.add("settings", reference, [*own, *peers])
    table.add("bits by layer", reference, found)
    composed = compositions(shape, means, sensitivities)
    table.add("composition", reference, composed)
    table.add("window", reference, windows_by_context(shape, means))
    for context in (512, 1024):
        # As many scored tokens for every context, from the same windows.
        shorter = Reference(model, scored.reshape(-1, context))
        # Rotary embedding turns the means of keys with their positions.
        nearer = probe(model, calibration[0, :context], "small decoder")[1]
        plain: list[KVFormat] = [vllm_preset(name, dims) for name in ("4bit_nc", "3bit_nc")]
        plain += settings(PLAIN, shape, nearer)
        table.add("settings", shorter, plain)
        table.add("window", shorter, windows_by_context(shape, nearer))
    table.rows += [
        {
            "part": "sensitivity",
            "context": CONTEXT,
            "setting": f"layer {s.layer} {s.stream} {s.bits} bits",
            "KL mnat": 1e3 * s.kl,
            "layer": s.layer,
            "stream": s.stream,
            "bits": s.bits,
        }
        for s in sensitivities
    ]
    publish(
        "fidelity",
        table.rows,
        notes=[
            f"perplexity per byte with an exact cache: {reference.perplexity:.4f}; "
            f"{count} windows of {CONTEXT} bytes, the second half of each scored",
            "sensitivity: one stream of one layer coded alone, on calibration text",
        ],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
