"""Checks of the integer arguments the control plane takes, and the array types it speaks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, ArgumentTypeError

Int32: TypeAlias = npt.NDArray[np.int32]
Int64: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]
#: What a caller may pass where several integers are expected. Arrays are checked by their dtype
#: alone; a list of a thousand integers costs more to convert than the whole step.
Integers: TypeAlias = Sequence[int] | npt.NDArray[np.integer[Any]]

T = TypeVar("T")

#: NumPy keeps one object for it: most arrays that come are of this very dtype.
INT64 = np.dtype(np.int64)

#: What ``issuperset(map(type, values))`` proves of hundreds of values in a microsecond.
ONLY_INT, ONLY_BYTES = frozenset((int,)), frozenset((bytes,))

INT64_MAX = (1 << 63) - 1
#: What has a length, and no integers in an order.
NO_SEQUENCES = str, bytes, dict, set, frozenset

#: No count of tokens is larger; keeps every sum of a step inside int64.
MAX_TOKENS = 1 << 40
#: No page holds more tokens, and no pool more pages: ids of pages are int32.
MAX_PAGE_SIZE, MAX_PAGES = 1 << 24, (1 << 31) - 1


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
        raise ArgumentError(f"{name} must be {bounds}, got {shown(number)}")
    return number


def shown(number: int) -> str:
    """Return an integer as a message shows it: Python refuses to write very long ones."""
    bits = number.bit_length()
    return str(number) if bits <= 256 else f"an integer of {bits} bits"


def real(name: str, value: object, low: float, high: float | None = None) -> float:
    """Return ``value`` as a ``float`` in ``[low, high]``.

    Raises
    ------
    ArgumentTypeError
        If it is no number; a bool is none.
    ArgumentError
        If it is out of range or NaN, or too large for a float.
    """
    if isinstance(value, bool | np.bool_) or not isinstance(
        value, float | int | np.floating | np.integer
    ):
        raise ArgumentTypeError(f"{name} must be a number, got {type(value).__name__}")
    if not value >= low or (high is not None and value > high):
        bounds = f">= {low:g}" if high is None else f"in [{low:g}, {high:g}]"
        got = shown(value) if isinstance(value, int) else value
        raise ArgumentError(f"{name} must be {bounds}, got {got}")
    try:
        return float(value)
    except OverflowError:
        raise ArgumentError(f"{name} must fit a float, got {shown(int(value))}") from None


def instance(name: str, value: object, kind: type[T]) -> T:
    """Return ``value``, which must be of a type of ours.

    Raises
    ------
    ArgumentTypeError
        If it is not.
    """
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        raise ArgumentTypeError(
            f"{name} must be {article} {kind.__name__}, got {type(value).__name__}"
        )
    return value


def integers(name: str, values: Integers) -> Int64:
    """Return ``values`` as ``int64[n]``, without a copy where it already is that.

    Raises
    ------
    ArgumentTypeError
        If an element is no integer; a bool is none.
    ArgumentError
        If the values are not one-dimensional, or one does not fit int64.
    """
    if type(values) is np.ndarray and values.dtype is INT64 and values.ndim == 1:
        return values  # type: ignore[return-value]
    array = integer_array(name, values)
    if array.dtype.kind != "i" and array.size and int(array.max()) > INT64_MAX:
        raise _does_not_fit(name, array)
    try:
        return array.astype(np.int64, copy=False)
    except OverflowError:
        raise _does_not_fit(name, array) from None


def integer_array(name: str, values: Integers) -> npt.NDArray[Any]:
    """Return ``values`` as a one-dimensional array in which every value is what it was.

    Its dtype is one of integers, or ``object`` if NumPy has none for all of the values.

    Raises
    ------
    ArgumentTypeError
        If an element is no integer; a bool is none.
    ArgumentError
        If the values are not one-dimensional.
    """
    if isinstance(values, np.ndarray):
        array: npt.NDArray[Any] = values
    else:
        if not hasattr(values, "__len__") or isinstance(values, NO_SEQUENCES):
            raise ArgumentTypeError(
                f"{name} must be a sequence of integers, got {type(values).__name__}"
            )
        # NumPy would turn [True, 2] into integers and [] into floats without a word.
        if not {bool, np.bool_}.isdisjoint(map(type, values)):
            raise ArgumentTypeError(f"{name} must be integers, got a bool")
        try:
            array = np.asarray(values) if len(values) else np.empty(0, np.int64)
            # Integers of which one needs more than 63 bits become floats or objects.
            if array.dtype.kind in "fO" and all(isinstance(v, int | np.integer) for v in values):
                array = np.array([int(value) for value in values], object)
                return array
        except (ValueError, OverflowError) as error:
            raise ArgumentTypeError(f"{name} must be a flat sequence of integers") from error
    if array.dtype.kind not in "iu":
        raise ArgumentTypeError(f"{name} must be integers, got dtype {array.dtype}")
    if array.ndim != 1:
        raise ArgumentError(f"{name} must be one-dimensional, got shape {array.shape}")
    return array


def _does_not_fit(name: str, array: npt.NDArray[Any]) -> ArgumentError:
    """Return what is raised for integers of which one is too large or too small for int64."""
    at, worst = next(
        (at, value)
        for at, value in enumerate(array.tolist())
        if not -INT64_MAX - 1 <= value <= INT64_MAX
    )
    return ArgumentError(f"{name} must fit int64, got {shown(worst)} at {at}")


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
