"""A transformers model on `PagedTQCache` beside `DynamicCache`: prefill and one decode step.

Model: Llama shape with random weights, 4 layers, hidden size 512, 8 query and 2 KV heads, head_dim
64, float32, one thread. Steps of all caches take turns; the least process CPU time of each counts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.report import arguments, publish
from pagedtq.integrations.transformers import PagedTQCache

_LAYERS, _HEADS, _DIM = 4, 2, 64


def main() -> None:
    options = arguments("transformers_cache", __doc__)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=_LAYERS,
            num_attention_heads=8,
            num_key_value_heads=_HEADS,
            head_dim=_DIM,
            max_position_embeddings=1 << 14,
        )
    ).eval()
    rows = []
    for tokens in (256,) if options.quick else (1024, 4096):
        rows += _compare(model, tokens, 2 if options.quick else 15)
    publish(
        "transformers_cache",
        rows,
        notes=[
            "One sequence, weights included in every time; a decode step adds one token.",
            "Largest logit difference: of the decode step, against DynamicCache.",
            "Bytes: what holds the tokens, exact window included, over float32 keys and values.",
        ],
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def _compare(model: Any, tokens: int, repeats: int) -> list[dict[str, Any]]:
    prompt, step = torch.randint(0, 256, (1, tokens)), torch.randint(0, 256, (1, 1))
    variants: dict[str, tuple[str, Callable[[], Any]]] = {
        "DynamicCache": ("sdpa", lambda: DynamicCache(config=model.config)),
        **{
            f"{name}, {'on pages' if how == 'pagedtq' else 'decoded'}": (
                how,
                lambda name=name: PagedTQCache.from_model(model, name, num_threads=1),
            )
            for name in ("exact", "k4v4", "k2v2")
            for how in ("sdpa", "pagedtq")
        },
    }
    caches, prefill, best, logits = {}, {}, {}, {}
    for what, (how, make) in variants.items():
        caches[what] = make()
        prefill[what], _ = _timed(model, how, prompt, caches[what])
        best[what] = float("inf")
    for _ in range(repeats):
        for what, (how, _) in variants.items():
            seconds, logits[what] = _timed(model, how, step, caches[what])
            best[what] = min(best[what], seconds)
            caches[what].crop(-1)
    base = "DynamicCache"
    return [
        {
            "cache": what,
            "tokens": tokens,
            "prefill ms": 1e3 * prefill[what],
            "step ms": 1e3 * best[what],
            "step time vs DynamicCache": best[what] / best[base],
            "largest logit difference": float((logits[what] - logits[base]).abs().max()),
            "bytes vs float32": _bytes(caches[what], tokens),
        }
        for what in variants
    ]


def _timed(model: Any, how: str, ids: Any, cache: Any) -> tuple[float, Any]:
    model.set_attn_implementation(how)
    with torch.no_grad():
        begin = time.process_time()
        logits = model(ids, past_key_values=cache).logits[0, -1]
        return time.process_time() - begin, logits


def _bytes(cache: Any, tokens: int) -> float:
    if not isinstance(cache, PagedTQCache):
        return 1.0
    report = cache.pages.memory_report()
    held = report.pages_used_bytes + report.window_used_bytes
    return held / (tokens * _LAYERS * _HEADS * _DIM * 2 * 4)


if __name__ == "__main__":
    main()
