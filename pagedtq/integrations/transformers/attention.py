"""An attention function for transformers that reads the pages: nothing is decompressed.

Importing this module registers it as ``"pagedtq"``; a model uses it after
``model.set_attn_implementation("pagedtq")``.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from ...errors import StepError, UnsupportedError
from .padded_batch import PaddedBatch
from .tensors import by_token, from_tokens, severed

#: The name under which the attention function is registered.
ATTENTION = "pagedtq"

# Attribute of the keys that `PagedTQCache.update` returns: what will attend for them.
_READER = "_pagedtq_reader"


class PageReader:
    """Attends for one layer of an open forward call.

    Parameters
    ----------
    batch : PaddedBatch
        What holds the pages.
    layer : int
        The layer.
    sliding_window : int or None
        How many tokens a query reads, itself included; None for all.
    """

    def __init__(self, batch: PaddedBatch, layer: int, sliding_window: int | None) -> None:
        self._batch = batch
        self._layer = layer
        self._window_left = None if sliding_window is None else sliding_window - 1

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        s_aux: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attend; arguments and result as `paged_attention_forward`."""
        arrival = self._batch.open_arrival
        places = arrival.places
        out = self._batch.attend(
            self._layer,
            by_token(query.float(), places),
            lambda: (by_token(key.float(), places), by_token(value.float(), places)),
            sm_scale=scaling,
            soft_cap=softcap,
            sink_logits=None if s_aux is None else s_aux.detach().float().cpu().numpy(),
            window_left=self._window_left,
        )
        result = from_tokens(out, (arrival.rows, arrival.num_tokens), places, query)
        return severed(result, query, key, value)


def own_tokens(
    batch: PaddedBatch,
    layer: int,
    sliding_window: int | None,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the call's own keys and values, marked with the reader of their layer."""
    # A view: the mark must not stay on a tensor that the model keeps.
    marked = keys.view_as(keys)
    setattr(marked, _READER, PageReader(batch, layer, sliding_window))
    return marked, values


@torch.compiler.disable  # type: ignore[untyped-decorator]
def paged_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over the pages of a `PagedTQCache`.

    Parameters
    ----------
    module : Module
        The attention layer.
    query : tensor ``[rows, num_q_heads, n, head_dim]``
        Queries of the call's tokens.
    key, value : tensor ``[rows, num_kv_heads, n, head_dim]``
        What `PagedTQCache.update` returned: the call's own keys and values.
    attention_mask : None
        The cache knows the padding and the layer's sliding window.
    dropout : float
        Must be 0.
    scaling : float, optional
        Logit scale, ``1 / sqrt(head_dim)`` by default.
    softcap : float, optional
        Logit soft cap.
    s_aux : tensor ``[num_q_heads]``, optional
        Learned sink logits.
    **kwargs
        What models pass besides; a ``position_bias`` is refused.

    Returns
    -------
    output : tensor ``[rows, n, num_q_heads, head_dim]``
        Zero at pads.
    weights : None

    Raises
    ------
    StepError
        If the keys do not come from a `PagedTQCache`.
    UnsupportedError
        Dropout, position bias, a mask, or attention that is not causal.
    """
    reader = getattr(key, _READER, None)
    if reader is None:
        raise StepError(
            f'attention "{ATTENTION}" reads the pages of a cache: pass '
            f"past_key_values=PagedTQCache.from_model(model), or choose another implementation "
            f"with model.set_attn_implementation"
        )
    if dropout:
        raise UnsupportedError(
            f"attention dropout is not supported, got {dropout}; call model.eval()"
        )
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if attention_mask is not None or kwargs.get("position_bias") is not None or not causal:
        raise UnsupportedError(
            "only causal attention without a mask or position bias of its own is supported; use "
            'model.set_attn_implementation("sdpa") with the same cache'
        )
    return reader.attend(query, key, value, scaling, softcap, s_aux), None


def no_mask(*args: Any, allow_is_causal_skip: bool = False, **kwargs: Any) -> None:
    """Make no mask where one would say nothing but causality, sliding window and padding.

    Raises
    ------
    UnsupportedError
        If the model asks for any other mask.
    """
    if not allow_is_causal_skip:
        raise UnsupportedError(
            f'attention "{ATTENTION}" supports causal masks with left padding and sliding windows '
            f'only; use model.set_attn_implementation("sdpa") with the same cache'
        )


AttentionInterface.register(ATTENTION, paged_attention_forward)
AttentionMaskInterface.register(ATTENTION, no_mask)
