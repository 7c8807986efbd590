"""Long random runs under memory pressure: the short one always, the long one with ``-m soak``."""

from __future__ import annotations

import pytest
from soak import Soak

#: What must have happened for a run to prove anything.
EVENTS = (
    "did not fit",
    "swapped out",
    "swapped in",
    "recomputed",
    "aborted",
    "tokens found",
    "pages reused",
    "pages copied back",
    "fork",
    "evict",
    "fence",
)


def assert_eventful(run: Soak, operations: int) -> None:
    rare = {name: run.done[name] for name in EVENTS if run.done[name] < operations // 500}
    assert not rare, f"the run proves little: {rare}"


def test_thousands_of_operations_under_pressure_lose_no_page_and_no_token():
    run = Soak(seed=1, num_pages=300, num_host_pages=200, num_slots=40)
    run.run(6_000, check_every=400)
    assert_eventful(run, 6_000)


@pytest.mark.soak
def test_a_million_operations_on_a_thousand_pages_lose_no_page_and_no_token():
    run = Soak(seed=2026)
    run.run(1_000_000, check_every=2_000)
    assert_eventful(run, 1_000_000)
    print(dict(run.done))
