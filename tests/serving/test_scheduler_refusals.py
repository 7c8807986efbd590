"""What the scheduler refuses: by name, with numbers and a remedy, and with nothing changed."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConfigError,
    PagedTQError,
    RequestError,
    RequestTooLarge,
    StepError,
    UnknownRequest,
)
from pagedtq.paging import PageTables, SharingOptions
from pagedtq.serving import GenerationRequest, PreemptionCosts, Scheduler, SchedulerOptions
from tests.serving.paged_engine import assert_served, serve
from tests.serving.test_scheduler import assert_drained, request_of, scheduler_of


@pytest.mark.parametrize(
    "options",
    [
        {"step_tokens": 0},
        {"max_running": 0},
        {"max_running": 2.5},
        {"step_tokens": "many"},
        {"step_tokens": True},
        {"watermark": None},
        {"watermark": 1.0},
        {"watermark": -0.1},
        {"watermark": float("nan")},
        {"admission": "never"},
        {"policy": "lifo"},
        {"preemption": "kill"},
    ],
)
def test_options_that_make_no_sense_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SchedulerOptions(**options)


@pytest.mark.parametrize(
    "fields",
    [
        {"request_id": ""},
        {"request_id": 7},
        {"max_tokens": 0},
        {"max_tokens": -3},
        {"max_tokens": True},
        {"max_tokens": 2.0},
        {"max_tokens": 1 << 50},
        {"num_samples": 0},
        {"beam_width": -1},
        {"priority": 1 << 40},
        {"min_tokens": -1},
        {"num_samples": 2, "beam_width": 2},
    ],
)
def test_requests_whose_numbers_make_no_sense_are_refused_by_name(fields):
    with pytest.raises(RequestError) as caught:
        GenerationRequest(**({"request_id": "chat", "prompt": [1], "max_tokens": 4} | fields))
    assert caught.value.request_id == str(fields.get("request_id", "chat"))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"prompt": []}, "prompt tokens must be in"),
        ({"prompt": 0}, "prompt tokens must be in"),
        ({"prompt": -4}, "prompt tokens must be in"),
        ({"prompt": True}, "prompt tokens must be an integer"),
        ({"prompt": [1, 1 << 31]}, "must fit int32, got 2147483648"),
        ({"prompt": np.array([-(1 << 31) - 1])}, "must fit int32"),
        ({"prompt": [1, 2.5]}, "must be integers"),
        ({"prompt": [[1], [2]]}, "one-dimensional"),
        ({"prompt": "text"}, "must be"),
        ({"salt": "tenant"}, "salt must be bytes"),
        ({"prompt": 5, "salt": b"tenant"}, "need token_ids"),
        ({"extra_keys": {0: "adapter"}}, "must be bytes"),
        ({"extra_keys": {-1: b"adapter"}}, "must be >= 0"),
        ({"block_keys": ["key"]}, "must be bytes"),
        ({"block_keys": [b"a", b"b"], "prompt": 5}, "num_tokens must be >= 8"),
        ({"block_keys": [b"a"], "salt": b"tenant"}, "belong to token_ids"),
        ({"stop_token_ids": [1 << 40]}, "stop_token_ids must fit int32"),
    ],
)
@pytest.mark.parametrize("sharing", [False, True])
def test_a_request_with_bad_content_is_refused_by_name_and_nothing_is_changed(
    fields, problem, sharing
):
    scheduler = scheduler_of(20, sharing=sharing)
    request = GenerationRequest(
        **({"request_id": "chat", "prompt": [1, 2], "max_tokens": 4} | fields)
    )
    with pytest.raises(RequestError, match=problem) as caught:
        scheduler.add(request)
    assert caught.value.request_id == "chat"
    assert str(caught.value).startswith("request 'chat': ")
    assert_drained(scheduler)
    scheduler.add(request_of("chat"))
    assert_served(request_of("chat"), serve(scheduler)["chat"])


@pytest.mark.parametrize("request_", [None, "a", {"request_id": "a"}])
def test_what_is_no_request_is_refused(request_):
    scheduler = scheduler_of(20)
    with pytest.raises(ArgumentTypeError, match="expects a GenerationRequest, got"):
        scheduler.add(request_)
    assert_drained(scheduler)


def test_an_id_is_taken_until_its_request_leaves():
    scheduler = scheduler_of(20)
    scheduler.add(request_of("a"))
    with pytest.raises(RequestError, match="the id is taken"):
        scheduler.add(request_of("a"))
    serve(scheduler)
    scheduler.add(request_of("a"))
    assert len(serve(scheduler)) == 1


@pytest.mark.parametrize(
    ("fields", "options", "need", "total", "unit"),
    [
        ({"prompt": 30, "max_tokens": 12}, {}, 11, 10, "pages"),
        ({"prompt": 20, "max_tokens": 5, "beam_width": 6}, {}, 11, 10, "pages"),
        ({"num_samples": 4}, {"max_running": 3}, 4, 3, "sequences"),
        ({"num_samples": 4}, {"step_tokens": 3}, 4, 3, "sequences"),
        ({"beam_width": 4}, {"window": 4, "slots": 3}, 4, 3, "sequences"),
        ({"prompt": 8, "max_tokens": 9, "num_samples": 5}, {"admission": "whole"}, 12, 10, "pages"),
    ],
)
def test_a_request_that_no_empty_pool_could_serve_is_refused_with_its_numbers(
    fields, options, need, total, unit
):
    scheduler = scheduler_of(10, **options)
    with pytest.raises(
        RequestTooLarge, match=f"needs {need} {unit}.*there are {total}; "
    ) as caught:
        scheduler.add(request_of("huge", **fields))
    assert (caught.value.need, caught.value.total) == (need, total)
    assert_drained(scheduler)


def test_a_request_that_just_fits_is_served():
    for fields in (
        {"prompt": 30, "max_tokens": 11},
        {"prompt": 8, "max_tokens": 9, "num_samples": 6},
        {"prompt": 30, "max_tokens": 11, "num_samples": 3},
    ):
        scheduler = scheduler_of(10)
        request = request_of("exact", **fields)
        assert_served(request, serve(scheduler, [request])["exact"])
        assert_drained(scheduler)


def test_an_unknown_request_cannot_be_aborted():
    scheduler = scheduler_of(10)
    for name in ("never", 7, None):
        with pytest.raises(UnknownRequest, match="neither waits nor runs"):
            scheduler.abort(name)
    serve(scheduler, [request_of("gone")])
    with pytest.raises(UnknownRequest):
        scheduler.abort("gone")


def test_calls_out_of_order_are_refused():
    scheduler = scheduler_of(10)
    for call in (scheduler.update, scheduler.abort_step):
        with pytest.raises(StepError, match="call schedule first"):
            call()
    scheduler.add(request_of("a"))
    step = scheduler.schedule()
    with pytest.raises(StepError, match="a step is open"):
        scheduler.schedule()
    scheduler.update([1])
    with pytest.raises(StepError):
        scheduler.members(step)


def test_a_step_of_somebody_else_must_end_first():
    scheduler = scheduler_of(10)
    tables = scheduler.tables
    other = tables.open()
    plan = tables.reserve([other], 3)
    scheduler.add(request_of("a"))
    with pytest.raises(StepError, match="a step is open"):
        scheduler.schedule()
    assert (scheduler.num_waiting, tables.num_sequences) == (1, 1)
    tables.commit(plan)
    assert scheduler.schedule().num_tokens == 5


def test_a_request_that_is_aborted_inside_a_step_leaves_with_it_however_it_ends():
    scheduler = scheduler_of(10)
    scheduler.add(request_of("a"))
    scheduler.schedule()
    assert scheduler.abort("a") is None
    assert scheduler.abort("a") is None
    assert [done.request_id for done in scheduler.abort_step()] == ["a"]
    assert_drained(scheduler)


@pytest.mark.parametrize(
    ("tokens", "error"),
    [
        (None, ArgumentError),
        ([], ArgumentError),
        ([1, 2], ArgumentError),
        ([1.5], ArgumentTypeError),
        ([1 << 31], ArgumentError),
    ],
)
def test_wrong_tokens_leave_the_step_open(tokens, error):
    scheduler = scheduler_of(10)
    scheduler.add(request_of("a"))
    scheduler.schedule()
    with pytest.raises(error):
        scheduler.update(tokens)
    scheduler.update([1])
    assert scheduler.lengths.tolist() == [5]


def test_a_scheduler_of_lengths_takes_no_tokens_and_only_it_takes_steps_at_once():
    for tracks in (False, True):
        tables = PageTables(4, 20)
        scheduler = Scheduler(tables, track_tokens=tracks)
        scheduler.add(GenerationRequest(request_id="a", prompt=5, max_tokens=9))
        scheduler.schedule()
        scheduler.update([1] if tracks else None)
        if tracks:
            with pytest.raises(StepError, match="without track_tokens"):
                scheduler.schedule(lambda most: most)
            continue
        for wrong in (0, 9):
            with pytest.raises(ArgumentError, match=f"1 to 8 steps as one, got {wrong}"):
                scheduler.schedule(lambda most, wrong=wrong: wrong)
        scheduler.schedule(lambda most: 5)
        with pytest.raises(ArgumentError, match="takes no tokens"):
            scheduler.update([1])
        scheduler.update()
        assert scheduler.lengths.tolist() == [10]


def test_costs_that_are_to_be_compared_must_be_known():
    tables = PageTables(4, 20, num_host_pages=5)
    costs = PreemptionCosts(out_rate=1.0, in_rate=1.0, prefill_rate=1.0)
    for known in ({}, {"costs": costs}, {"page_bytes": 100}):
        with pytest.raises(ArgumentError, match="page_bytes"):
            Scheduler(tables, SchedulerOptions(preemption="auto"), **known)


def test_tables_that_share_whole_prompts_are_refused():
    tables = PageTables(4, 20, sharing=SharingOptions(leave_last=False))
    with pytest.raises(PagedTQError, match="leave_last=True"):
        Scheduler(tables)
