"""Long random runs under memory pressure: the short one always, the long one with ``-m soak``."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.paging.faults import Faults
from tests.paging.soak import Soak

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
    "faults compared",
)


@pytest.fixture
def faults(monkeypatch):
    """One allocation of 97 fails."""
    faults = Faults(monkeypatch)
    faults.arm(97, repeats=True)
    return faults


def assert_eventful(run: Soak, operations: int) -> None:
    rare = {name: run.done[name] for name in EVENTS if run.done[name] < operations // 500}
    assert not rare, f"the run proves little: {rare}"


def test_thousands_of_operations_under_pressure_lose_no_page_and_no_token(faults):
    run = Soak(1, 300, 200, 40, faults)
    run.run(6_000, check_every=400)
    assert_eventful(run, 6_000)


DIGEST = """
from tests.paging.soak import Soak
run = Soak(3, 300, 200, 40)
run.work(1_500, check_every=500)
print(run.digest())
"""


@pytest.mark.slow
def test_one_seed_gives_the_same_books_bytes_and_events_in_every_process(root):
    """Sets and dicts of keys are iterated in another order under another hash seed."""
    digests = {
        subprocess.run(
            [sys.executable, "-c", DIGEST],
            cwd=root,
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(digests) == 1 and len(digests.pop()) == 65


@pytest.mark.soak
def test_a_million_operations_on_a_thousand_pages_lose_no_page_and_no_token(faults):
    run = Soak(2026, faults=faults)
    run.run(1_000_000, check_every=2_000)
    assert_eventful(run, 1_000_000)
    print(dict(run.done))
