"""What the cost rule is told of the sequence that gives way: every part of it decides somewhere."""

from __future__ import annotations

import pytest

from pagedtq.paging import PageTables, SharingOptions
from pagedtq.serving import (
    PreemptionCosts,
    Scheduler,
    SchedulerOptions,
    choose_preemption,
    preempting,
)
from tests.serving.paged_engine import PagedEngine, assert_served, serve
from tests.serving.test_scheduler import SIZE, assert_drained, request_of

PAGE_BYTES, SLOT_BYTES = 1000, 700
COMMON = list(range(30, 38))


def scheduler_of(num_pages, costs, window=0):
    tables = PageTables(
        SIZE,
        num_pages + 1,
        window_tokens=window,
        num_sinks=2 if window else 0,
        num_window_slots=8 if window else 0,
        sharing=SharingOptions(),
        num_host_pages=50,
    )
    return Scheduler(
        tables,
        SchedulerOptions(watermark=0.0, preemption="auto"),
        costs=costs,
        page_bytes=PAGE_BYTES,
        window_slot_bytes=SLOT_BYTES,
    )


@pytest.fixture
def asked(monkeypatch):
    """Every question to the cost rule, with its answer."""
    calls = []

    def choose(costs, tokens, size, **parts):
        answer = choose_preemption(costs, tokens, size, **parts)
        calls.append(({"tokens": tokens, "bytes": size, **parts}, answer))
        return answer

    monkeypatch.setattr(preempting, "choose_preemption", choose)
    return calls


def pair(costs, window=0):
    """Two requests that begin with the same two blocks, in a pool that the second must leave."""
    scheduler = scheduler_of(7, costs, window)
    requests = [request_of(name, [*COMMON, at], 14) for at, name in enumerate("ab")]
    # One step apart, so that the second finds the blocks of the first.
    engine = PagedEngine(scheduler)
    scheduler.add(requests[0])
    engine.run_step(scheduler.schedule())
    finished = serve(scheduler, requests[1:], engine=engine)
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert_drained(scheduler)
    return scheduler


#: So fast a link, or so slow a prefill, that the answer does not depend on the parts.
ALWAYS_SWAP = PreemptionCosts(1e12, 1e12, 1.0)


def test_the_rule_is_told_tokens_bytes_and_what_of_both_is_elsewhere(asked):
    pair(ALWAYS_SWAP)
    assert asked == [
        ({"tokens": 16, "bytes": 4000, "num_found": 8, "num_bytes_shared": 2000}, "swap")
    ]


def test_the_bytes_of_a_window_are_among_those_that_move(asked):
    pair(ALWAYS_SWAP, window=SIZE)
    (told, answer), *_ = asked
    assert answer == "swap"
    assert told["bytes"] == 4 * PAGE_BYTES + SLOT_BYTES


#: The numbers of `pair` with a window, and a link over which a byte takes a second, out and back.
TOKENS, FOUND, BYTES, SHARED = 16, 8, 4700, 2000
MOVED, COMPUTED = BYTES - SHARED, TOKENS - FOUND


@pytest.mark.parametrize(
    ("prefill_rate", "answer"),
    [
        # Were the tokens computed that are found again, moving would cost less.
        pytest.param((COMPUTED + TOKENS) / 2 / MOVED, "recompute", id="found"),
        # Were the bytes moved that stay on the device, computing would.
        pytest.param(COMPUTED / (MOVED + SHARED / 2), "swap", id="shared"),
        # Were the window's bytes left behind, moving would.
        pytest.param(COMPUTED / (MOVED - SLOT_BYTES / 2), "recompute", id="window"),
    ],
)
def test_every_part_decides_at_its_break_even(asked, prefill_rate, answer):
    scheduler = pair(PreemptionCosts(2.0, 2.0, prefill_rate), window=SIZE)
    told, given = asked[0]
    assert told == {
        "tokens": TOKENS,
        "bytes": BYTES,
        "num_found": FOUND,
        "num_bytes_shared": SHARED,
    }
    assert given == answer
    assert bool(scheduler.stats.swapped) == (answer == "swap")
