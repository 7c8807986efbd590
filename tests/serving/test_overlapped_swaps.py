"""Swaps whose copies run while others step: nothing is read early, nothing waits for ever."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedtq.errors import ArgumentError, StepError
from pagedtq.paging import PageTables
from pagedtq.serving import PreemptionCosts, Scheduler, SchedulerOptions
from tests.serving.paged_engine import (
    CopyingEngine,
    assert_served,
    expected,
    serve,
    serve_overlapped,
)
from tests.serving.test_beam_search import BeamEngine, beams, search
from tests.serving.test_scheduled_cache import LAYERS, cache_of, vectors_of
from tests.serving.test_scheduler import (
    SIZE,
    assert_drained,
    request_of,
    rules,
    scheduler_of,
    streams,
)


@given(
    streams(),
    rules,
    st.integers(11, 30),
    st.booleans(),
    st.sampled_from([0, SIZE]),
    st.sampled_from([9, 100]),
    st.dictionaries(st.integers(0, 40), st.tuples(st.integers(0, 8), st.booleans()), max_size=3),
    st.lists(st.integers(0, 9), min_size=1, max_size=12),
    st.booleans(),
    st.sampled_from([0, 0, 1, 3]),
)
@settings(max_examples=200)
def test_every_request_generates_the_same_tokens_however_long_the_copies_take(
    stream, options, num_pages, sharing, window, host, aborts, luck, late, fence_steps
):
    """``luck`` says after each round whether a copy ends, which, and whether it failed."""
    requests, times = stream
    scheduler = scheduler_of(
        num_pages, sharing=sharing, window=window, slots=4, host=host, preemption="swap", **options
    )
    engine, finished, aborted, now, coming = CopyingEngine(scheduler, late), {}, set(), 0, 0
    fences = []
    while coming < len(requests) or scheduler.has_work:
        assert now < 5000, "no end in sight"
        while coming < len(requests) and times[coming] <= now:
            scheduler.add(requests[coming])
            coming += 1
        draw = luck[now % len(luck)]
        now += 1
        index, inside = aborts.get(now, (99, False))
        doomed = f"r{index}" if index < coming and f"r{index}" not in finished else None
        aborted.add(doomed)
        if doomed and not inside:
            finished[doomed] = scheduler.abort(doomed)
        step = scheduler.schedule()
        scheduler.tables.check_integrity()
        assert scheduler.num_running <= options["max_running"]
        if step is not None:
            if doomed and inside:
                assert scheduler.abort(doomed) is None
            assert step.num_tokens <= options["step_tokens"]
            if fence_steps:
                fences.append(scheduler.tables.fences.open())
            output = engine.run_step(step)
            finished |= {done.request_id: done for done in output.finished}
        elif doomed and inside and doomed in scheduler._numbers:
            finished[doomed] = scheduler.abort(doomed)
        while fences and (len(fences) > fence_steps or step is None):
            scheduler.tables.fences.close(fences.pop(0))
        if engine.under_way and (draw < 5 or step is None):
            engine.end(draw % len(engine.under_way), failed=draw == 4)
        scheduler.tables.check_integrity()
    for fence in fences:
        scheduler.tables.fences.close(fence)
    for request in requests:
        done = finished[request.request_id]
        if request.request_id not in aborted:
            assert_served(request, done)
            continue
        for completion in done.completions:
            tokens = expected(request, completion.index)[0]
            assert completion.token_ids.tolist() == tokens[: completion.num_tokens]
    assert not engine.under_way
    assert_drained(scheduler)


def three_in_a_tight_pool(**options):
    scheduler = scheduler_of(12, host=50, preemption="swap", **options)
    # They begin their blocks in different steps.
    requests = [request_of(name, tokens, 12) for name, tokens in zip("abc", (9, 10, 11))]
    return scheduler, requests


@pytest.mark.parametrize("every", [1, 2, 5, 30])
def test_others_step_while_copies_run_and_nothing_is_computed_twice(every):
    scheduler, requests = three_in_a_tight_pool()
    engine = CopyingEngine(scheduler)
    finished = serve_overlapped(scheduler, requests, every, engine)
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert scheduler.stats.swapped == scheduler.stats.preempted > 0
    assert engine.tokens == 3 * (10 + 11)
    assert engine.overlapped > 0 or every == 1
    assert scheduler.stats.swapped_in_pages == scheduler.stats.swapped_out_pages > 0
    assert_drained(scheduler)


def until_leaving(scheduler, requests, engine):
    """Step until a swap is begun; return its plan."""
    for request in requests:
        scheduler.add(request)
    for _ in range(100):
        step = scheduler.schedule()
        if step is not None:
            engine.run_step(step)
        if engine.under_way:
            return engine.under_way[-1]
    raise AssertionError("nothing was swapped")


def test_a_leaving_sequence_keeps_its_pages_until_its_copy_is_done():
    scheduler, requests = three_in_a_tight_pool()
    engine = CopyingEngine(scheduler)
    plan = until_leaving(scheduler, requests, engine)
    tables = scheduler.tables
    assert (tables.pool.ref_counts[plan.pages] == 1).all()
    free = tables.pool.num_free
    assert scheduler.num_swapping == 1
    engine.end()
    assert scheduler.num_swapping == 1, "only schedule ends a swap"
    step = scheduler.schedule()
    assert scheduler.num_swapping == 0
    assert tables.is_swapped(plan.seq_ids).all()
    assert tables.pool.num_free == free + plan.pages.size - step.plan.new_pages.size
    engine.run_step(step)


def test_who_lacks_a_page_that_is_on_its_way_sits_the_step_out_and_is_not_preempted():
    scheduler = scheduler_of(6, host=50, preemption="swap")
    engine = CopyingEngine(scheduler)
    # All three are about to begin a block; there is room for none of them.
    requests = [request_of(name, 8, 9) for name in "abc"]
    plan = until_leaving(scheduler, requests, engine)
    assert plan.pages.size == 2
    seen = []
    for _ in range(3):
        step = scheduler.schedule()
        seen.append(None if step is None else scheduler.members(step))
        if step is not None:
            engine.run_step(step)
    assert seen == [None, None, None]
    assert scheduler.num_held == 0
    assert scheduler.stats.preempted == 1
    engine.end()
    step = scheduler.schedule()
    assert scheduler.members(step) == ["a", "b"]
    assert scheduler.stats.preempted == 1
    engine.run_step(step)
    finished = serve_overlapped(scheduler, engine=engine)
    for request in requests:
        assert_served(request, finished[request.request_id])


def test_sequences_with_room_step_on_while_others_wait_for_a_page():
    scheduler = scheduler_of(7, host=50, preemption="swap")
    engine = CopyingEngine(scheduler)
    requests = [request_of("a", 6, 9), request_of("b", 8, 9), request_of("c", 8, 9)]
    until_leaving(scheduler, requests, engine)
    rows = []
    for _ in range(8):
        step = scheduler.schedule()
        if step is None:
            break
        rows.append(scheduler.members(step))
        engine.run_step(step)
        scheduler.tables.check_integrity()
    assert rows and all("c" not in row for row in rows)
    assert scheduler.stats.preempted == 1
    finished = serve_overlapped(scheduler, engine=engine)
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert_drained(scheduler)


def test_nothing_overtakes_a_sequence_that_is_leaving():
    scheduler = scheduler_of(9, host=50, preemption="swap")
    engine = CopyingEngine(scheduler)
    # The first one ends without another page, while the last one is still leaving.
    requests = [request_of("a", 9, 4), request_of("b", 11, 12), request_of("c", 10, 12)]
    until_leaving(scheduler, requests, engine)
    scheduler.add(request_of("small", 1, 1))
    finished = {}
    for _ in range(4):
        output = engine.run_step(scheduler.schedule())
        finished |= {done.request_id: done for done in output.finished}
    assert list(finished) == ["a"]
    assert (scheduler.num_swapping, scheduler.num_waiting) == (1, 1)
    assert scheduler.tables.pool.num_free > 0
    finished |= serve_overlapped(scheduler, engine=engine)
    for request in (*requests, request_of("small", 1, 1)):
        assert_served(request, finished[request.request_id])


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("reported", [False, True])
def test_an_abort_tells_at_once_and_the_pages_come_back_with_the_copy(direction, reported):
    scheduler, requests = three_in_a_tight_pool()
    engine = CopyingEngine(scheduler)
    plan = until_leaving(scheduler, requests, engine)
    finished = {}
    while plan.direction != direction:
        if engine.under_way:
            engine.end()
        step = scheduler.schedule()
        if step is not None:
            output = engine.run_step(step)
            finished |= {done.request_id: done for done in output.finished}
        plan = engine.under_way[-1] if engine.under_way else plan
    if reported:
        engine.end()
    told = scheduler.abort("c")
    (completion,) = told.completions
    tokens = expected(requests[2])[0]
    assert completion.token_ids.tolist() == tokens[: completion.num_tokens]
    assert scheduler.has_work
    scheduler.tables.check_integrity()
    finished |= serve_overlapped(scheduler, engine=engine)
    assert set(finished) == {"a", "b"}
    assert_drained(scheduler)


def test_what_is_left_after_the_last_request_is_aborted_comes_back_with_its_copy():
    scheduler, requests = three_in_a_tight_pool()
    engine = CopyingEngine(scheduler)
    plan = until_leaving(scheduler, requests, engine)
    for request in requests:
        scheduler.abort(request.request_id)
    assert scheduler.has_work
    assert scheduler.schedule() is None
    assert scheduler.tables.pool.num_used == plan.pages.size
    engine.end()
    assert scheduler.schedule() is None
    assert_drained(scheduler)


@pytest.mark.parametrize("direction", ["out", "in"])
@pytest.mark.parametrize("sharing", [False, True])
def test_a_copy_that_fails_means_computing_again(direction, sharing):
    scheduler, requests = three_in_a_tight_pool(sharing=sharing)
    engine, failed, finished = CopyingEngine(scheduler), 0, {}
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        step = scheduler.schedule()
        if step is not None:
            output = engine.run_step(step)
            finished |= {done.request_id: done for done in output.finished}
        if engine.under_way:
            fails = not failed and engine.under_way[0].direction == direction
            failed += fails
            engine.end(failed=fails)
        scheduler.tables.check_integrity()
    assert failed == 1
    assert scheduler.stats.swapped == scheduler.stats.preempted - (direction == "out")
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert_drained(scheduler)


class BeamsThatCopy(BeamEngine, CopyingEngine):
    """Chooses hypotheses, and copies swaps late."""


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=8),
            st.integers(4, 12),
            st.sampled_from([2, 3, 3]),
        ),
        min_size=2,
        max_size=5,
    ),
    st.integers(15, 22),
    st.booleans(),
    st.sampled_from([0, SIZE]),
    st.sampled_from([20, 200]),
    st.lists(st.integers(0, 4), min_size=1, max_size=8),
)
@settings(max_examples=80)
def test_a_beam_search_leaves_and_returns_whole_while_others_step(
    shapes, num_pages, sharing, window, host, luck
):
    scheduler = scheduler_of(
        num_pages,
        host=host,
        preemption="swap",
        max_running=9,
        window=window,
        slots=9,
        sharing=sharing,
    )
    requests = [beams(f"r{at}", *shape) for at, shape in enumerate(shapes)]
    engine, finished, rounds = BeamsThatCopy(scheduler, requests), {}, 0
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        step, rounds = scheduler.schedule(), rounds + 1
        if step is not None:
            output = engine.run_step(step)
            finished |= {done.request_id: done for done in output.finished}
        if engine.under_way and (step is None or luck[rounds % len(luck)] == 0):
            engine.end()
        scheduler.tables.check_integrity()
        assert rounds < 2000
    for request in requests:
        found = [c.token_ids.tolist() for c in finished[request.request_id].completions]
        assert found == search(request)
    assert_drained(scheduler)


def test_a_report_of_a_swap_that_is_not_under_way_is_refused():
    scheduler, requests = three_in_a_tight_pool()
    engine = CopyingEngine(scheduler)
    plan = until_leaving(scheduler, requests, engine)
    engine.end()
    # Reported twice before it is ended, as a copy that is retried may be.
    scheduler.swap_done(plan)
    step = scheduler.schedule()
    engine.run_step(step)
    for call in (scheduler.swap_done, scheduler.swap_failed):
        with pytest.raises(StepError, match="no such swap"):
            call(plan)
    waiting, requests = three_in_a_tight_pool()
    plans = []
    serve(waiting, requests, after_step=lambda step, output: plans.extend(step.swaps))
    with pytest.raises(StepError, match="start_swap"):
        waiting.swap_done(plans[0])


def test_a_copy_that_cannot_be_started_raises_and_its_sequence_is_computed_again():
    scheduler, requests = three_in_a_tight_pool()
    engine, broken = CopyingEngine(scheduler), [True]

    def start(plan):
        if broken[0]:
            raise RuntimeError("no stream")
        engine.begin(plan)

    scheduler._start_swap = start
    with pytest.raises(RuntimeError, match="no stream"):
        until_leaving(scheduler, requests, engine)
    scheduler.tables.check_integrity()
    broken[0] = False
    finished = serve_overlapped(scheduler, engine=engine)
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert_drained(scheduler)


def test_what_is_no_callable_cannot_start_swaps():
    with pytest.raises(ArgumentError, match="start_swap must be callable, got list"):
        Scheduler(PageTables(4, 20), start_swap=[])


def test_swaps_tell_their_bytes():
    tables = PageTables(4, 20, window_tokens=4, num_window_slots=3, num_host_pages=10)
    scheduler = Scheduler(tables, page_bytes=100, window_slot_bytes=7)
    seq_id = tables.open()
    tables.commit(tables.reserve([seq_id], 11))
    plan = tables.begin_swap_out([seq_id])
    assert scheduler.swap_bytes(plan) == 3 * 100 + 7


@pytest.mark.parametrize("window", [0, 16])
def test_a_thread_copies_pages_of_a_cache_while_steps_are_stored(window):
    """What is loaded after swaps in a thread is what was stored, layer by layer."""
    cache = cache_of(12, window)
    # Debug mode checks after every change, and is for one thread only.
    cache.debug = False
    copying, threads = ThreadPoolExecutor(1), set()

    def copy(plan):
        threads.add(threading.get_ident())
        cache.copy_swap(plan)
        scheduler.swap_done(plan)

    copies = []
    scheduler = Scheduler(
        cache,
        SchedulerOptions(watermark=0.0, step_tokens=40, preemption="auto"),
        costs=PreemptionCosts(out_rate=1e9, in_rate=1e9, prefill_rate=10),
        start_swap=lambda plan: copies.append(copying.submit(copy, plan)),
    )
    requests = [request_of("a", list(range(30)), 20), request_of("c", [5] * 40, 24)]
    requests.append(request_of("b", list(range(20)) + [31] * 9, 20, num_samples=2))
    for request in requests:
        scheduler.add(request)
    rng, stored, finished = np.random.default_rng(0), {}, {}
    with copying:
        while scheduler.has_work:
            step = scheduler.schedule()
            if step is None:
                copies[-1].result(timeout=60)
                continue
            ends = np.cumsum(step.plan.num_new)
            for seq_id, tokens in zip(
                step.plan.seq_ids.tolist(), np.split(step.token_ids, ends[:-1]), strict=True
            ):
                stored.setdefault(seq_id, []).extend(tokens.tolist())
            for layer in range(LAYERS):
                vectors = vectors_of(step.token_ids, layer)
                cache.store(layer, vectors, vectors)
            for seq_id in step.plan.seq_ids.tolist():
                keys = np.asarray(cache.load(1, seq_id)[0], np.float32)
                got = keys[:, 0].argmax(axis=1).tolist()
                # Forks begin with what their prompt stored, which `stored` does not follow.
                own = [token % 32 for token in stored[seq_id]]
                assert got[len(got) - len(own) :] == own
            output = scheduler.update(rng.integers(0, 32, step.sample_members.size))
            finished |= {done.request_id: done for done in output.finished}
    assert scheduler.stats.swapped_out_pages
    assert threads and threading.get_ident() not in threads
    assert {n: len(done.completions) for n, done in finished.items()} == {"a": 1, "b": 2, "c": 1}
    cache.check_integrity()
    assert_drained(scheduler)
