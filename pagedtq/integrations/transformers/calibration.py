"""Key means of a model, from a text it reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from ...codec.key_means import MIN_TOKENS, KeyMeanAccumulator
from ...config import CacheConfig, Codec
from ...errors import ArgumentError
from ...wire.settings import CacheSettings
from .cache import PagedTQCache
from .model_shape import model_digest

#: Fewest different tokens of a calibration text, and the largest share one of them may have.
MIN_DISTINCT = 16
MAX_SHARE = 0.5


def calibrate_key_means(
    model: Any,
    input_ids: torch.Tensor | Iterable[torch.Tensor],
    settings: str | tuple[Codec, Codec] | CacheConfig = "k4v4",
    *,
    attention_mask: torch.Tensor | None = None,
    min_tokens: int = MIN_TOKENS,
    **fields: Any,
) -> CacheSettings:
    """Let a model read tokens, and return settings with the means of its keys.

    Some hundred tokens of ordinary text are enough for short contexts. Keys are stored after the
    rotary embedding, which turns their means away with the distance from the start: let the model
    read about as many tokens at once as it will serve. Never use the text that results are
    measured on.

    Parameters
    ----------
    model : PreTrainedModel
        A model that `PagedTQCache.from_model` accepts. It is put into evaluation mode while it
        reads.
    input_ids : tensor of int ``[rows, n]``, or an iterable of such
        The text; every tensor is one forward call from an empty cache.
    settings, **fields
        What the settings say of the cache, as in `PagedTQCache.from_model`.
    attention_mask : tensor ``[rows, n]``, optional
        0 for left padding; for a single tensor only.
    min_tokens : int
        Fewest tokens that are enough.

    Raises
    ------
    ArgumentError
        Too few tokens, tokens that hardly differ, or keys that are all the same.
    NonFiniteError
        Keys with NaN or infinity.
    UnsupportedError
        As `PagedTQCache.from_model`.
    """
    config = PagedTQCache.from_model(model, settings, **fields).config
    single = isinstance(input_ids, torch.Tensor)
    if attention_mask is not None and not single:
        raise ArgumentError("attention_mask needs a single tensor of input_ids")
    texts = [input_ids] if single else list(input_ids)
    masks = [attention_mask] if single else [None] * len(texts)
    _refuse_dull(texts, masks, min_tokens)
    sums = KeyMeanAccumulator(config.num_layers, config.num_kv_heads, config.head_dim)
    was_training = model.training
    model.eval()
    try:
        for ids, mask in zip(texts, masks):
            _add_text(model, ids, mask, sums)
    finally:
        model.train(was_training)
    return CacheSettings(
        config=config,
        key_means=sums.means(min_tokens),
        model_digest=model_digest(model),
        num_tokens=int(sums.num_tokens[0]),
    )


def _refuse_dull(
    texts: list[torch.Tensor], masks: list[torch.Tensor | None], min_tokens: int
) -> None:
    """Refuse a text before the model spends time on it."""
    for ids in texts:
        if ids.ndim != 2:
            raise ArgumentError(f"input_ids must have shape [rows, n], got {list(ids.shape)}")
    tokens = [ids if mask is None else ids[mask != 0] for ids, mask in zip(texts, masks)]
    flat = np.concatenate([np.zeros(0, np.int64), *(t.reshape(-1).cpu().numpy() for t in tokens)])
    if flat.size < min_tokens:
        raise ArgumentError(
            f"key means need at least {min_tokens} tokens, got {flat.size}; calibrate on a longer "
            f"text"
        )
    _, counts = np.unique(flat, return_counts=True)
    if len(counts) < MIN_DISTINCT or counts.max() > MAX_SHARE * flat.size:
        raise ArgumentError(
            f"the text has {len(counts)} different tokens, the commonest is "
            f"{counts.max() / flat.size:.0%} of it; calibrate on real text (at least "
            f"{MIN_DISTINCT} different tokens, none above {MAX_SHARE:.0%})"
        )


def _add_text(
    model: Any, ids: torch.Tensor, mask: torch.Tensor | None, sums: KeyMeanAccumulator
) -> None:
    """Read a text into exact pages, and add the keys they hold."""
    cache = PagedTQCache.from_model(model, "exact", window=0, max_tokens=int(ids.shape[1]))
    call: dict[str, Any] = {"attention_mask": mask, "past_key_values": cache}
    if mask is not None:
        # As in generation: a row's positions begin at its first real token.
        call["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        model(ids, **call)
    for layer in range(cache.config.num_layers):
        for seq_id in cache.sequence_ids:
            sums.add(layer, cache.pages.load(layer, seq_id)[0])
