"""Preparing queries: checks, rotation, key-mean offsets, and the positions each row reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..codec import VectorCodec
from ..errors import ArgumentError, ArgumentTypeError, UnsupportedError
from ..paging.arguments import integer, token_counts
from ..paging.table_views import Reads
from .dtypes import as_float32, check_range, check_shape
from .host_attend import Rows

Array = npt.NDArray[Any]

MAX_GROUP = 64


class QueryTokens(NamedTuple):
    """Checked queries of a batch.

    Attributes
    ----------
    values : ndarray of float64 ``[tokens, num_kv_heads, group, head_dim]``
        The queries, unscaled.
    q_lens : ndarray of int64 ``[batch]``
        Query tokens of each sequence; they are the last ones of it.
    last, floor : ndarray of int64 ``[tokens]``
        A query token reads positions ``floor <= p <= last``.
    """

    values: Array
    q_lens: Array
    last: Array
    floor: Array


def check_query_shapes(
    queries: Any,
    reads: Reads,
    q_lens: Array | None,
    num_kv_heads: int,
    head_dim: int,
    window_left: int | None,
) -> npt.NDArray[np.int64]:
    """Check everything about queries but their content, wherever they lie.

    Returns
    -------
    int64[batch]
        Query tokens of each sequence.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Wrong shape; more query tokens than tokens in a sequence.
    UnsupportedError
        A group (query heads per KV head) above 64.
    """
    batch = len(reads.kv_lens)
    lens = np.ones(batch, np.int64) if q_lens is None else token_counts("q_lens", q_lens, batch)
    check_shape(queries, "queries", (int(lens.sum()), None, head_dim), "tokens, heads, head_dim")
    num_q_heads = queries.shape[1]
    if num_q_heads == 0 or num_q_heads % num_kv_heads:
        raise ArgumentError(
            f"queries must have a multiple of {num_kv_heads} heads, got {num_q_heads}"
        )
    group = num_q_heads // num_kv_heads
    if group > MAX_GROUP:
        raise UnsupportedError(f"groups of 1 to {MAX_GROUP} query heads are supported, got {group}")
    if window_left is not None:
        integer("window_left", window_left, 0)
    short = np.flatnonzero(lens > np.maximum(reads.kv_lens, 1 if q_lens is None else 0))
    if short.size:
        at = int(short[0])
        raise ArgumentError(
            f"sequence {at} of the batch has {reads.kv_lens[at]} tokens, got {lens[at]} queries"
        )
    return lens


def check_queries(
    queries: Array,
    reads: Reads,
    q_lens: Array | None,
    num_kv_heads: int,
    head_dim: int,
    window_left: int | None,
) -> QueryTokens:
    """Check queries ``[tokens, num_q_heads, head_dim]`` and lay them out by KV head.

    Raises
    ------
    ArgumentError, ArgumentTypeError, UnsupportedError
        As `check_query_shapes`; wrong type.
    NonFiniteError
        NaN or infinity.
    """
    lens = check_query_shapes(queries, reads, q_lens, num_kv_heads, head_dim, window_left)
    values = as_float32(queries, "queries")
    check_range(values, "queries", "f32")
    within = np.arange(len(values)) - np.repeat(np.cumsum(lens) - lens, lens)
    last = np.repeat(reads.kv_lens - lens, lens) + within
    floor = np.zeros_like(last) if window_left is None else np.maximum(last - window_left, 0)
    group = values.shape[1] // num_kv_heads
    shaped = values.reshape(-1, num_kv_heads, group, head_dim).astype(np.float64)
    return QueryTokens(shaped, lens, last, floor)


def without_chunk(reads: Reads, q_lens: Array) -> Reads:
    """Leave the query tokens' own positions out of the read ranges."""
    ends = reads.kv_lens - q_lens
    stop, first = np.minimum(reads.stop, ends), np.minimum(reads.first, ends)
    return reads._replace(kv_lens=ends, stop=stop, first=first)


def check_scale(sm_scale: float, soft_cap: float | None) -> None:
    """Refuse logit scales and caps that are not finite numbers, and caps that are not positive."""
    for name, value in (("sm_scale", sm_scale), ("soft_cap", 0 if soft_cap is None else soft_cap)):
        is_number = isinstance(value, float | int | np.floating | np.integer)
        if not is_number or isinstance(value, bool):
            raise ArgumentTypeError(f"{name} must be a number, got {type(value).__name__}")
    if not np.isfinite(sm_scale):
        raise ArgumentError(f"sm_scale must be finite, got {sm_scale}")
    if soft_cap is not None and not (np.isfinite(soft_cap) and soft_cap > 0):
        raise ArgumentError(f"soft_cap must be positive and finite, got {soft_cap}")


class PreparedQueries(NamedTuple):
    """Queries in the space of the stored keys, scaled; what every unit of work slices.

    Attributes
    ----------
    keys : ndarray ``[tokens, num_kv_heads, group, head_dim]``
        Rotated for TurboQuant keys, times the scale.
    qjl : ndarray ``[tokens, num_kv_heads, group, sketch_dim]`` or None
        Projected queries times scale and QJL factor.
    offset : ndarray ``[tokens, num_kv_heads, group]`` or None
        ``scale * q . mean``: what key centring takes from every logit.
    """

    keys: Array
    qjl: Array | None
    offset: Array | None

    def rows(self, tokens: QueryTokens, part: slice, head: int) -> Rows:
        """Return the query rows of one sequence (``part`` of the tokens) and one KV head."""
        group, dim = self.keys.shape[2:]
        return Rows(
            self.keys[part, head].reshape(-1, dim),
            None if self.qjl is None else self.qjl[part, head].reshape(-1, self.qjl.shape[-1]),
            None if self.offset is None else self.offset[part, head].reshape(-1),
            np.repeat(tokens.last[part], group),
            np.repeat(tokens.floor[part], group),
        )


def prepare_queries(
    tokens: QueryTokens, codec: VectorCodec | None, mean: Array | None, scale: float
) -> PreparedQueries:
    """Rotate, project and scale queries for the keys of one layer.

    Parameters
    ----------
    tokens : QueryTokens
        The queries.
    codec : VectorCodec or None
        The key codec; None for exact keys.
    mean : ndarray ``[num_kv_heads, head_dim]`` or None
        Key mean of the layer.
    scale : float
        Logit scale.
    """
    values = tokens.values
    if codec is None:
        return PreparedQueries(values * scale, None, None)
    count, heads, group, dim = values.shape
    flat = values.reshape(count, heads * group, dim)
    rotated = codec.rotation.forward(flat)
    qjl = offset = None
    if codec.projection is not None:
        sketch = codec.projection.project(rotated) * (scale * codec.projection.factor)
        qjl = sketch.reshape(count, heads, group, codec.projection.rows)
    if mean is not None:
        offset = np.einsum("thgd,hd->thg", values, mean.astype(np.float64)) * scale
    return PreparedQueries((rotated * scale).reshape(values.shape), qjl, offset)


def unrotate_outputs(codec: VectorCodec | None, outputs: Array) -> Array:
    """Bring outputs ``[tokens, heads, group, head_dim]`` back from the space of stored values."""
    if codec is None:
        return outputs
    count, heads, group, dim = outputs.shape
    flat = outputs.reshape(count, heads * group, dim)
    return np.asarray(codec.rotation.inverse(flat).reshape(outputs.shape))
