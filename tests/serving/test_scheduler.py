"""The scheduler serves everybody, in order, within its limits, and loses nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedtq.paging import PageTables, SharingOptions
from pagedtq.serving import GenerationRequest, PreemptionCosts, Scheduler, SchedulerOptions
from tests.serving.paged_engine import PagedEngine, assert_served, expected, serve

SIZE = 4


def scheduler_of(num_pages, *, sharing=False, window=0, slots=8, host=0, costs=None, **options):
    tables = PageTables(
        SIZE,
        num_pages + 1,
        window_tokens=window,
        num_sinks=2 if window else 0,
        num_window_slots=slots if window else 0,
        sharing=SharingOptions() if sharing else None,
        num_host_pages=host,
    )
    chosen = SchedulerOptions(**({"watermark": 0.0} | options))
    return Scheduler(tables, chosen, costs=costs, page_bytes=1000)


def request_of(name, prompt=5, max_tokens=4, **more):
    """Return a request; a number stands for a prompt of so many tokens of its own."""
    if isinstance(prompt, int):
        prompt = [(7 * at + sum(map(ord, name))) % 97 for at in range(prompt)]
    return GenerationRequest(request_id=name, prompt=prompt, max_tokens=max_tokens, **more)


def assert_drained(scheduler):
    tables = scheduler.tables
    tables.check_integrity()
    assert not scheduler.has_work
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert (tables.num_sequences, tables.pool.num_used) == (0, 0)
    assert (tables.windows.num_used, tables.host.num_used) == (0, 0)
    assert scheduler._committed == 0


@st.composite
def streams(draw):
    """Requests that come over time, with prompts that often begin alike."""
    stems = [[stem] * draw(st.integers(0, 18)) for stem in range(3)]
    requests = []
    for at in range(draw(st.integers(1, 9))):
        stem = draw(st.sampled_from(stems))
        tail = draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
        requests.append(
            request_of(
                f"r{at}",
                stem + tail,
                draw(st.integers(1, 14)),
                num_samples=draw(st.sampled_from([1, 1, 2, 3])),
                priority=draw(st.integers(-1, 1)),
                stop_token_ids=draw(st.sampled_from([(), tuple(range(30))])),
                min_tokens=draw(st.integers(0, 5)),
                salt=draw(st.sampled_from([b"", b"", b"tenant"])),
            )
        )
    gaps = draw(st.lists(st.integers(0, 4), min_size=len(requests), max_size=len(requests)))
    return requests, np.cumsum(gaps).tolist()


rules = st.fixed_dictionaries(
    {
        "step_tokens": st.sampled_from([3, 8, 200]),
        "max_running": st.sampled_from([3, 5, 100]),
        "watermark": st.sampled_from([0.0, 0.2]),
        "admission": st.sampled_from(["prompt", "chunk"]),
        "policy": st.sampled_from(["fcfs", "priority"]),
    }
)


@given(
    streams(),
    rules,
    st.integers(11, 40),
    st.booleans(),
    st.sampled_from([0, SIZE]),
    st.sampled_from([0, 0, 9, 100]),
    st.dictionaries(st.integers(0, 40), st.tuples(st.integers(0, 8), st.booleans()), max_size=3),
)
@settings(max_examples=200)
def test_every_request_generates_the_same_tokens_whatever_the_pool_and_the_rules(
    stream, options, num_pages, sharing, window, host, aborts
):
    requests, times = stream
    options = options | {"preemption": "swap" if host else "recompute"}
    scheduler = scheduler_of(
        num_pages, sharing=sharing, window=window, slots=4, host=host, **options
    )
    engine, finished, aborted, now, coming = PagedEngine(scheduler), {}, set(), 0, 0
    while coming < len(requests) or scheduler.has_work:
        while coming < len(requests) and times[coming] <= now:
            scheduler.add(requests[coming])
            coming += 1
        now += 1
        index, inside = aborts.get(now, (99, False))
        doomed = f"r{index}" if index < coming and f"r{index}" not in finished else None
        aborted.add(doomed)
        if doomed and not inside:
            finished[doomed] = scheduler.abort(doomed)
            scheduler.tables.check_integrity()
        admitted = scheduler.stats.admitted
        step = scheduler.schedule()
        if step is None:
            assert not scheduler.has_work
            continue
        if doomed and inside:
            assert scheduler.abort(doomed) is None
        scheduler.tables.check_integrity()
        assert 0 < step.num_tokens <= options["step_tokens"]
        assert scheduler.num_running <= options["max_running"]
        assert not (step.preempted and scheduler.stats.admitted > admitted)
        assert len(scheduler.members(step)) == step.plan.seq_ids.size
        output = engine.run_step(step)
        scheduler.tables.check_integrity()
        finished |= {done.request_id: done for done in output.finished}
        assert now < 5000, "no end in sight"
    for request in requests:
        done = finished[request.request_id]
        if request.request_id not in aborted:
            assert_served(request, done)
            continue
        for completion in done.completions:
            tokens = expected(request, completion.index)[0]
            assert completion.token_ids.tolist() == tokens[: completion.num_tokens]
    assert len(finished) == len(requests)
    assert_drained(scheduler)


def test_first_come_first_served_starts_requests_in_their_order():
    scheduler = scheduler_of(12, step_tokens=16)
    requests = [request_of(f"{at:02}", 3 + at % 9, 6) for at in range(40)]
    started = []
    serve(scheduler, requests, lambda step, output: started.extend(output.started))
    assert started == [request.request_id for request in requests]


def test_a_large_request_at_the_head_is_not_overtaken():
    scheduler = scheduler_of(10)
    scheduler.add(request_of("running", 20, 9))
    engine, started = PagedEngine(scheduler), []
    engine.run_step(scheduler.schedule())
    scheduler.add(request_of("large", 30, 9))
    scheduler.add(request_of("small", 1, 2))
    while scheduler.has_work:
        started += engine.run_step(scheduler.schedule()).started
    assert started == ["large", "small"]


def test_priority_decides_who_is_admitted_and_age_decides_among_equals():
    scheduler = scheduler_of(8, policy="priority", max_running=1)
    order = [("late", 5), ("b", 0), ("first", -3), ("c", 0), ("a", 0)]
    started = []
    requests = [request_of(name, 3, 2, priority=level) for name, level in order]
    serve(scheduler, requests, lambda step, output: started.extend(output.started))
    assert started == ["first", "b", "c", "a", "late"]


def test_without_the_priority_policy_priorities_are_ignored():
    scheduler = scheduler_of(8, max_running=1)
    started = []
    requests = [request_of(name, 3, 2, priority=-at) for at, name in enumerate("abc")]
    serve(scheduler, requests, lambda step, output: started.extend(output.started))
    assert started == ["a", "b", "c"]


@pytest.mark.parametrize(("policy", "victims"), [("fcfs", {"c"}), ("priority", {"a"})])
def test_the_hindmost_is_preempted_by_age_or_by_priority(policy, victims):
    scheduler = scheduler_of(8, policy=policy)
    requests = [
        request_of(name, 7, 9, priority=level) for name, level in (("a", 3), ("b", 0), ("c", 1))
    ]
    lost = set()
    finished = serve(scheduler, requests, lambda step, output: lost.update(step.preempted))
    assert lost == victims
    for request in requests:
        assert_served(request, finished[request.request_id])


def test_the_foremost_is_never_preempted_and_everybody_gets_done():
    scheduler = scheduler_of(10)
    requests = [request_of(f"{at:02}", 12, 12) for at in range(20)]
    lost = []
    finished = serve(scheduler, requests, lambda step, output: lost.extend(step.preempted))
    assert lost
    assert "00" not in lost
    assert sum(done.num_preemptions for done in finished.values()) == len(lost)
    assert scheduler.stats.preempted == len(lost)
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert_drained(scheduler)


def test_a_prompt_of_higher_priority_that_is_stuck_takes_the_place_of_those_behind_it():
    scheduler = scheduler_of(6, policy="priority", admission="chunk", step_tokens=9)
    engine, steps = PagedEngine(scheduler), []
    scheduler.add(request_of("slow", 8, 12, priority=1))
    engine.run_step(scheduler.schedule())
    scheduler.add(request_of("urgent", 20, 2, priority=0))
    while scheduler.has_work:
        step = scheduler.schedule()
        steps.append((step.preempted, [(name, count) for name, count, _ in step.chunks]))
        engine.run_step(step)
    # No page is left behind 12 tokens: "slow" gives way at once, not when it needs one itself.
    assert steps[:3] == [
        ([], [("urgent", 8)]),
        ([], [("urgent", 4)]),
        (["slow"], [("urgent", 8)]),
    ]
    assert [names for names, _ in steps[3:] if names] == []
    assert_drained(scheduler)


def test_with_whole_admission_nothing_is_ever_preempted():
    requests = [request_of(f"{at:02}", 3 + at % 7, 9, num_samples=1 + at % 3) for at in range(24)]
    for admission, some in (("prompt", True), ("whole", False)):
        scheduler = scheduler_of(14, admission=admission, max_running=6)
        finished = serve(scheduler, requests)
        assert bool(scheduler.stats.preempted) == some
        for request in requests:
            assert_served(request, finished[request.request_id])
        assert_drained(scheduler)


def test_the_watermark_leaves_pages_free_unless_nothing_runs():
    scheduler = scheduler_of(10, watermark=0.5)
    engine = PagedEngine(scheduler)
    scheduler.add(request_of("a", 31, 5))
    scheduler.add(request_of("b", 1, 5))
    step = scheduler.schedule()
    assert [name for name, _, _ in step.chunks] == ["a"]
    engine.run_step(step)
    assert scheduler.num_waiting == 1


def test_prompts_are_chunked_to_what_decoding_leaves_of_the_budget():
    scheduler = scheduler_of(100, step_tokens=10)
    engine = PagedEngine(scheduler)
    scheduler.add(request_of("a", 8, 20))
    scheduler.add(request_of("b", 25, 20))
    chunks = []
    for _ in range(4):
        step = scheduler.schedule()
        chunks.append((step.num_decoding, step.chunks))
        engine.run_step(step)
    assert chunks == [
        (0, [("a", 8, True), ("b", 2, False)]),
        (1, [("b", 9, False)]),
        (1, [("b", 9, False)]),
        (1, [("b", 5, True)]),
    ]


def test_samples_share_the_prompt_and_copy_only_its_open_page():
    scheduler = scheduler_of(40)
    pool = scheduler.tables.pool
    engine = PagedEngine(scheduler)
    scheduler.add(request_of("a", 18, 6, num_samples=4))
    step = scheduler.schedule()
    assert step.sample_members.tolist() == [0, 0, 0, 0]
    engine.run_step(step)
    assert pool.num_used == 5
    assert scheduler.num_running == 4
    step = scheduler.schedule()
    # Four whole pages are shared; the open one is copied for all but the last writer.
    assert pool.num_used == 4 + 4
    assert step.plan.cow_dst.size == 3
    (done,) = (engine.run_step(step), *[engine.run_step(scheduler.schedule()) for _ in range(4)])[
        -1
    ].finished
    assert_served(request_of("a", 18, 6, num_samples=4), done)
    assert_drained(scheduler)


def test_a_prompt_begins_with_the_pages_that_hold_its_first_blocks():
    scheduler = scheduler_of(40, sharing=True)
    engine = PagedEngine(scheduler)
    prompt = list(range(19))
    first, second = request_of("first", prompt, 6), request_of("second", [*prompt, 50, 51], 3)
    finished = serve(scheduler, [first], engine=engine)
    # 19 tokens and the five that were stored behind them: six whole pages.
    follow = request_of("follow", prompt + finished["first"].completions[0].token_ids.tolist(), 3)
    finished |= serve(scheduler, [second], engine=engine)
    finished |= serve(scheduler, [follow], engine=engine)
    assert [finished[n].num_found_tokens for n in ("first", "second", "follow")] == [0, 16, 24]
    for request in (first, second, follow):
        assert_served(request, finished[request.request_id])
    assert scheduler.stats.hit_rate == 40 / (19 + 21 + 25)


def test_pages_published_in_a_step_are_not_found_in_the_same_step():
    scheduler = scheduler_of(40, sharing=True)
    engine = PagedEngine(scheduler)
    for name in "ab":
        scheduler.add(request_of(name, list(range(9)), 2))
    step = scheduler.schedule()
    assert step.chunks == [("a", 9, True), ("b", 9, True)]
    engine.run_step(step)
    scheduler.add(request_of("c", list(range(9)), 2))
    assert scheduler.schedule().chunks == [("c", 1, True)]


def test_salts_keep_tenants_apart():
    scheduler = scheduler_of(40, sharing=True)
    engine = PagedEngine(scheduler)
    for at, salt in enumerate((b"x", b"y", b"x")):
        finished = serve(
            scheduler, [request_of(f"r{at}", list(range(20)), 2, salt=salt)], engine=engine
        )
    assert finished["r2"].num_found_tokens == 16
    assert scheduler.stats.found_tokens == 16


def test_what_was_preempted_finds_its_own_pages_again_if_they_are_still_there():
    requests = [request_of(name, prompt, 12) for name, prompt in (("a", 10), ("b", 10), ("c", 40))]
    computed = {}
    for sharing in (False, True):
        scheduler = scheduler_of(18, sharing=sharing)
        engine = PagedEngine(scheduler)
        finished = serve(scheduler, requests, engine=engine)
        assert scheduler.stats.preempted
        computed[sharing] = engine.tokens
        for request in requests:
            assert_served(request, finished[request.request_id])
    assert computed[True] < computed[False]


@pytest.mark.parametrize("sharing", [False, True])
def test_what_was_swapped_out_goes_on_where_it_was_and_nothing_is_computed_twice(sharing):
    requests = [request_of(name, 10, 12, num_samples=n) for name, n in (("a", 1), ("b", 2))]
    requests.append(request_of("c", 40, 9))
    scheduler = scheduler_of(18, sharing=sharing, host=50, preemption="swap")
    engine = PagedEngine(scheduler)
    finished = serve(scheduler, requests, engine=engine)
    assert scheduler.stats.preempted == scheduler.stats.swapped > 0
    assert engine.copied
    # Prompts once, and every token but the last of each completion once.
    assert engine.tokens == 10 + 10 + 40 + 11 + 2 * 11 + 8
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert_drained(scheduler)


def test_a_full_host_means_computing_again():
    requests = [request_of(name, 10, 12) for name in "abcd"]
    scheduler = scheduler_of(12, host=4, preemption="swap")
    finished = serve(scheduler, requests)
    assert 0 < scheduler.stats.swapped < scheduler.stats.preempted
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert_drained(scheduler)


@pytest.mark.parametrize(("link", "swaps"), [(1.0, False), (1e9, True)])
def test_the_cheaper_preemption_is_chosen(link, swaps):
    costs = PreemptionCosts(out_rate=link, in_rate=link, prefill_rate=1000)
    scheduler = scheduler_of(12, host=50, costs=costs, preemption="auto")
    serve(scheduler, [request_of(name, 10, 12) for name in "abc"])
    assert scheduler.stats.preempted
    assert bool(scheduler.stats.swapped) == swaps


@pytest.mark.parametrize("after", [4, 9, 12])
def test_an_abort_gives_back_what_is_on_the_host(after):
    scheduler = scheduler_of(8, host=50, preemption="swap")
    engine = PagedEngine(scheduler)
    scheduler.add(request_of("kept", 9, 14))
    scheduler.add(request_of("gone", 9, 14, num_samples=2))
    finished = {}
    for _ in range(after):
        engine.run_step(scheduler.schedule())
    assert bool(scheduler.stats.swapped) == (after > 4)
    told = scheduler.abort("gone")
    assert len(told.completions) == 2
    assert all(
        completion.token_ids.tolist() == expected(request_of("gone", 9, 14), at)[0][:after]
        for at, completion in enumerate(told.completions)
        if completion.num_tokens == after
    )
    while scheduler.has_work:
        output = engine.run_step(scheduler.schedule())
        finished |= {done.request_id: done for done in output.finished}
    assert_served(request_of("kept", 9, 14), finished["kept"])
    assert_drained(scheduler)


def test_stop_tokens_end_a_completion_but_not_before_the_least_number_of_tokens():
    every = tuple(range(97))
    requests = [
        request_of("at once", 6, 9, stop_token_ids=every),
        request_of("later", 6, 9, stop_token_ids=every, min_tokens=4),
        request_of("samples", 6, 9, num_samples=3, stop_token_ids=tuple(range(20))),
        request_of("other's", 6, 9),
    ]
    scheduler = scheduler_of(40)
    finished = serve(scheduler, requests)
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert finished["at once"].completions[0].num_tokens == 1
    assert finished["later"].completions[0].num_tokens == 4
    assert_drained(scheduler)


@pytest.mark.parametrize("after", range(6))
@pytest.mark.parametrize("inside", [False, True])
def test_an_abort_gives_back_everything_wherever_the_request_is(after, inside):
    """Before it starts, in prefill, decoding, or with samples preempted; in a step or between."""
    scheduler = scheduler_of(9, step_tokens=8)
    engine = PagedEngine(scheduler)
    scheduler.add(request_of("kept", 9, 9))
    scheduler.add(request_of("gone", 13, 9, num_samples=2))
    finished = {}
    for _ in range(after):
        output = engine.run_step(scheduler.schedule())
    step = scheduler.schedule() if inside else None
    told = scheduler.abort("gone")
    if inside:
        assert told is None
        output = engine.run_step(step)
        (told,) = [done for done in output.finished if done.request_id == "gone"]
    assert {completion.reason for completion in told.completions} <= {"abort"}
    while scheduler.has_work:
        output = engine.run_step(scheduler.schedule())
        finished |= {done.request_id: done for done in output.finished}
    assert_served(request_of("kept", 9, 9), finished["kept"])
    assert_drained(scheduler)


def test_a_step_that_is_given_up_is_scheduled_again():
    scheduler = scheduler_of(30, sharing=True, step_tokens=16)
    engine = PagedEngine(scheduler)
    requests = [request_of(name, 9, 5, num_samples=n) for name, n in (("a", 1), ("b", 2), ("c", 1))]
    for request in requests:
        scheduler.add(request)
    finished, at = {}, 0
    while scheduler.has_work:
        step = scheduler.schedule()
        at += 1
        engine.compute(step)
        if at % 3 == 0:
            scheduler.abort_step()
            scheduler.tables.check_integrity()
            continue
        output = scheduler.update(engine.sample(step))
        finished |= {done.request_id: done for done in output.finished}
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert_drained(scheduler)


def test_sequences_of_others_only_make_the_pool_fuller():
    scheduler = scheduler_of(6)
    other = scheduler.tables.open()
    scheduler.tables.commit(scheduler.tables.reserve([other], 6 * SIZE))
    scheduler.add(request_of("a", 5, 3))
    assert scheduler.schedule() is None
    assert scheduler.has_work
    scheduler.tables.close(other)
    assert serve(scheduler).keys() == {"a"}


def test_requests_of_known_length_but_unknown_content_are_served():
    scheduler = scheduler_of(20, sharing=True)
    scheduler.add(GenerationRequest(request_id="a", prompt=13, max_tokens=3))
    while scheduler.has_work:
        step = scheduler.schedule()
        output = scheduler.update(np.full(step.sample_members.size, 5))
    (done,) = output.finished
    assert done.completions[0].token_ids.tolist() == [5, 5, 5]
    assert_drained(scheduler)


def test_a_steady_decode_step_does_no_work_per_sequence():
    """A thousand sequences in the batch, and no more calls of Python functions than for ten."""
    import sys

    def calls_of(count):
        scheduler = scheduler_of(3 * count + 10, step_tokens=10_000)
        for at in range(count):
            scheduler.add(GenerationRequest(request_id=str(at), prompt=5, max_tokens=9))
        counted = [0]

        def count_call(frame, event, argument):
            counted[0] += event in ("call", "c_call")

        for turn in range(2):
            step = scheduler.schedule() if turn == 0 else None
            if step is not None:
                scheduler.update(np.zeros(step.sample_members.size, np.int32))
                continue
            sys.setprofile(count_call)
            step = scheduler.schedule()
            scheduler.update(np.zeros(count, np.int32))
            sys.setprofile(None)
        return counted[0]

    assert calls_of(1000) <= calls_of(10) + 20
