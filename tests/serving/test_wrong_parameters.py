"""What schedulers and managers are given, each parameter once with what it is not made for.

As in `tests/paging/test_wrong_types.py`: an error of pagedtq, and nothing has changed.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pagedtq.errors import ArgumentError, PagedTQError
from pagedtq.paging import BlockHasher, PageTables, SharingOptions
from pagedtq.serving import (
    AllBlocksCleared,
    BlockManager,
    Blocks,
    EventLog,
    EventPublisher,
    EventSubscriber,
    GenerationRequest,
    PreemptionCosts,
    Scheduler,
    SchedulerOptions,
    ServedRequest,
    choose_preemption,
)
from tests.table_snapshot import snapshot
from tests.wrong_values import FLOAT, HUGE, INT, LIST, NONE, OBJECT, TEXT, WRONG, cases

ANY = "tcp://127.0.0.1:*"
HASHER = BlockHasher(4)
COSTS = PreemptionCosts(out_rate=1.0, in_rate=1.0, prefill_rate=1.0)


def world():
    """A manager with a request that runs and one that waits; a scheduler with an open step."""
    manager = BlockManager(20, 4, enable_events=True, log_stats=True)
    running = ServedRequest("0", range(10), HASHER)
    manager.allocate_slots(running, 9)
    running.num_computed_tokens = 9
    scheduler = Scheduler(PageTables(4, 30, sharing=SharingOptions(), num_host_pages=8))
    scheduler.add(GenerationRequest(request_id="a", prompt=range(9), max_tokens=4))
    scheduler.schedule()
    scheduler.update([1])
    scheduler.add(GenerationRequest(request_id="b", prompt=range(5), max_tokens=4))
    return SimpleNamespace(
        manager=manager,
        running=running,
        waiting=ServedRequest("1", range(8), HASHER),
        scheduler=scheduler,
        idle=Scheduler(PageTables(4, 30), track_tokens=False),
    )


def everything(w):
    """What a refused call must leave alone."""
    requests = [
        (one.num_tokens, one.num_computed_tokens, list(one.block_hashes), one._tokens.tobytes())
        for one in (w.running, w.waiting)
    ]
    return (
        snapshot(w.manager.tables),
        {name: held.seq_id for name, held in w.manager._holdings.items()},
        list(w.manager._log._events),
        w.manager._stats.requests,
        requests,
        snapshot(w.scheduler.tables),
        (w.scheduler.num_waiting, w.scheduler.num_running, w.scheduler._open is None),
        dict(w.scheduler._numbers),
        snapshot(w.idle.tables),
    )


def but(request, **fields):
    """A request of another class that is like one of ours but for some fields."""
    names = "request_id", "num_tokens", "num_computed_tokens", "block_hashes", "all_token_ids"
    return SimpleNamespace(**{name: getattr(request, name) for name in names} | fields)


def without(request, field):
    other = but(request)
    delattr(other, field)
    return other


def generation(**fields):
    return GenerationRequest(**{"request_id": "c", "prompt": [1, 2], "max_tokens": 4} | fields)


def in_a_step(w):
    """The scheduler with a step open, as it was before the call that is tested."""
    w.scheduler.schedule()
    w.before = everything(w)
    return w.scheduler


#: Verb and parameter: the call, and which of the values above are right for it.
VERBS = {
    "get_computed_blocks request": (lambda w, v: w.manager.get_computed_blocks(v), ()),
    "get_computed_blocks block_hashes": (
        lambda w, v: w.manager.get_computed_blocks(but(w.waiting, block_hashes=v)),
        (),
    ),
    "get_computed_blocks num_tokens": (
        lambda w, v: w.manager.get_computed_blocks(but(w.waiting, num_tokens=v)),
        (INT, HUGE),
    ),
    "allocate_slots request": (lambda w, v: w.manager.allocate_slots(v, 4), ()),
    "allocate_slots request_id": (
        # Any name that can be looked up is one: vLLM's are text, others are numbers.
        lambda w, v: w.manager.allocate_slots(but(w.waiting, request_id=v), 4),
        (NONE, INT, TEXT, FLOAT, OBJECT, HUGE),
    ),
    "allocate_slots num_computed_tokens": (
        lambda w, v: w.manager.allocate_slots(but(w.waiting, num_computed_tokens=v), 4),
        (),
    ),
    "allocate_slots num_tokens": (
        lambda w, v: w.manager.allocate_slots(but(w.waiting, num_tokens=v), 4),
        (INT, HUGE),
    ),
    "allocate_slots block_hashes": (
        lambda w, v: w.manager.allocate_slots(but(w.waiting, block_hashes=v), 4),
        (),
    ),
    "allocate_slots all_token_ids": (
        lambda w, v: w.manager.allocate_slots(but(w.waiting, all_token_ids=v), 4),
        (),
    ),
    "allocate_slots num_new_tokens": (
        lambda w, v: w.manager.allocate_slots(w.running, v),
        (INT, HUGE),
    ),
    "allocate_slots num_new_computed_tokens": (
        lambda w, v: w.manager.allocate_slots(w.waiting, 4, v),
        (NONE,),
    ),
    "allocate_slots new_computed_blocks": (
        lambda w, v: w.manager.allocate_slots(w.waiting, 4, 4, v),
        (),
    ),
    "allocate_slots num_lookahead_tokens": (
        lambda w, v: w.manager.allocate_slots(w.waiting, 4, num_lookahead_tokens=v),
        (NONE, INT, HUGE),
    ),
    "allocate_slots num_external_computed_tokens": (
        lambda w, v: w.manager.allocate_slots(w.waiting, 4, num_external_computed_tokens=v),
        (NONE, INT, HUGE),
    ),
    "allocate_slots reserved_blocks": (
        lambda w, v: w.manager.allocate_slots(w.waiting, 4, reserved_blocks=v),
        (NONE, INT, HUGE),
    ),
    "cache_blocks request": (lambda w, v: w.manager.cache_blocks(v, 4), ()),
    "cache_blocks num_computed_tokens": (
        lambda w, v: w.manager.cache_blocks(w.running, v),
        (INT,),
    ),
    "free request": (lambda w, v: w.manager.free(v), ()),
    "evict_blocks block_ids": (lambda w, v: w.manager.evict_blocks(v), ()),
    "evict_blocks a block": (lambda w, v: w.manager.evict_blocks([v]), (INT,)),
    "sequence_of request_id": (
        lambda w, v: w.manager.sequence_of(v),
        (NONE, INT, TEXT, FLOAT, OBJECT, HUGE),
    ),
    "get_block_ids request_id": (
        lambda w, v: w.manager.get_block_ids(v),
        (NONE, INT, TEXT, FLOAT, OBJECT, HUGE),
    ),
    "get_num_common_prefix_blocks request_id": (
        lambda w, v: w.manager.get_num_common_prefix_blocks(v),
        (NONE, INT, TEXT, FLOAT, OBJECT, HUGE),
    ),
    "append token_ids": (lambda w, v: w.running.append(v), ()),
    "append_token token_id": (lambda w, v: w.running.append_token(v), (INT,)),
    "add request": (lambda w, v: w.scheduler.add(v), ()),
    "add prompt": (lambda w, v: w.scheduler.add(generation(prompt=v)), (INT,)),
    "add stop_token_ids": (lambda w, v: w.scheduler.add(generation(stop_token_ids=v)), ()),
    "add salt": (lambda w, v: w.scheduler.add(generation(salt=v)), ()),
    "add extra_keys": (lambda w, v: w.scheduler.add(generation(extra_keys=v)), (NONE,)),
    "add block_keys": (lambda w, v: w.scheduler.add(generation(block_keys=v)), (NONE,)),
    "abort request_id": (lambda w, v: w.scheduler.abort(v), (TEXT,)),
    "schedule choose_steps": (lambda w, v: w.scheduler.schedule(v), (NONE,)),
    "update tokens": (lambda w, v: in_a_step(w).update(v), ()),
    "update parents": (lambda w, v: in_a_step(w).update([1, 1], v), (NONE,)),
    "swap_done plan": (lambda w, v: w.scheduler.swap_done(v), ()),
    "swap_failed plan": (lambda w, v: w.scheduler.swap_failed(v), ()),
    "swap_bytes plan": (lambda w, v: w.scheduler.swap_bytes(v), ()),
    "pages_ahead num_steps": (lambda w, v: w.scheduler.pages_ahead(v), (INT,)),
}


def _tables():
    return PageTables(4, 20, sharing=SharingOptions())


def _publisher(endpoint=ANY, **options):
    with EventPublisher(endpoint, **options):
        pass


def _subscriber(endpoint="tcp://127.0.0.1:1", **options):
    with EventSubscriber(endpoint, **options):
        pass


def _publish(*arguments):
    with EventPublisher(ANY) as publisher:
        publisher.publish(*arguments)


def _receive(timeout_s):
    with EventSubscriber("tcp://127.0.0.1:1") as subscriber:
        subscriber.receive(timeout_s)


#: Constructors, and functions without a state.
MAKERS = {
    "BlockManager num_blocks": (lambda v: BlockManager(v, 4), (INT,)),
    "BlockManager block_size": (lambda v: BlockManager(20, v), (INT,)),
    "BlockManager num_blocks of tables": (lambda v: BlockManager(v, 4, tables=_tables()), ()),
    "BlockManager max_model_len": (
        lambda v: BlockManager(20, 4, max_model_len=v),
        (NONE, INT, HUGE),
    ),
    "BlockManager watermark": (lambda v: BlockManager(20, 4, watermark=v), ()),
    "BlockManager tables": (lambda v: BlockManager(20, 4, tables=v), (NONE,)),
    "Blocks page_ids": (lambda v: Blocks(v), (LIST,)),
    "ServedRequest request_id": (lambda v: ServedRequest(v, [1], HASHER), (TEXT,)),
    "ServedRequest token_ids": (lambda v: ServedRequest("0", v, HASHER), ()),
    "ServedRequest hasher": (lambda v: ServedRequest("0", [1], v), ()),
    "ServedRequest salt": (lambda v: ServedRequest("0", [1], HASHER, salt=v), ()),
    "ServedRequest extra_keys": (lambda v: ServedRequest("0", [1], HASHER, extra_keys=v), (NONE,)),
    "Scheduler cache": (lambda v: Scheduler(v), ()),
    "Scheduler options": (lambda v: Scheduler(_tables(), v), (NONE,)),
    "Scheduler costs": (lambda v: Scheduler(_tables(), costs=v), (NONE,)),
    "Scheduler page_bytes": (lambda v: Scheduler(_tables(), page_bytes=v), (NONE, INT)),
    "Scheduler window_slot_bytes": (
        lambda v: Scheduler(_tables(), window_slot_bytes=v),
        (NONE, INT),
    ),
    "Scheduler start_swap": (lambda v: Scheduler(_tables(), start_swap=v), (NONE,)),
    "GenerationRequest request_id": (lambda v: generation(request_id=v), (TEXT,)),
    "GenerationRequest max_tokens": (lambda v: generation(max_tokens=v), (INT,)),
    "GenerationRequest num_samples": (lambda v: generation(num_samples=v), (INT,)),
    "GenerationRequest beam_width": (lambda v: generation(beam_width=v), (INT,)),
    "GenerationRequest priority": (lambda v: generation(priority=v), (INT,)),
    "GenerationRequest min_tokens": (lambda v: generation(min_tokens=v), (INT,)),
    "SchedulerOptions step_tokens": (lambda v: SchedulerOptions(step_tokens=v), (INT, HUGE)),
    "SchedulerOptions max_running": (lambda v: SchedulerOptions(max_running=v), (INT, HUGE)),
    "SchedulerOptions watermark": (lambda v: SchedulerOptions(watermark=v), ()),
    "SchedulerOptions admission": (lambda v: SchedulerOptions(admission=v), ()),
    "SchedulerOptions policy": (lambda v: SchedulerOptions(policy=v), ()),
    "SchedulerOptions preemption": (lambda v: SchedulerOptions(preemption=v), ()),
    "PreemptionCosts out_rate": (lambda v: PreemptionCosts(v, 1, 1), (INT, FLOAT)),
    "PreemptionCosts overlap": (lambda v: PreemptionCosts(1, 1, 1, v), ()),
    "PreemptionCosts latency": (lambda v: PreemptionCosts(1, 1, 1, 0, v), (INT, FLOAT)),
    "choose_preemption costs": (lambda v: choose_preemption(v, 1, 1), ()),
    "choose_preemption num_tokens": (lambda v: choose_preemption(COSTS, v, 1), (INT, HUGE)),
    "choose_preemption num_bytes": (lambda v: choose_preemption(COSTS, 1, v), (INT, HUGE)),
    "choose_preemption num_found": (lambda v: choose_preemption(COSTS, 1, 1, num_found=v), ()),
    "EventLog block_size": (lambda v: EventLog(v), (INT,)),
    "EventLog medium": (lambda v: EventLog(4, medium=v), (NONE, TEXT)),
    "EventPublisher endpoint": (lambda v: _publisher(v), ()),
    "EventPublisher replay_endpoint": (lambda v: _publisher(replay_endpoint=v), (NONE,)),
    "EventPublisher topic": (lambda v: _publisher(topic=v), (TEXT,)),
    "EventPublisher num_kept": (lambda v: _publisher(num_kept=v), (INT,)),
    "EventPublisher data_parallel_rank": (
        lambda v: _publisher(data_parallel_rank=v),
        (NONE, INT),
    ),
    "EventPublisher high_water_mark": (lambda v: _publisher(high_water_mark=v), (INT,)),
    "EventPublisher linger_s": (lambda v: _publisher(linger_s=v), (INT, FLOAT)),
    "publish events": (lambda v: _publish(v), ()),
    "publish ts": (lambda v: _publish([AllBlocksCleared()], v), (NONE, INT, FLOAT)),
    "EventSubscriber endpoint": (lambda v: _subscriber(v), ()),
    "EventSubscriber replay_endpoint": (
        # Connected to when something is first fetched.
        lambda v: _subscriber(replay_endpoint=v),
        (NONE, TEXT),
    ),
    "EventSubscriber topic": (lambda v: _subscriber(topic=v), (TEXT,)),
    "EventSubscriber start": (lambda v: _subscriber(start=v), (NONE, INT)),
    "EventSubscriber replay_timeout_s": (
        lambda v: _subscriber(replay_timeout_s=v),
        (INT, FLOAT),
    ),
    "EventSubscriber silence_s": (lambda v: _subscriber(silence_s=v), (INT, FLOAT)),
    "receive timeout_s": (lambda v: _receive(v), (NONE, INT, FLOAT)),
}


@pytest.mark.parametrize(
    ("verb", "wrong"),
    cases(VERBS),
)
def test_a_verb_refuses_what_its_parameter_is_not_made_for(verb, wrong):
    w = world()
    w.before = everything(w)
    with pytest.raises(PagedTQError) as caught:
        VERBS[verb][0](w, WRONG[wrong])
    assert str(caught.value)
    assert w.before == everything(w)
    w.manager.tables.check_integrity()
    w.scheduler.tables.check_integrity()


@pytest.mark.parametrize(
    ("maker", "wrong"),
    cases(MAKERS),
)
def test_nothing_is_made_of_what_its_parameter_is_not_made_for(maker, wrong):
    with pytest.raises(PagedTQError) as caught:
        MAKERS[maker][0](WRONG[wrong])
    assert str(caught.value)


@pytest.mark.parametrize(
    "field", ["request_id", "num_tokens", "num_computed_tokens", "block_hashes"]
)
def test_a_request_that_lacks_an_attribute_is_refused_with_what_it_lacks(field):
    w = world()
    before = everything(w)
    request = without(w.waiting, field)
    with pytest.raises(PagedTQError, match=f"SimpleNamespace has no {field}$"):
        w.manager.allocate_slots(request, 4)
    assert before == everything(w)


@pytest.mark.parametrize("chosen", [None, "a", 1.5, [None], 10**400])
def test_a_number_of_steps_that_is_none_leaves_no_step_open(chosen):
    w = world()
    w.idle.add(GenerationRequest(request_id="a", prompt=5, max_tokens=9))
    w.idle.schedule()
    w.idle.update()
    before = snapshot(w.idle.tables)
    with pytest.raises(PagedTQError):
        w.idle.schedule(lambda most: chosen)
    assert before == snapshot(w.idle.tables)
    assert w.idle.schedule(lambda most: most) is not None


def test_tables_with_an_observer_are_refused_for_events_until_it_leaves():
    tables = _tables()
    first = BlockManager(20, 4, tables=tables, enable_events=True)
    with pytest.raises(ArgumentError, match=r"observer already, EventLog, .* to None before"):
        BlockManager(20, 4, tables=tables, enable_events=True)
    quiet = BlockManager(20, 4, tables=tables)
    quiet.allocate_slots(ServedRequest("0", range(9), HASHER), 9)
    assert quiet.take_events() == []
    assert [len(event.block_hashes) for event in first.take_events()] == [2]
    tables.prefix.observer = None
    second = BlockManager(20, 4, tables=tables, enable_events=True)
    second.reset_prefix_cache()
    assert tables.prefix.observer is second._log
    # Without caching there is nothing to be told of.
    BlockManager(20, 4, tables=tables, enable_caching=False)
