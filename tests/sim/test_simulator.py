"""The simulator serves everything, follows its rules to the step, and always gets on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedtq.errors import ConfigError
from pagedtq.models import MODELS
from pagedtq.serving import SchedulerOptions
from pagedtq.sim.cost_model import CostModel, Hardware
from pagedtq.sim.generator import azure_conversation
from pagedtq.sim.simulator import Simulator
from pagedtq.sim.step_log import COUNTS
from pagedtq.sim.workload import Workload
from pagedtq.sizing import Capacity, Format
from tests.sim.naive_simulator import NaiveSimulator

TINY = MODELS["tiny"]
PAGE = 16


def requests(*lengths, arrival=None):
    prompt, output = np.array(lengths).T
    times = np.zeros(len(prompt)) if arrival is None else np.array(arrival)
    return Workload("test", times, prompt, output)


def make(workload, pages, *, slots=0, fast_forward=True, **options):
    """Return a simulator over a pool of so many usable pages of 16 tokens."""
    config = Format.parse("k4v4" if slots else "k4v4-w0").config(TINY, PAGE)
    capacity = Capacity(
        num_pages=pages + 1,
        num_window_slots=slots,
        page_size=PAGE,
        page_bytes=1,
        window_slot_bytes=1 if slots else 0,
    )
    # No step overhead: differences in bytes would vanish beside it.
    cost = CostModel(TINY, config, Hardware(step_overhead=0.0))
    chosen = SchedulerOptions(**options)
    simulator = Simulator(workload, config, capacity, cost, chosen, fast_forward=fast_forward)
    return simulator, capacity, cost, chosen


def run(workload, pages, **options):
    simulator, *_ = make(workload, pages, **options)
    outcome = simulator.run()
    simulator.tables.check_integrity()
    assert simulator.tables.num_sequences == 0
    assert simulator.tables.pool.num_used == 0
    return outcome


def columns(log):
    return {name: getattr(log, name) for name in ("end", "seconds", *COUNTS)}


def assert_same(left, right):
    for name, column in columns(left.log).items():
        np.testing.assert_array_equal(column, columns(right.log)[name], err_msg=name)
    for a, b in zip(left[1:], right[1:]):
        np.testing.assert_array_equal(a, b)


lengths = st.tuples(st.integers(1, 150), st.integers(1, 60))
workloads = st.builds(
    lambda pairs, gaps: requests(*pairs, arrival=np.cumsum(gaps[: len(pairs)])),
    st.lists(lengths, min_size=1, max_size=14),
    st.lists(st.sampled_from([0.0, 1e-7, 3e-6, 1e-4, 2.0]), min_size=14, max_size=14),
)
rules = st.fixed_dictionaries(
    {
        "step_tokens": st.sampled_from([1, 7, 64, 500]),
        "watermark": st.sampled_from([0.0, 0.05, 0.3]),
        "admission": st.sampled_from(["prompt", "chunk"]),
        "max_running": st.sampled_from([1, 3, 100]),
    }
)


@given(workloads, rules, st.integers(1, 40), st.sampled_from([0, 1, 2, 9]))
@settings(max_examples=120)
def test_every_step_is_that_of_a_simulator_written_naively(workload, options, pages, slots):
    fast = run(workload, pages, slots=slots, **options)
    _, capacity, cost, chosen = make(workload, pages, slots=slots, **options)
    naive = NaiveSimulator(workload, capacity, cost, chosen).run()
    for i, name in enumerate(("end", "seconds", *COUNTS)):
        expected = [row[i] for row in naive.rows]
        np.testing.assert_array_equal(getattr(fast.log, name), expected, err_msg=name)
    np.testing.assert_array_equal(fast.generated, naive.generated)
    np.testing.assert_array_equal(fast.preemptions, naive.preemptions)
    np.testing.assert_array_equal(fast.rejected, naive.rejected)
    for ours, theirs in ((fast.first_token, naive.first_token), (fast.finish, naive.finish)):
        np.testing.assert_array_equal(ours, [np.nan if t is None else t for t in theirs])


@given(workloads, rules, st.integers(1, 40), st.sampled_from([0, 2]))
@settings(max_examples=60)
def test_taking_decode_steps_at_once_changes_nothing(workload, options, pages, slots):
    fast, slow = (
        run(workload, pages, slots=slots, fast_forward=forward, **options)
        for forward in (True, False)
    )
    assert_same(fast, slow)


@pytest.mark.parametrize("slots", [0, 12])
def test_taking_decode_steps_at_once_changes_nothing_on_real_lengths(slots):
    workload = azure_conversation(120, seed=2).at_rate(float("inf"))
    fast, slow = (
        run(workload, 1100, slots=slots, fast_forward=forward, watermark=0.0)
        for forward in (True, False)
    )
    assert fast.preemptions.sum() > 0 or slots
    assert_same(fast, slow)


def test_all_tokens_of_the_workload_are_served():
    workload = azure_conversation(400, seed=5).at_rate(float("inf"))
    outcome = run(workload, 1200, step_tokens=256)
    np.testing.assert_array_equal(outcome.generated, workload.output_tokens)
    assert np.isfinite(outcome.finish).all()
    assert (outcome.first_token <= outcome.finish).all()
    assert (outcome.first_token > workload.arrival).all()
    # A prefill samples one token, every decode step one: each preemption adds a prefill.
    prefills = len(workload) + outcome.preemptions.sum()
    assert outcome.log.decoded.sum() + prefills >= workload.output_tokens.sum()
    assert outcome.log.prefilled.sum() >= workload.prompt_tokens.sum()


def test_without_preemption_nothing_is_processed_twice():
    workload = requests((40, 5), (10, 3), (33, 1))
    outcome = run(workload, 100)
    assert outcome.preemptions.sum() == 0
    assert outcome.log.prefilled.sum() == 83
    assert outcome.log.decoded.sum() == 4 + 2
    # The third samples its only token with its prefill and leaves.
    assert outcome.log.tokens.tolist() == [83, 52, 54, 43, 44]


@pytest.mark.parametrize("admission", ["prompt", "chunk"])
@pytest.mark.parametrize("watermark", [0.0, 0.02, 0.9])
def test_a_pool_barely_larger_than_the_longest_request_serves_everything(admission, watermark):
    rng = np.random.default_rng(1)
    workload = requests(*rng.integers(1, 200, (60, 2)))
    longest = int(workload.final_tokens.max()) - 1
    outcome = run(workload, -(-longest // PAGE), admission=admission, watermark=watermark)
    np.testing.assert_array_equal(outcome.generated, workload.output_tokens)
    # Progress: in the worst case one request after the other, recomputed now and then.
    assert len(outcome.log) <= 2 * workload.final_tokens.sum()


def test_the_oldest_sequence_is_never_preempted():
    workload = requests(*[(60, 60)] * 20)
    outcome = run(workload, 10, watermark=0.0)
    assert outcome.preemptions.sum() > 0
    assert outcome.preemptions[0] == 0
    assert (np.diff(outcome.finish) >= 0).all()


def test_preemption_is_counted_and_recomputed():
    # Both start in 2 of 4 pages; both need a third for their 33rd token.
    workload = requests((30, 20), (30, 20))
    outcome = run(workload, 4, watermark=0.0)
    assert outcome.preemptions.tolist() == [0, 1]
    # The second comes back with its prompt and the three tokens it had sampled.
    assert outcome.log.prefilled.sum() == 30 + 30 + 33
    assert outcome.generated.tolist() == [20, 20]


def test_the_watermark_avoids_preemption():
    workload = requests(*[(60, 60)] * 30)
    without, with_it = (run(workload, 40, watermark=w).preemptions.sum() for w in (0.0, 0.3))
    assert with_it < without


def test_a_request_that_no_empty_pool_holds_is_rejected_and_the_rest_served():
    workload = requests((100, 61), (10, 10), (100, 62), (300, 1))
    outcome = run(workload, 10)
    assert outcome.rejected.tolist() == [2, 3]
    assert outcome.generated.tolist() == [61, 10, 0, 0]
    assert np.isnan(outcome.finish).tolist() == [False, False, True, True]


def test_a_workload_that_is_rejected_whole_takes_no_step():
    outcome = run(requests((1000, 1)), 2)
    assert outcome.rejected.tolist() == [0]
    assert len(outcome.log) == 0


def test_running_sequences_never_exceed_the_window_slots_nor_the_option():
    workload = requests(*[(20, 30)] * 40)
    assert run(workload, 500).log.running.max() == 40
    assert run(workload, 500, slots=7).log.running.max() == 7
    assert run(workload, 500, max_running=5).log.running.max() == 5


def test_a_step_processes_no_more_tokens_than_allowed():
    outcome = run(requests(*[(200, 30)] * 20), 400, step_tokens=64)
    log = outcome.log
    assert (log.prefilled + log.decoded).max() == 64
    assert (log.prefilled > 0).sum() >= 20 * 200 / 64


def test_requests_do_not_start_before_they_arrive_and_idle_time_passes():
    workload = requests((10, 3), (10, 3), arrival=[0.0, 5.0])
    outcome = run(workload, 100)
    assert outcome.finish[0] < 1 < 5 < outcome.first_token[1]
    assert outcome.log.time_mean(outcome.log.running) < 0.01


def test_progress_is_reported_up_to_the_last_request():
    seen = []
    simulator, *_ = make(requests(*[(20, 3)] * 50, (9999, 1)), 30)
    simulator.run(seen.append)
    assert seen[-1] == 51
    assert seen == sorted(seen)


@pytest.mark.parametrize(
    "options",
    [
        {"step_tokens": 0},
        {"max_running": 0},
        {"watermark": 1.0},
        {"watermark": -0.1},
        {"watermark": float("nan")},
        {"admission": "never"},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError):
        SchedulerOptions(**options)
