"""A workload is what it claims to be, and its figures are exact."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import ArgumentError
from pagedtq.sim.generator import azure_conversation
from pagedtq.sim.traces import read_azure
from pagedtq.sim.workload import Workload, length_statistics, page_utilisation


def workload(arrival=(0.0, 1.0, 2.5), prompt=(10, 20, 30), output=(1, 2, 3), **more):
    return Workload("test", np.array(arrival), np.array(prompt), np.array(output), **more)


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"arrival": (0.0, 1.0)}, "1-D of one length"),
        ({"prompt": ((1,), (2,), (3,))}, "1-D of one length"),
        ({"arrival": (0.0, 2.0, 1.0)}, "never decreasing"),
        ({"arrival": (0.0, 1.0, float("nan"))}, "never decreasing"),
        ({"arrival": (-1.0, 1.0, 2.0)}, "not negative"),
        ({"prompt": (1, 0, 1)}, "at least 1 prompt"),
        ({"output": (1, -1, 1)}, "at least 1 prompt and 1 output"),
        ({"arrival": (), "prompt": (), "output": ()}, "no requests"),
    ],
)
def test_a_workload_refuses_what_cannot_be_one(fields, problem):
    with pytest.raises(ArgumentError, match=problem):
        workload(**fields)


def test_a_workload_cannot_be_changed_by_one_of_its_readers():
    prompt = np.array([10, 20, 30])
    made = workload(prompt=prompt)
    prompt[0] = 99
    assert made.prompt_tokens[0] == 10
    with pytest.raises(ValueError, match="read-only"):
        made.output_tokens[0] = 5


def test_utilisation_counts_the_partly_filled_last_pages():
    made = workload(prompt=(10, 16, 31), output=(1, 16, 2))
    assert page_utilisation(made, 16) == (11 + 32 + 33) / (16 + 32 + 48)
    assert page_utilisation(made, 1) == 1
    with pytest.raises(ArgumentError):
        page_utilisation(made, 0)


def test_resident_tokens_weigh_requests_by_how_long_they_run():
    made = workload(prompt=(100, 10, 10), output=(10, 30, 10))
    expected = (10 * 105 + 30 * 25 + 10 * 15) / 50
    assert made.mean_resident_tokens == pytest.approx(expected)


def test_another_rate_stretches_arrivals_and_infinity_puts_all_at_zero():
    made = workload()
    assert made.rate == pytest.approx(2 / 2.5)
    assert made.at_rate(8).rate == pytest.approx(8)
    assert made.at_rate(8).prompt_tokens.tolist() == made.prompt_tokens.tolist()
    assert made.at_rate(float("inf")).arrival.tolist() == [0, 0, 0]
    assert made.at_rate(float("inf")).at_rate(3).arrival.tolist() == [0, 0, 0]
    for rate in (0, -1, float("nan")):
        with pytest.raises(ArgumentError, match="must be positive"):
            made.at_rate(rate)


def test_the_first_requests_are_a_prefix():
    made = workload().first(2)
    assert made.arrival.tolist() == [0, 1]
    assert len(workload().first(99)) == 3
    with pytest.raises(ArgumentError):
        made.first(0)


def test_one_seed_gives_one_workload_and_another_seed_another():
    first, again, other = (azure_conversation(500, seed) for seed in (3, 3, 4))
    for name in ("arrival", "prompt_tokens", "output_tokens"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
        assert not np.array_equal(getattr(first, name), getattr(other, name))


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_generated_requests_have_the_figures_of_the_azure_conversation_hour(seed):
    made = azure_conversation(seed=seed)
    assert len(made) == 19_366
    prompt, output = length_statistics(made.prompt_tokens), length_statistics(made.output_tokens)
    assert prompt["mean"] == pytest.approx(1154.7, rel=0.003)
    assert output["mean"] == pytest.approx(211.1, rel=0.003)
    assert (prompt["p50"], output["p50"]) == pytest.approx((1020, 129), abs=2)
    assert (prompt["p99"], output["p99"]) == pytest.approx((4142, 601), abs=5)
    assert 12_000 <= prompt["max"] <= 14_050
    assert 990 <= output["max"] <= 1000
    assert made.rate == pytest.approx(5.53, rel=0.02)
    gaps = np.diff(made.arrival)
    assert gaps.std() / gaps.mean() == pytest.approx(1.09, abs=0.03)
    # Pages of 128 and more feel how the trace's lengths cluster, which 33 quantiles do not hold.
    for size, known, within in (
        *((16, 99.46, 0.02), (32, 98.88, 0.03), (64, 97.79, 0.08)),
        *((128, 95.62, 0.15), (256, 91.98, 0.7)),
    ):
        assert 100 * page_utilisation(made, size) == pytest.approx(known, abs=within)


def test_generated_requests_follow_the_hours_rate_and_repeat_it():
    made = azure_conversation(2 * 19_366, seed=1)
    per_5_minutes = np.histogram(made.arrival, np.arange(13) * 300.0)[0]
    assert per_5_minutes[5] > 1.4 * per_5_minutes[0]
    assert made.arrival[-1] == pytest.approx(2 * 3501.7, rel=0.02)


def test_generated_lengths_are_distributed_like_the_traces(azure_conversation_trace):
    made = azure_conversation(seed=7)
    for name in ("prompt_tokens", "output_tokens"):
        ours, theirs = (
            np.sort(getattr(w, name)).astype(float) for w in (made, azure_conversation_trace)
        )
        # Kolmogorov-Smirnov distance.
        grid = np.unique(np.concatenate((ours, theirs)))
        gap = np.searchsorted(ours, grid, "right") - np.searchsorted(theirs, grid, "right")
        assert np.abs(gap).max() / ours.size < 0.02


def test_few_requests_and_bad_arguments():
    assert len(azure_conversation(1)) == 1
    for arguments in ({"num_requests": 0}, {"seed": -1}):
        with pytest.raises(ArgumentError):
            azure_conversation(**arguments)


@pytest.fixture
def azure_conversation_trace(request):
    return read_azure(request.getfixturevalue("azure_conversation"))
