"""The device arrays that the launches of an attention step hand to each other."""

from __future__ import annotations

from typing import Any, NamedTuple


class ReadBuffers(NamedTuple):
    """What a batch reads, on the device.

    Attributes
    ----------
    table : int32 ``[batch, max_blocks]``
    reads : int64 ``[5, batch]``
        Fields of `Reads`, in order.
    query_starts : int32 ``[batch + 1]``
    """

    table: Any
    reads: Any
    query_starts: Any


class Units(NamedTuple):
    """The plan of a grid: which unit of work belongs to which sequence, and its parts.

    Attributes
    ----------
    sequences : int32 ``[max_units]``
    first, splits : int32 ``[batch]``
    """

    sequences: Any
    first: Any
    splits: Any


class QueryRows(NamedTuple):
    """Queries as `attend` multiplies them, ``rows = tokens * num_q_heads``.

    Attributes
    ----------
    rows : uint16 ``[rows, head_dim]``
        f16 bits.
    scales : float32 ``[rows]``
    sketches : uint16 ``[rows, head_dim]`` or None
        Prod keys.
    offsets : float32 ``[rows]`` or None
        With key means.
    """

    rows: Any
    scales: Any
    sketches: Any
    offsets: Any


class State(NamedTuple):
    """A partial attention state: float32 ``out`` and ``lse``."""

    out: Any
    lse: Any


NO_STATE = State(None, None)
