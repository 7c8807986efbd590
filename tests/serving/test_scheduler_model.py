"""Every decision of the scheduler is that of one written naively, step by step."""

from __future__ import annotations

import random

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.naive_scheduler import NaiveScheduler
from tests.serving.paged_engine import PagedEngine
from tests.serving.test_scheduler import (
    SIZE,
    assert_drained,
    request_of,
    rules,
    scheduler_of,
    streams,
)


@given(streams(), rules, st.integers(11, 40), st.booleans())
@settings(max_examples=150)
def test_every_step_is_that_of_a_scheduler_written_naively(stream, options, num_pages, sharing):
    compare(stream, num_pages, sharing, 0, options)


@given(streams(), rules, st.integers(11, 30), st.sampled_from([3, 9, 100]))
@settings(max_examples=100)
def test_every_step_is_that_of_a_scheduler_written_naively_with_swaps(
    stream, options, num_pages, host
):
    """Of requests that share nothing, in order of arrival or of priority."""
    requests, times = stream
    alone = [msgspec.structs.replace(request, num_samples=1) for request in requests]
    compare((alone, times), num_pages, False, host, options | {"preemption": "swap"})


def compare(stream, num_pages, sharing, host, options):
    requests, times = stream
    scheduler = scheduler_of(num_pages, sharing=sharing, host=host, **options)
    naive = NaiveScheduler(num_pages, SIZE, sharing, scheduler.options, host)
    engine, now, coming, found = PagedEngine(scheduler), 0, 0, {}
    while coming < len(requests) or scheduler.has_work:
        while coming < len(requests) and times[coming] <= now:
            scheduler.add(requests[coming])
            naive.add(requests[coming])
            coming += 1
        now += 1
        step = scheduler.schedule()
        if step is None:
            continue
        members, free = scheduler.members(step), scheduler.tables.pool.num_free
        output = engine.run_step(step)
        preempted, names, chunks, expected_free, finished = naive.step()
        assert step.preempted == preempted
        assert members == names
        assert step.chunks == chunks
        assert free == expected_free
        assert scheduler.tables.host.num_free == naive.host
        assert scheduler.tables.pool.num_free == len(naive.free)
        assert (scheduler.num_waiting, scheduler.num_running) == (
            len(naive.waiting),
            len(naive.decoding) + sum(s.width for s in naive.prefills),
        )
        for done in output.finished:
            found[done.request_id] = done.num_found_tokens
        ended = {name for name, _, _ in finished}
        assert {done.request_id for done in output.finished} <= ended
    assert found == naive.found
    assert not naive.decoding and not naive.waiting
    assert_drained(scheduler)
    return naive


def test_prompts_that_are_stuck_take_the_place_of_those_behind_them_as_if_written_naively():
    """Long prompts come while sequences of lower priority decode, in pools that just hold both."""
    num_stuck = 0
    for seed in range(90):
        rng = random.Random(seed)
        requests = [
            request_of(f"r{at}", rng.randint(2, 10), rng.randint(6, 14), priority=1)
            for at in range(rng.randint(1, 3))
        ]
        for at in range(len(requests), len(requests) + rng.randint(1, 3)):
            requests.append(request_of(f"r{at}", rng.randint(10, 26), rng.randint(1, 4)))
        times = sorted(rng.randint(0, 6) for _ in requests)
        options = {
            "policy": "priority",
            "admission": "chunk",
            "step_tokens": rng.choice((4, 6, 9)),
            "max_running": 100,
            "watermark": 0.0,
        }
        host = rng.choice((0, 0, 9))
        options |= {"preemption": "swap"} if host else {}
        num_stuck += compare((requests, times), rng.randint(8, 11), False, host, options).num_stuck
    assert num_stuck > 25, "hardly any prompt was stuck: the test proves little"
