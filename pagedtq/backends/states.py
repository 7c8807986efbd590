"""Partial attention states: merging outputs by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentTypeError, NonFiniteError
from .dtypes import check_shape

Array = npt.NDArray[Any]


def merge_states(outs: Sequence[Array], lses: Sequence[Array]) -> tuple[Array, Array]:
    """Merge attention over disjoint parts of the keys into attention over all of them.

    ``out = sum_i exp(lse_i - lse) out_i`` with ``lse = log(sum_i exp(lse_i))`` (the split-KV
    merge of FlashDecoding; FlashInfer calls the pair an attention state).

    Parameters
    ----------
    outs : sequence of ndarray ``[..., head_dim]``
        Normalised outputs of the parts.
    lses : sequence of ndarray ``[...]``
        Natural log of the parts' softmax denominators; -inf for a part without keys.

    Returns
    -------
    out, lse : ndarray
        The merged state, ``lse`` in float64. Without any key ``out`` is 0 and ``lse`` -inf.
    """
    stacked = np.stack(lses).astype(np.float64, copy=False)
    top = stacked.max(axis=0)
    # Where every part is empty, any finite reference gives weights of exactly 0.
    weights = np.exp(stacked - np.where(np.isneginf(top), 0, top))
    total = weights.sum(axis=0)
    out = np.zeros_like(outs[0])
    for part, weight in zip(outs, weights):
        out += part * (weight / np.where(total > 0, total, 1))[..., None].astype(out.dtype)
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.log(total) + top, -np.inf)
    return out, lse


def add_sink(out: Array, lse: Array, sink_logits: Array | None) -> tuple[Array, Array]:
    """Merge a learned attention sink into a state: a key of given logit and value 0.

    Parameters
    ----------
    out : ndarray ``[tokens, num_q_heads, head_dim]``
    lse : ndarray ``[tokens, num_q_heads]``
        The state over all real keys.
    sink_logits : ndarray ``[num_q_heads]`` or None
        The sink's logit per head, -inf for none; None leaves the state as it is.

    Raises
    ------
    ArgumentError, ArgumentTypeError, NonFiniteError
        Wrong shape or type; NaN or inf.
    """
    if sink_logits is None:
        return out, lse
    check_shape(sink_logits, "sink_logits", (lse.shape[1],), "one per query head")
    if sink_logits.dtype.kind != "f":
        raise ArgumentTypeError(f"sink_logits must be floats, got {sink_logits.dtype}")
    if not (sink_logits < np.inf).all():
        raise NonFiniteError(f"sink_logits must be finite or -inf, got {sink_logits}")
    sink = np.broadcast_to(sink_logits.astype(lse.dtype), lse.shape)
    return merge_states((out, np.zeros_like(out)), (lse, sink))
