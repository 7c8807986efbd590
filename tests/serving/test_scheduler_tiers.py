"""The scheduler between the tiers: prefixes, priorities, window slots and fences with swaps."""

from __future__ import annotations

import pytest

from pagedtq.cache.reports import cache_stats
from pagedtq.paging import PageTables
from pagedtq.serving import GenerationRequest, Scheduler
from pagedtq.telemetry import PrometheusCollector
from tests.serving.paged_engine import PagedEngine, assert_served, serve
from tests.serving.test_scheduler import SIZE, assert_drained, request_of, scheduler_of


def test_the_prefix_of_a_sequence_on_the_host_is_found_by_others_meanwhile():
    """The lowest priority is swapped out; who comes then finds the blocks that it had published."""
    scheduler = scheduler_of(11, sharing=True, host=50, preemption="swap", policy="priority")
    engine, finished = PagedEngine(scheduler), {}
    common = list(range(50, 62))
    first = request_of("first", [*common, 1], 12, priority=2)
    large = request_of("large", 14, 10, priority=0)
    scheduler.add(first)
    scheduler.add(large)
    while not scheduler.stats.swapped:
        engine.run_step(scheduler.schedule())
    assert scheduler.num_waiting == 1
    second = request_of("second", [*common, 2], 2, priority=1)
    scheduler.add(second)
    while scheduler.has_work:
        output = engine.run_step(scheduler.schedule())
        scheduler.tables.check_integrity()
        finished |= {done.request_id: done for done in output.finished}
    assert list(finished) == ["large", "second", "first"]
    assert finished["second"].num_found_tokens == 12
    for request in (first, large, second):
        assert_served(request, finished[request.request_id])
    # Blocks that stayed findable on the device were not copied back.
    assert scheduler.stats.swapped_in_pages < scheduler.stats.swapped_out_pages
    assert_drained(scheduler)


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_lowest_priority_gives_way_and_comes_back_last(preemption):
    scheduler = scheduler_of(12, host=50, preemption=preemption, policy="priority")
    requests = [
        request_of(name, 10, 12, priority=priority)
        for name, priority in (("low", 5), ("high", -3), ("middle", 0))
    ]
    order, lost = [], []

    def after(step, output):
        lost.extend(step.preempted)
        order.extend(done.request_id for done in output.finished)

    finished = serve(scheduler, requests, after)
    assert order == ["high", "middle", "low"]
    assert set(lost) == {"low"}
    assert bool(scheduler.stats.swapped) == (preemption == "swap")
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert_drained(scheduler)


@pytest.mark.parametrize("host", [0, 50])
def test_window_slots_of_others_are_respected(host):
    """Three slots, of which somebody else has one: two sequences run at a time."""
    preemption = "swap" if host else "recompute"
    scheduler = scheduler_of(
        12, window=SIZE, slots=3, host=host, preemption=preemption, sharing=True
    )
    tables = scheduler.tables
    other = tables.open()
    tables.commit(tables.reserve([other], 2))
    running = []
    requests = [request_of(name, 10, 14) for name in "abc"]
    requests.append(request_of("d", 3, 4, num_samples=2))
    finished = serve(
        scheduler, requests, lambda step, output: running.append(scheduler.num_running)
    )
    assert max(running) == 2
    for request in requests:
        assert_served(request, finished[request.request_id])
    assert scheduler.stats.preempted
    tables.close(other)
    assert_drained(scheduler)


def test_samples_that_still_share_a_page_wait_for_their_copy_of_it(monkeypatch):
    """Only one of three finds a page to copy to; the others must not be forgotten to need one."""
    scheduler = scheduler_of(4)
    tables, request = scheduler.tables, request_of("a", 5, 4, num_samples=3)
    other = tables.open()
    tables.commit(tables.reserve([other], SIZE))
    engine = PagedEngine(scheduler)
    scheduler.add(request)
    engine.run_step(scheduler.schedule())
    fence = tables.fences.open()
    tables.close(other)
    assert (tables.pool.num_free, tables.pool.num_parked) == (1, 1)

    def fail(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(tables, "reserve", fail)
        with pytest.raises(MemoryError):
            scheduler.schedule()
    assert (scheduler.num_held, scheduler.num_running) == (0, 3)
    for _ in range(2):
        step = scheduler.schedule()
        assert (step.num_decoding, scheduler.num_held, step.preempted) == (1, 2, [])
        engine.run_step(step)
    tables.fences.close(fence)
    finished = serve(scheduler, engine=engine)
    assert_served(request, finished["a"])
    assert not scheduler.stats.preempted
    assert_drained(scheduler)


def test_a_search_of_lengths_forks_and_closes_by_parents_alone():
    tables = PageTables(SIZE, 20)
    scheduler = Scheduler(tables, track_tokens=False)
    scheduler.add(GenerationRequest(request_id="a", prompt=6, max_tokens=5, beam_width=3))
    scheduler.schedule()
    scheduler.update()
    for parents in ([0, 0, 1], [2, 2, 2], [0, 1, 2]):
        step = scheduler.schedule()
        output = scheduler.update(parents=parents)
        tables.check_integrity()
    assert tables.num_sequences == 3
    step = scheduler.schedule()
    assert step.num_decoding == 3
    output = scheduler.update(parents=[1, 1, 0])
    assert [done.num_tokens for done in output.finished[0].completions] == [5, 5, 5]
    assert_drained(scheduler)


def test_counts_of_a_scheduler_are_exported_beside_those_of_its_tables():
    client = pytest.importorskip("prometheus_client")
    scheduler = scheduler_of(12, host=50, preemption="swap")
    registry = client.CollectorRegistry()
    registry.register(
        PrometheusCollector(lambda: cache_stats(scheduler.tables), scheduler.counters)
    )
    serve(scheduler, [request_of(name, 10, 12) for name in "abc"])
    stats = scheduler.stats
    assert stats.swapped_out_pages == stats.swapped_in_pages > 0
    for name, value in (
        ("pagedtq_prompt_tokens_total", 30),
        ("pagedtq_prompt_tokens_found_total", stats.found_tokens),
        ("pagedtq_preemptions_total", stats.preempted),
        ("pagedtq_swapped_out_pages_total", stats.swapped_out_pages),
        ("pagedtq_swapped_in_pages_total", stats.swapped_in_pages),
        ("pagedtq_pages_free", 12),
    ):
        assert registry.get_sample_value(name) == value


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("window", [0, SIZE])
def test_pages_and_slots_behind_fences_are_waited_for_and_nobody_else_gives_way(preemption, window):
    """Each step's work ends two steps later, as on a device that runs behind its host."""

    class Event:
        done = False

    def run(fenced):
        scheduler = scheduler_of(
            12, window=window, slots=3, host=50, preemption=preemption, sharing=True
        )
        requests = [request_of(name, 9 + at, 12) for at, name in enumerate("abcd")]
        engine, events, finished = PagedEngine(scheduler), [], {}
        for request in requests:
            scheduler.add(request)
        rounds = 0
        while scheduler.has_work:
            rounds += 1
            assert rounds < 500
            step = scheduler.schedule()
            scheduler.tables.check_integrity()
            if step is not None:
                if fenced:
                    events.append(Event())
                    scheduler.tables.fences.open(events[-1])
                output = engine.run_step(step)
                finished |= {done.request_id: done for done in output.finished}
            for event in events if step is None else events[:-2]:
                event.done = True
        for event in events:
            event.done = True
        scheduler.tables.fences.poll()
        for request in requests:
            assert_served(request, finished[request.request_id])
        assert_drained(scheduler)
        return scheduler.stats.preempted

    assert 0 < run(True) <= run(False)
