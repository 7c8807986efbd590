"""A log keeps what was written, and means over time conserve the integral."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.sim.step_log import COUNTS, StepLog


def test_rows_come_back_in_order_however_they_were_written_and_many():
    log = StepLog()
    rng = np.random.default_rng(0)
    end = 0.0
    expected = []
    for _ in range(300):
        k = int(rng.integers(1, 40))
        seconds = rng.random(k)
        ends = end + np.cumsum(seconds)
        counts = rng.integers(0, 100, (len(COUNTS), k))
        if k == 1:
            log.append(float(ends[0]), float(seconds[0]), counts[:, 0].tolist())
        else:
            log.extend(ends, seconds, list(counts))
        expected += list(zip(ends, seconds, *counts))
        end = float(ends[-1])
    assert len(log) == len(expected)
    for name, column in zip(("end", "seconds", *COUNTS), zip(*expected)):
        np.testing.assert_array_equal(getattr(log, name), column)
    with pytest.raises(AttributeError):
        log.nothing  # noqa: B018


def test_one_number_serves_for_all_steps_of_an_extension():
    log = StepLog()
    log.extend(np.array([1.0, 2.0]), np.array([1.0, 1.0]), (3, np.array([4, 5]), 6, 0, 1, 0))
    assert log.running.tolist() == [3, 3]
    assert log.tokens.tolist() == [4, 5]


def test_bins_conserve_the_integral_and_idle_time_counts_as_zero():
    log = StepLog()
    # Busy in [0, 2) with 3, idle in [2, 6), busy in [6, 8) with 5.
    log.append(2.0, 2.0, (3, 0, 0, 0, 0, 0))
    log.append(8.0, 2.0, (5, 0, 0, 0, 0, 0))
    assert log.binned(log.running, np.array([0.0, 2, 4, 6, 8])).tolist() == [3, 0, 0, 5]
    assert log.binned(log.running, np.array([0.0, 1, 7, 8])).tolist() == [3, (3 + 5) / 6, 5]
    assert log.time_mean(log.running) == (3 * 2 + 5 * 2) / 8
    edges = np.linspace(0, 8, 23)
    bins = log.binned(log.running, edges)
    assert (bins * np.diff(edges)).sum() == pytest.approx(16)


def test_an_empty_log_has_mean_zero():
    log = StepLog()
    assert log.time_mean(log.running) == 0
