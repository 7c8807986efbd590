"""What searched codes buy in a trained decoder, beside what encoding them costs.

The model and the three parts of its text are those of `benchmarks.fidelity`. Compared are codes as
they come and codes searched over stretches (``scale="searched"``), with and without centred keys,
and vLLM's presets, at two contexts. Encoding is timed on vectors of the same ``head_dim``.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import LlamaForCausalLM

from benchmarks.report import RESULTS, arguments, publish
from benchmarks.small_decoder import CONTEXT, trained, windows
from pagedtq.codec import TurboQuantCodec
from pagedtq.config import LayerOverride, TurboQuant
from pagedtq.fidelity.evaluation import probe
from pagedtq.fidelity.formats import CacheFormat, KVFormat, Uncompressed
from pagedtq.fidelity.measures import Reference
from pagedtq.fidelity.peer_formats import vllm_preset
from pagedtq.fidelity.settings import setting, settings
from pagedtq.models import ModelShape

NAMES = (
    "k4v4-w0",
    "k4v4-w0-centred",
    "k4v4-w0-searched",
    "k4v4-w0-centred-searched",
    "k3v3-w0",
    "k3v3-w0-centred",
    "k3v3-w0-searched",
    "k3v3-w0-centred-searched",
)
WINDOWED = ("k4v4-w64-centred", "k4v4-w64-centred-searched", "k3v3-w64-centred-searched")
PEER_OF = {"k4v4": "vllm-4bit_nc", "k3v3": "vllm-3bit_nc"}


def one_stream_wider(shape: ModelShape, means: np.ndarray) -> CacheFormat:
    """Return three bits but for the stream that is most sensitive at three, which gets four.

    Calibration text says which one (the committed result of `benchmarks.fidelity`); the cache still
    takes fewer bytes than vLLM's preset.
    """
    rows = json.loads((RESULTS / "fidelity.json").read_text(encoding="utf-8"))["rows"]
    known = [row for row in rows if row["part"] == "sensitivity" and row["bits"] == 3]
    worst = max(known, key=lambda row: row["KL mnat"])
    config = setting("k3v3-w0-searched", shape).config
    codecs = {"keys": config.keys, "values": config.values}
    codecs[worst["stream"]] = TurboQuant(bits=4, scale="searched")
    wider = LayerOverride(layers=(worst["layer"],), **codecs)
    name = f"k3v3-w0-centred-searched, layer {worst['layer']} {worst['stream'][0]}4"
    return CacheFormat(name, config.replace(overrides=(wider,)), means)


def encode_seconds(bits: int, scale: str, vectors: np.ndarray, repeats: int) -> float:
    """Return the least CPU time of encoding some vectors, one thread."""
    heads, head_dim = vectors.shape[1:]
    codec = TurboQuantCodec(
        TurboQuant(bits=bits, scale=scale), head_dim, heads, seed=0, layer=0, stream="key"
    )
    best = float("inf")
    for _ in range(repeats):
        started = time.thread_time()
        codec.encode(vectors)
        best = min(best, time.thread_time() - started)
    return best


def main() -> None:
    options = arguments("fidelity_search", __doc__)
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM.from_pretrained(trained(options.seed)).eval()
    calibration = windows("calibration", 1, seed=options.seed)[0]
    scored = windows("evaluation", 1 if options.quick else 8, seed=options.seed)
    rng = np.random.default_rng(options.seed)
    sample = rng.standard_normal((2048, 2, 64)).astype(np.float32)
    cost = {
        (bits, scale): encode_seconds(bits, scale, sample, 2 if options.quick else 9)
        for bits in (3, 4)
        for scale in ("norm_corrected", "searched")
    }
    rows: list[dict[str, Any]] = []
    for context in (512,) if options.quick else (512, CONTEXT):
        shape, means = probe(model, calibration[:context], "small decoder")
        dims = shape.num_layers, shape.num_kv_heads, shape.head_dim
        exact = Uncompressed(*dims)
        reference = Reference(model, scored.reshape(-1, context))
        names = (*NAMES, *WINDOWED) if context == CONTEXT else NAMES
        formats: list[KVFormat] = [vllm_preset(name, dims) for name in ("4bit_nc", "3bit_nc")]
        formats += settings(names, shape, means)
        if context == CONTEXT:
            formats.append(one_stream_wider(shape, means))
        of_peer: dict[str, float] = {}
        for form in tqdm(formats, desc=f"{context} tokens", disable=None):
            found = reference.measure(form, exact)
            of_peer[found.name] = found.kl
            bits, scale = int(found.name[1]) if found.name[0] == "k" else 0, "norm_corrected"
            if "searched" in found.name:
                scale = "searched"
            peer = PEER_OF.get(found.name[:4])
            rows.append(
                {
                    "context": context,
                    "setting": found.name,
                    "B/token/head": found.bytes_per_token / dims[0] / dims[1],
                    "KL mnat": 1e3 * found.kl,
                    "+-": 1e3 * found.kl_deviation,
                    "x vLLM preset": found.kl / of_peer[peer] if peer else None,
                    "perplexity %": 100 * found.perplexity_change,
                    "output error": found.output_error,
                    "encode ns per vector": 1e9 * cost[bits, scale] / 4096 if bits else None,
                }
            )
    publish(
        "fidelity_search",
        rows,
        notes=[
            "x vLLM preset: divergence over that of vLLM's preset of as many bits, which takes 2 "
            "bytes more",
            "encoding: least CPU time of one thread, head_dim 64, checks and packing included",
        ],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
