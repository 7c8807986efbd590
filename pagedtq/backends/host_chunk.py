"""Exact causal attention of a chunk over its own raw keys and values, in NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .queries import QueryTokens
from .tokens import TokenBatch

Array = npt.NDArray[Any]

_QUERY_TILE = 128


def attend_chunk(
    tokens: QueryTokens,
    batch: TokenBatch,
    sm_scale: float,
    soft_cap: float | None,
    dtype: npt.DTypeLike,
) -> tuple[Array, Array]:
    """Attend each query token over the chunk's tokens up to itself.

    Parameters
    ----------
    tokens : QueryTokens
        Queries ``[tokens, num_kv_heads, group, head_dim]`` and their grouping into sequences.
    batch : TokenBatch
        The same tokens' keys and values.
    sm_scale : float
        Logit scale.
    soft_cap : float or None
        Logit soft cap.
    dtype : dtype
        Type of weighted sums and outputs.

    Returns
    -------
    out : ndarray ``[tokens, num_kv_heads, group, head_dim]``
    lse : ndarray ``[tokens, num_kv_heads, group]``
    """
    queries = tokens.values * sm_scale
    out, lse = np.zeros(queries.shape, dtype), np.full(queries.shape[:3], -np.inf)
    keys = batch.vectors("key", slice(None)).astype(np.float64)
    values = batch.vectors("value", slice(None)).astype(dtype, copy=False)
    _, heads, group, dim = queries.shape
    ends = np.cumsum(tokens.q_lens)
    for begin, end in zip((ends - tokens.q_lens).tolist(), ends.tolist()):
        for low in range(begin, end, _QUERY_TILE):
            high = min(low + _QUERY_TILE, end)
            # Query i of the chunk reads keys floor - (first position) .. i.
            index = np.arange(low, high)
            causal = np.arange(begin, high) <= index[:, None]
            reach = index - (tokens.last[low:high] - tokens.floor[low:high])
            causal &= np.arange(begin, high) >= reach[:, None]
            mask = np.repeat(causal, group, axis=0)
            rows = queries[low:high].transpose(1, 0, 2, 3).reshape(heads, -1, dim)
            scores = np.matmul(rows, keys[begin:high].transpose(1, 2, 0))
            if soft_cap is not None:
                scores = np.tanh(scores / soft_cap) * soft_cap
            np.copyto(scores, -np.inf, where=~mask)
            # A query always reads itself: the peak is finite.
            peak = scores.max(axis=-1, keepdims=True)
            weights = np.exp(scores - peak)
            mass = weights.sum(axis=-1, keepdims=True)
            part = np.matmul(weights.astype(dtype), values[begin:high].transpose(1, 0, 2))
            part /= mass.astype(dtype)
            shape = (heads, high - low, group)
            out[low:high] = part.reshape(*shape, dim).transpose(1, 0, 2, 3)
            lse[low:high] = (np.log(mass) + peak).reshape(shape).transpose(1, 0, 2)
    return out, lse
