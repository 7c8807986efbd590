"""Errors of `compat.turbo_quant`: the crate's, each also an error of this library."""

from __future__ import annotations

from ...errors import ArgumentError, ConfigError, NonFiniteError, PagedTQError, UnsupportedError


class TurboQuantError(PagedTQError):
    """Base of the errors below."""


class DimensionMismatch(TurboQuantError, ArgumentError):
    """A vector has another length than the cache's, or an index lies behind the last token.

    Attributes
    ----------
    expected, got : int
        The two numbers; for an index, the tokens held and those it would need.
    """

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"expected dimension {expected}, got {got}")
        self.expected, self.got = expected, got


class ZeroDimension(TurboQuantError, ConfigError):
    """A head dimension of 0."""

    def __init__(self) -> None:
        super().__init__("expected a head dimension above 0, got 0")


class OddDimension(TurboQuantError, ConfigError):
    """An odd head dimension, whose coordinates do not pair up.

    Attributes
    ----------
    got : int
        What came.
    """

    def __init__(self, got: int) -> None:
        super().__init__(f"expected an even head dimension, got {got}")
        self.got = got


class UnsupportedDimension(TurboQuantError, ConfigError, UnsupportedError):
    """A head dimension the crate takes and pages do not: 1, 2, or above 4096.

    Attributes
    ----------
    got : int
        What came.
    """

    def __init__(self, got: int) -> None:
        super().__init__(f"expected a head dimension from 3 to 4096, got {got}")
        self.got = got


class InvalidBitWidth(TurboQuantError, ConfigError):
    """A number of bits outside 1 to 16 (2 to 16 with a sketch).

    Attributes
    ----------
    bits : int
        What came.
    """

    def __init__(self, bits: int, low: int) -> None:
        super().__init__(f"expected {low} to 16 bits, got {bits}")
        self.bits = bits


class ZeroProjectionCount(TurboQuantError, ConfigError):
    """A sketch without projections."""

    def __init__(self) -> None:
        super().__init__("expected at least one projection for the sketch, got 0")


class RotationFailed(TurboQuantError, ConfigError):
    """A rotation that does not exist for the dimension.

    Attributes
    ----------
    reason : str
        Why.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class MalformedCode(TurboQuantError, ArgumentError):
    """What was asked for is not there to be read, or would make no score.

    Attributes
    ----------
    reason : str
        What is wrong.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NonFiniteInput(TurboQuantError, NonFiniteError):
    """A vector with NaN, infinity, or an element beyond float32.

    Attributes
    ----------
    index : int
        Of the first such element.
    """

    def __init__(self, index: int, name: str) -> None:
        super().__init__(f"expected a finite {name}, got something else at index {index}")
        self.index = index
