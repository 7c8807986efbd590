"""What a cache learns of each forward call: the padding when it begins, and whether it failed.

`Cache.update` sees keys and values only. Hooks on the decoder module show the attention mask before
any layer runs, so that bad padding is refused before anything changes, and the end of the call, so
that a call that fails half-way leaves no tokens behind. The hooks act on the cache that a call
brings, and on no other.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ...errors import ArgumentTypeError, UnsupportedError
from .attention import ATTENTION


def watch(decoder: torch.nn.Module) -> None:
    """Put the hooks on a decoder module, once."""
    if before_call not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(before_call, with_kwargs=True)
        decoder.register_forward_hook(after_call, with_kwargs=True, always_call=True)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def before_call(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Tell the cache of a call which tokens are coming."""
    cache, arguments = _watched(decoder, args, kwargs)
    if cache is None:
        return
    inputs = arguments.get("input_ids")
    if inputs is None:
        inputs = arguments.get("inputs_embeds")
    if inputs is None:
        raise ArgumentTypeError("the call has neither input_ids nor inputs_embeds")
    mask = arguments.get("attention_mask")
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.ndim == 2):
        shape = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UnsupportedError(
            f"attention_mask must be a tensor [rows, tokens] with 0 for left padding, got {shape}; "
            f"masks of other kinds are not supported"
        )
    allowed = None if mask is None else mask.detach().cpu().numpy() != 0
    in_pages = decoder.config._attn_implementation == ATTENTION
    cache.begin_forward(int(inputs.shape[0]), int(inputs.shape[1]), allowed, in_pages)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def after_call(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Tell the cache how a call ended; torch passes no output of one that failed."""
    cache, _ = _watched(decoder, args, kwargs)
    if cache is not None:
        cache.end_forward(failed=output is None)


def _watched(
    decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    from .cache import PagedTQCache

    arguments = kwargs
    if args:
        signature = inspect.signature(decoder.forward)
        arguments = {**signature.bind_partial(*args).arguments, **kwargs}
    cache = arguments.get("past_key_values")
    return (cache if isinstance(cache, PagedTQCache) else None), arguments
