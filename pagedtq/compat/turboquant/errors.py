"""Errors of `compat.turboquant`: the crate's, each also an error of this library."""

from __future__ import annotations

from ...errors import ArgumentError, ConfigError, NonFiniteError, NotUnitNormError, PagedTQError


class TurboQuantError(PagedTQError):
    """Base of the errors below."""


class InvalidDimension(TurboQuantError, ConfigError):
    """A dimension or head count a cache cannot have.

    Dimensions 1 and 2, which the crate takes, are refused too: their rotations are not rotations
    in any useful sense, and pages start at 3.

    Attributes
    ----------
    dim : int
        What came.
    """

    def __init__(self, dim: int, expected: str) -> None:
        super().__init__(f"expected {expected}, got {dim}")
        self.dim = dim


class InvalidBitWidth(TurboQuantError, ConfigError):
    """A number of bits outside 1 to 8 (2 to 8 for Prod keys).

    Attributes
    ----------
    bits : int
        What came.
    """

    def __init__(self, bits: int, name: str, low: int) -> None:
        super().__init__(f"{name} must be between {low} and 8, got {bits}")
        self.bits = bits


class DimensionMismatch(TurboQuantError, ArgumentError):
    """A vector has another length than the cache's, or queries are not one per head.

    Attributes
    ----------
    expected, got : int
        The two numbers.
    """

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"expected dimension {expected}, got {got}")
        self.expected, self.got = expected, got


class LengthMismatch(TurboQuantError, ArgumentError):
    """Two lists that belong together have different lengths.

    Attributes
    ----------
    context : str
        Which.
    expected, got : int
        The two numbers.
    """

    def __init__(self, context: str, expected: int, got: int) -> None:
        super().__init__(f"{context}: expected {expected}, got {got}")
        self.context, self.expected, self.got = context, expected, got


class NotUnitVector(TurboQuantError, NotUnitNormError):
    """A key or value whose norm is not 1."""

    def __init__(self, norm: float, context: str) -> None:
        super().__init__(f"{context}: expected norm 1 within 1e-5, got {norm:.9g}", norm)


class InvalidValue(TurboQuantError, NonFiniteError):
    """A number that is not finite.

    Attributes
    ----------
    context : str
        Where it was.
    value : float
        What came.
    """

    def __init__(self, context: str, value: float) -> None:
        super().__init__(f"{context}: expected a finite number, got {value}")
        self.context, self.value = context, value
