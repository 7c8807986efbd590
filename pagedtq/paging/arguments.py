"""Checks of the integer arguments the control plane takes, and the array types it speaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ArgumentTypeError

Int32: TypeAlias = npt.NDArray[np.int32]
Int64: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
#: What a caller may pass where several integers are expected. Arrays are checked by their dtype
#: alone; a list of a thousand integers costs more to convert than the whole step.
Integers: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]

#: NumPy keeps one object for it: most arrays that come are of this very dtype.
INT64 = np.dtype(np.int64)

#: What ``issuperset(map(type, values))`` proves of hundreds of values in a microsecond.
ONLY_INT, ONLY_BYTES = frozenset((int,)), frozenset((bytes,))

#: No count of tokens is larger; keeps every sum of a step inside int64.
MAX_TOKENS = 1 << 40


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return ``value`` as an ``int`` in ``[low, high]``.

    Raises
    ------
    ArgumentTypeError
        If it is no integer; a bool is none.
    ArgumentError
        If it is out of range.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        raise ArgumentTypeError(f"{name} must be an integer, got {type(value).__name__}")
    number = int(value)
    if number < low or (high is not None and number > high):
        bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
        raise ArgumentError(f"{name} must be {bounds}, got {number}")
    return number


def integers(name: str, values: Integers) -> Int64:
    """Return ``values`` as ``int64[n]``, without a copy where it already is that.

    Raises
    ------
    ArgumentTypeError
        If an element is no integer; a bool is none.
    ArgumentError
        If the values are not one-dimensional.
    """
    if isinstance(values, np.ndarray):
        if values.dtype is INT64 and values.ndim == 1:
            return values  # type: ignore[return-value]
        array = values
    else:
        if not hasattr(values, "__len__"):
            raise ArgumentTypeError(
                f"{name} must be a sequence of integers, got {type(values).__name__}"
            )
        # NumPy would turn [True, 2] into integers and [] into floats without a word.
        if not {bool, np.bool_}.isdisjoint(map(type, values)):
            raise ArgumentTypeError(f"{name} must be integers, got a bool")
        try:
            array = np.asarray(values) if len(values) else np.empty(0, np.int64)
        except ValueError as error:
            raise ArgumentTypeError(f"{name} must be a flat sequence of integers") from error
    if array.dtype.kind not in "iu":
        raise ArgumentTypeError(f"{name} must be integers, got dtype {array.dtype}")
    if array.ndim != 1:
        raise ArgumentError(f"{name} must be one-dimensional, got shape {array.shape}")
    return array.astype(np.int64, copy=False)


def token_counts(name: str, values: int | Integers, num_members: int) -> Int64:
    """Return non-negative token counts as ``int64[num_members]``; one integer serves all.

    Raises
    ------
    ArgumentTypeError
        If one is no integer.
    ArgumentError
        If one is negative or above ``MAX_TOKENS``, or there is not one per member.
    """
    if isinstance(values, int | np.integer):
        return np.full(num_members, integer(name, values, 0, MAX_TOKENS), np.int64)
    counts = integers(name, values)
    if counts.shape != (num_members,):
        raise ArgumentError(
            f"{name} must have one entry per sequence: expected {num_members}, got {counts.size}"
        )
    # As unsigned numbers the negative ones are the largest: one pass checks both bounds.
    if num_members and int(counts.view(np.uint64).max()) > MAX_TOKENS:
        at = int(np.flatnonzero((counts < 0) | (counts > MAX_TOKENS))[0])
        raise ArgumentError(f"{name}[{at}] must be in [0, {MAX_TOKENS}], got {int(counts[at])}")
    return counts


def ranges(counts: Int64) -> Int64:
    """Return ``0..counts[0]-1, 0..counts[1]-1, ...`` as one ``int64[sum(counts)]``."""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if counts.size else 0
    return np.arange(total, dtype=np.int64) - np.repeat(ends - counts, counts)
