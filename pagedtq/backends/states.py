"""Partial attention states: merging outputs by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

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
        The merged state. Without any key ``out`` is 0 and ``lse`` -inf.
    """
    stacked = np.stack(lses)
    top = stacked.max(axis=0)
    # Where every part is empty, any finite reference gives weights of exactly 0.
    weights = np.exp(stacked - np.where(np.isneginf(top), 0, top))
    total = weights.sum(axis=0)
    out = np.zeros_like(outs[0])
    for part, weight in zip(outs, weights):
        out += part * weight[..., None]
    out /= np.where(total > 0, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        lse = np.where(total > 0, np.log(total) + top, -np.inf)
    return out, lse.astype(stacked.dtype, copy=False)
