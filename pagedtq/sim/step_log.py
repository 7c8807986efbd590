"""What every step of a simulation did: columns that grow, and figures made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .host_link import SwapTotals
from .workload import Float64, Int64

#: Whole-number columns of a log, in order.
COUNTS = ("running", "tokens", "pages", "prefilled", "decoded", "waiting")


class StepLog:
    """One row per step, in order of time.

    Columns (properties of these names, trimmed to the rows written)
    -------
    end, seconds : float64[n]
        Simulated time at the end of the step, and how long it took. Idle time is between steps.
    running : int64[n]
        Sequences that hold pages, those in prefill included.
    tokens, pages : int64[n]
        Tokens stored and pages taken while the step runs (before completed sequences leave).
    prefilled, decoded : int64[n]
        Tokens processed.
    waiting : int64[n]
        1 if a request that had arrived could not be admitted.
    """

    def __init__(self) -> None:
        self._size = 0
        self._times = np.empty((2, 1024))
        self._counts = np.empty((len(COUNTS), 1024), np.int64)

    def __len__(self) -> int:
        return self._size

    def append(self, end: float, seconds: float, counts: Sequence[int]) -> None:
        """Write one step; ``counts`` in the order of ``COUNTS``."""
        self._reserve(1)
        self._times[:, self._size] = end, seconds
        self._counts[:, self._size] = counts
        self._size += 1

    def extend(self, end: Float64, seconds: Float64, counts: Sequence[Int64 | int]) -> None:
        """Write steps; each of ``counts`` is one number for all of them, or one per step."""
        self._reserve(end.size)
        rows = slice(self._size, self._size + end.size)
        self._times[0, rows], self._times[1, rows] = end, seconds
        for column, values in zip(self._counts, counts):
            column[rows] = values
        self._size += end.size

    @property
    def end(self) -> Float64:
        """Simulated time at the end of each step."""
        return self._times[0, : self._size]

    @property
    def seconds(self) -> Float64:
        """How long each step took."""
        return self._times[1, : self._size]

    def __getattr__(self, name: str) -> Int64:
        if name not in COUNTS:
            raise AttributeError(name)
        column: Int64 = self._counts[COUNTS.index(name), : self._size]
        return column

    def time_mean(self, values: Int64 | Float64) -> float:
        """Return the mean over simulated time of a per-step quantity; 0 while idle."""
        return float((values * self.seconds).sum() / self.end[-1]) if self._size else 0.0

    def binned(self, values: Int64 | Float64, edges: Float64) -> Float64:
        """Return the mean over each bin of time of a per-step quantity; 0 while idle.

        Parameters
        ----------
        values : int64[n] or float64[n]
            The quantity, constant during a step.
        edges : float64[b + 1]
            Bin edges in seconds.

        Returns
        -------
        float64[b]
        """
        # The integral over time is linear within steps and flat between them.
        times = np.stack((self.end - self.seconds, self.end), axis=1).ravel()
        integral = np.repeat(np.cumsum(values * self.seconds), 2)
        integral[::2] -= values * self.seconds
        bins: Float64 = np.diff(np.interp(edges, times, integral)) / np.diff(edges)
        return bins

    def _reserve(self, steps: int) -> None:
        capacity = self._times.shape[1]
        if self._size + steps > capacity:
            grow = ((0, 0), (0, max(capacity, steps)))
            self._times = np.pad(self._times, grow)
            self._counts = np.pad(self._counts, grow)


class Outcome(NamedTuple):
    """What a simulation gives: the log of its steps and what happened to each request.

    Attributes
    ----------
    log : StepLog
    generated : int64[n]
        Output tokens of each request.
    first_token, finish : float64[n]
        Simulated time of the first and of the last output token; NaN if rejected.
    preemptions : int64[n]
        How often each request was preempted.
    rejected : int64[m]
        Requests that no empty pool could hold, in order.
    found : int64[n]
        Prompt tokens of each request that were found in pages when it was first admitted.
    swaps : SwapTotals
        What went to the host and back.
    """

    log: StepLog
    generated: Int64
    first_token: Float64
    finish: Float64
    preemptions: Int64
    rejected: Int64
    found: Int64
    swaps: SwapTotals = SwapTotals()
