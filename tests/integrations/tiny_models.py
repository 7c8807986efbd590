"""Tiny decoder models of several families, with random weights."""

from __future__ import annotations

import functools

import torch
import transformers

from pagedtq.integrations.transformers import PagedTQCache

VOCABULARY = 97

_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}

#: Grouped queries; every layer a sliding window; some of them, with a soft cap; one key head for
#: all; head dims that are no power of two; learned sinks.
FAMILIES = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "gemma2": ("Gemma2", {"sliding_window": 12, "query_pre_attn_scalar": 16}),
    "llama-mqa-80": ("Llama", {"head_dim": 80, "num_key_value_heads": 1, "num_hidden_layers": 2}),
    "qwen3-24": ("Qwen3", {"head_dim": 24, "num_key_value_heads": 8, "num_hidden_layers": 2}),
    "gpt-oss": (
        "GptOss",
        {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 8},
    ),
}


@functools.cache
def tiny(family: str, dtype: torch.dtype = torch.float32, seed: int = 0):
    """Return a model; the same object for the same arguments, so set its attention explicitly."""
    name, fields = FAMILIES[family]
    config = getattr(transformers, name + "Config")(**(_SHARED | fields))
    torch.manual_seed(seed)
    with torch.random.fork_rng():
        model = getattr(transformers, name + "ForCausalLM")(config)
    # Spread the attention's logits: at their first scale all keys look alike.
    for parameter_name, weight in model.named_parameters():
        if "q_proj.weight" in parameter_name or "k_proj.weight" in parameter_name:
            weight.data.mul_(6)
        if parameter_name.endswith("sinks"):
            weight.data.normal_()
    return model.to(dtype).eval()


def prompt(rows: int, tokens: int, seed: int = 1):
    """Return random token ids ``[rows, tokens]``, without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)


def left_padded(lengths: list[int], seed: int = 1):
    """Return token ids and mask of prompts of different lengths."""
    longest = max(lengths)
    ids = prompt(len(lengths), longest, seed)
    mask = (torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


def generate(model, ids, cache, **options):
    """Generate greedily unless told otherwise; no early end, logits included."""
    options = {"do_sample": False, "max_new_tokens": 24, "eos_token_id": None} | options
    return model.generate(
        ids,
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )


def reference_cache(model):
    return transformers.DynamicCache(config=model.config)


def paged(model, codecs="exact", **fields) -> PagedTQCache:
    return PagedTQCache.from_model(model, codecs, **({"debug": True} | fields))
