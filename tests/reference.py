"""Float64 references the tests compare with; independent of the library's own arithmetic."""

import numpy as np


def softmax_attention(
    queries, keys, values, positions, query_positions, sm_scale, *, soft_cap=None, floor=None
):
    """Attend in float64: ``out [m, heads, d]``, ``lse [m, heads]``; -inf and 0 where nothing is."""
    queries, keys, values = (np.asarray(a, np.float64) for a in (queries, keys, values))
    group = queries.shape[1] // keys.shape[1]
    keys, values = (np.repeat(a, group, axis=1) for a in (keys, values))
    logits = np.einsum("mhd,nhd->mhn", queries, keys) * sm_scale
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    seen = positions[None, :] <= query_positions[:, None]
    if floor is not None:
        seen &= positions[None, :] >= floor[:, None]
    logits = np.where(seen[:, None, :], logits, -np.inf)
    top = logits.max(axis=-1, initial=-np.inf, keepdims=True)
    weights = np.exp(logits - np.where(np.isneginf(top), 0, top))
    mass = weights.sum(axis=-1)
    out = np.einsum("mhn,nhd->mhd", weights, values) / np.where(mass > 0, mass, 1)[..., None]
    with np.errstate(divide="ignore"):
        lse = np.log(mass) + np.where(np.isneginf(top), 0, top)[..., 0]
    return out, lse


def scores(query, keys):
    """Inner products in float64: ``[heads, n]``."""
    query, keys = np.asarray(query, np.float64), np.asarray(keys, np.float64)
    group = query.shape[0] // keys.shape[1]
    return np.einsum("hd,nhd->hn", query, np.repeat(keys, group, axis=1))


def relative_error(got, reference):
    """Largest over queries of ``|got - reference| / |reference|`` (L2 over the last axis)."""
    got, reference = np.asarray(got, np.float64), np.asarray(reference, np.float64)
    size = np.linalg.norm(reference, axis=-1)
    error = np.linalg.norm(got - reference, axis=-1)
    return float(np.max(np.where(size > 0, error / np.where(size > 0, size, 1), error), initial=0))
