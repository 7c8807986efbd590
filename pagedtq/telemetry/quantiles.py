"""Quantiles of a stream of errors in bounded memory."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

_PER_DECADE = 32
_LOW, _HIGH = -9, 3
_BINS = (_HIGH - _LOW) * _PER_DECADE


class ErrorQuantiles(msgspec.Struct, frozen=True, kw_only=True):
    """Summary of many errors; all 0 where there was none.

    Attributes
    ----------
    count : int
        How many there were.
    mean, maximum : float
        Exact.
    p50, p90, p99 : float
        Quantiles, at most 7.5 % too large.
    """

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    maximum: float


class LogHistogram:
    """Counts of non-negative numbers in bins of equal ratio, 32 per decade from 1e-9 to 1e3.

    What is smaller counts as 0, what is larger or not a number as the maximum.
    """

    def __init__(self) -> None:
        self._counts = np.zeros(_BINS + 2, np.int64)
        self._sum = 0.0
        self._maximum = 0.0

    def add(self, errors: npt.NDArray[np.floating[Any]]) -> None:
        """Count errors of any shape."""
        flat = np.asarray(errors, np.float64).reshape(-1)
        if flat.size == 0:
            return
        flat = np.where(np.isfinite(flat), flat, np.inf)
        with np.errstate(divide="ignore"):
            places = (np.log10(flat) - _LOW) * _PER_DECADE
        bins = np.clip(np.floor(places), -1, _BINS).astype(np.int64) + 1
        self._counts += np.bincount(bins, minlength=_BINS + 2)
        self._sum += float(flat.sum())
        self._maximum = max(self._maximum, float(flat.max()))

    def merge(self, other: LogHistogram) -> None:
        """Count what another histogram has counted."""
        self._counts += other._counts
        self._sum += other._sum
        self._maximum = max(self._maximum, other._maximum)

    def quantile(self, share: float) -> float:
        """Return a number that ``share`` of the errors do not exceed (the end of a bin)."""
        total = int(self._counts.sum())
        if total == 0:
            return 0.0
        rank = max(1, math.ceil(share * total))
        place = int(np.searchsorted(np.cumsum(self._counts), rank))
        if place == 0:
            return 0.0
        if place > _BINS:
            return self._maximum
        return min(float(10.0 ** (_LOW + place / _PER_DECADE)), self._maximum)

    def summary(self) -> ErrorQuantiles:
        """Return counts and quantiles."""
        total = int(self._counts.sum())
        return ErrorQuantiles(
            count=total,
            mean=self._sum / total if total else 0.0,
            p50=self.quantile(0.5),
            p90=self.quantile(0.9),
            p99=self.quantile(0.99),
            maximum=self._maximum,
        )
