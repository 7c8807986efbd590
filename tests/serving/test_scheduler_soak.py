"""Long runs of the scheduler under memory pressure: a short one always, long ones with -m soak."""

from __future__ import annotations

import pytest

from tests.serving.scheduler_soak import SchedulerSoak

RULES = [
    {"policy": "priority", "preemption": "recompute"},
    {"policy": "fcfs", "preemption": "swap"},
]


def assert_eventful(run: SchedulerSoak, steps: int) -> None:
    assert run.done["completed"] > steps // 1000
    assert run.scheduler.stats.preempted > steps // 200
    assert bool(run.scheduler.stats.swapped) == (run.scheduler.options.preemption == "swap")


@pytest.mark.parametrize("rules", RULES, ids=str)
def test_hundreds_of_steps_on_a_small_pool_generate_every_token_and_leave_nothing(rules):
    run = SchedulerSoak(1, 150, 300, 200, **rules)
    run.run(400, check_every=20)
    assert_eventful(run, 400)
    # The same seed takes the same steps, to the slot of every token.
    again = SchedulerSoak(1, 150, 300, 200, **rules)
    again.run(400, check_every=400)
    assert again.steps.digest() == run.steps.digest()
    other = SchedulerSoak(2, 150, 300, 200, **rules)
    other.run(20, check_every=400)
    assert other.steps.digest() != run.steps.digest()


@pytest.mark.soak
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_twenty_thousand_steps_on_a_thousand_pages_generate_every_token_and_leave_nothing(rules):
    run = SchedulerSoak(2026, **rules)
    run.run(20_000, check_every=200)
    assert_eventful(run, 20_000)
    print(dict(run.done))
