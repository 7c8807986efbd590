"""The block manager beside callers that change its sequences through the tables themselves."""

from __future__ import annotations

import numpy as np
import pytest
from served import admit, manager_of, request_of
from test_manager_bad_requests import everything

from pagedtq.errors import ArgumentError, ArgumentTypeError, StepError
from pagedtq.paging import PageTables, SharingOptions
from pagedtq.serving import GenerationRequest, Scheduler, SchedulerOptions

SIZE = 4
TOKENS = list(range(12))


def running(num_blocks=20, tokens=TOKENS):
    """A manager, and a request that holds pages 1 to 3 and has published them."""
    manager = manager_of(num_blocks, SIZE, enable_events=True)
    request = request_of("a", tokens, SIZE)
    assert admit(manager, request) == ([], [1, 2, 3])
    return manager, request


def found_by_another(manager, tokens):
    """Pages that a new request with these tokens, and one more, would begin with."""
    return list(manager.get_computed_blocks(request_of("b", [*tokens, 99], SIZE))[0].page_ids)


def append(manager, request, tokens):
    request.append(tokens)
    new = manager.allocate_slots(request, len(tokens))
    request.num_computed_tokens += len(tokens)
    manager.tables.check_integrity()
    return list(new.page_ids)


def test_blocks_that_were_cut_away_are_published_in_their_places_when_they_are_computed_again():
    manager, request = running()
    seq_id = manager.sequence_of("a")
    assert manager.tables.truncate(seq_id, 4).tolist() == [3, 2]
    request.num_computed_tokens = 4
    # The request still knows its tokens: two blocks again, and four tokens behind them.
    request.append([50] * 4)
    assert list(manager.allocate_slots(request, 12).page_ids) == [4, 5, 6]
    manager.tables.check_integrity()
    assert manager.tables.keys_of(seq_id) == tuple(request.block_hashes)
    prefix = manager.tables.prefix
    assert [prefix.key_of(page) for page in (1, 4, 5, 6)] == request.block_hashes
    # Those cut away still hold their blocks, and were there first.
    assert found_by_another(manager, [*TOKENS, *[50] * 4]) == [1, 2, 3, 6]


def test_blocks_named_ahead_by_somebody_else_are_published_once():
    manager, request = running()
    seq_id, tables = manager.sequence_of("a"), manager.tables
    request.append([50] * 8)
    tables.extend_keys(seq_id, request.block_hashes[3:4])
    tables.commit(tables.reserve([seq_id], 4))
    request.num_computed_tokens = 16
    assert tables.num_published(seq_id) == 4
    assert list(manager.allocate_slots(request, 4).page_ids) == [5]
    tables.check_integrity()
    assert [tables.prefix.key_of(page) for page in range(1, 6)] == request.block_hashes


def test_blocks_named_otherwise_by_somebody_else_are_refused_before_a_page_is_taken():
    manager, request = running()
    seq_id = manager.sequence_of("a")
    manager.tables.extend_keys(seq_id, [b"another"])
    request.append([50] * 4)
    before = everything(manager)
    for call in (
        lambda: manager.allocate_slots(request, 4),
        lambda: manager.cache_blocks(request, 16),
    ):
        with pytest.raises(ArgumentError, match=r"other keys|has room for 12 tokens"):
            call()
        assert everything(manager) == before


def test_a_block_of_another_request_is_not_written_on():
    manager, request = running()
    other = request_of("b", [*TOKENS, 99], SIZE)
    assert admit(manager, other) == ([1, 2, 3], [4])
    manager.tables.truncate(manager.sequence_of("a"), 10)
    request.num_computed_tokens = 10
    before = everything(manager)
    with pytest.raises(StepError, match=r"request a: sequence \d+ shares its open page"):
        manager.allocate_slots(request, 2)
    assert everything(manager) == before
    # Cut back to whole blocks, it computes the block again beside the other one.
    manager.tables.truncate(manager.sequence_of("a"), 8)
    request.num_computed_tokens = 8
    assert list(manager.allocate_slots(request, 4).page_ids) == [5]
    manager.tables.check_integrity()


PRUNINGS = {
    "evicted": lambda tables, seq_id: tables.evict(seq_id, [0]),
    "hidden": lambda tables, seq_id: tables.set_start(seq_id, 0, 4),
}


@pytest.mark.parametrize("prune", PRUNINGS.values(), ids=PRUNINGS)
@pytest.mark.parametrize("late", [False, True], ids=["at once", "by cache_blocks"])
def test_blocks_computed_after_others_went_are_found_by_nobody(prune, late):
    manager, request = running()
    seq_id = manager.sequence_of("a")
    prune(manager.tables, seq_id)
    request.append([50] * 8)
    manager.allocate_slots(request, 8, delay_cache_blocks=late)
    request.num_computed_tokens = 20
    if late:
        manager.cache_blocks(request, 20)
    manager.tables.check_integrity()
    tables = manager.tables
    assert not tables.prefix.holds(4) and not tables.prefix.holds(5)
    assert tables.keys_of(seq_id) == tuple(request.block_hashes)
    # Pages 2 and 3 were written before; page 1 is still whole, whoever finds it.
    assert found_by_another(manager, [*TOKENS, *[50] * 8]) == [1, 2, 3]
    # What is decoded from here on depends on it, too.
    append(manager, request, [51] * 4)
    assert not tables.prefix.holds(6)
    stored = [event for event in manager.take_events() if hasattr(event, "token_ids")]
    assert [len(event.token_ids) for event in stored] == [12]


def test_what_is_computed_on_a_whole_prefix_again_can_be_found_again():
    manager, request = running()
    seq_id, tables = manager.sequence_of("a"), manager.tables
    tables.set_start(seq_id, 0, 4)
    append(manager, request, [50] * 4)
    tables.set_start(seq_id, 0, 0)
    tables.truncate(seq_id, 12)
    request.num_computed_tokens = 12
    assert list(manager.allocate_slots(request, 4).page_ids) == [5]
    tables.check_integrity()
    assert found_by_another(manager, [*TOKENS, *[50] * 4]) == [1, 2, 3, 5]


def test_named_blocks_behind_pruned_ones_are_counted_but_found_by_nobody():
    tables = PageTables(SIZE, 20, sharing=SharingOptions())
    seq_id = tables.open(block_keys=[])
    tables.lengthen(seq_id, 8)
    tables.publish_keys(seq_id, [b"a", b"b"])
    tables.evict(seq_id, [0])
    tables.lengthen(seq_id, 14)
    tables.publish_keys(seq_id, [b"c"])
    tables.check_integrity()
    assert (tables.num_published(seq_id), tables.keys_of(seq_id)) == (3, (b"a", b"b", b"c"))
    assert b"c" not in tables.prefix and b"b" in tables.prefix


class Foreign:
    """A request of another engine, whose hashes are a tuple."""

    request_id, num_tokens, num_computed_tokens = "x", 8, 0

    def __init__(self, block_hashes, all_token_ids=tuple(range(8))):
        self.block_hashes, self.all_token_ids = block_hashes, all_token_ids


def test_hashes_may_be_any_sequence():
    manager = manager_of(9, SIZE, enable_events=True)
    request = Foreign((b"q", b"r"))
    assert manager.get_computed_blocks(request)[1] == 0
    assert list(manager.allocate_slots(request, 8).page_ids) == [1, 2]
    request.num_tokens, request.num_computed_tokens = 12, 8
    request.block_hashes, request.all_token_ids = (b"q", b"r", b"s"), range(12)
    assert list(manager.allocate_slots(request, 4).page_ids) == [3]
    found, count = manager.get_computed_blocks(Foreign((b"q", b"r")))
    assert (list(found.page_ids), count) == ([1], 4)


@pytest.mark.parametrize(
    ("hashes", "tokens", "error", "message"),
    [
        ((b"q", b"r"), [1, 2, 3], ArgumentError, "all_token_ids ends before the 2 blocks .* got 3"),
        ((b"q", b"r"), None, ArgumentTypeError, "all_token_ids must be a sequence .* NoneType"),
        (None, range(8), ArgumentTypeError, "block_hashes must be a sequence of bytes, got None"),
        (5, range(8), ArgumentTypeError, "block_hashes must be a sequence of bytes, got int"),
    ],
)
def test_a_request_whose_blocks_are_wrong_is_refused_before_a_page_is_taken(
    hashes, tokens, error, message
):
    manager, running_one = running()
    before = everything(manager)
    with pytest.raises(error, match=f"request x: {message}"):
        manager.allocate_slots(Foreign(hashes, tokens), 8)
    assert everything(manager) == before
    # A request that runs already keeps what it has.
    request = Foreign((b"q", b"r"), range(8))
    manager.allocate_slots(request, 4)
    request.num_computed_tokens, request.block_hashes, request.all_token_ids = 4, hashes, tokens
    before = everything(manager)
    with pytest.raises(error, match="request x: "):
        manager.allocate_slots(request, 4)
    assert everything(manager) == before
    assert running_one.request_id in manager._holdings


def test_a_sequence_has_a_page_once_whatever_its_blocks_are_called():
    tables = PageTables(SIZE, 20, sharing=SharingOptions())
    owner = tables.open(block_keys=[b"a", b"b"])
    tables.commit(tables.reserve([owner], 8))
    for names in ([b"a", b"a", b"x"], [b"a", b"b", b"a", b"x"]):
        seq_id = tables.open(block_keys=names)
        assert tables.block_table([seq_id])[0].tolist() == list(range(1, len(names) - 1))
        tables.check_integrity()
        tables.close(seq_id)
    with pytest.raises(ArgumentError, match=r"a sequence has a page once, got pages \[1, 1\]"):
        tables.open_on([b"a", b"a"], [1, 1])
    manager = manager_of(9, SIZE)
    manager.allocate_slots(Foreign([b"q", b"q"]), 8)
    other = Foreign([b"q", b"q", b"q"])
    other.num_tokens, other.request_id = 13, "y"
    found, count = manager.get_computed_blocks(other)
    assert (list(found.page_ids), count) == ([1], 4)
    manager.allocate_slots(other, 9, count, found)
    manager.tables.check_integrity()


def test_a_scheduler_computes_a_block_that_is_named_like_an_earlier_one():
    tables = PageTables(SIZE, 20, sharing=SharingOptions())
    scheduler = Scheduler(tables, SchedulerOptions(watermark=0.0))
    names, computed = [b"x", b"x", b"y"], []
    for request_id in ("a", "b"):
        scheduler.add(
            GenerationRequest(request_id=request_id, prompt=13, block_keys=names, max_tokens=2)
        )
        step = scheduler.schedule()
        computed.append(step.plan.slot_mapping.size)
        scheduler.update(np.full(step.sample_members.size, 7))
        while scheduler.has_work:
            step = scheduler.schedule()
            scheduler.update(np.full(step.sample_members.size, 7))
        tables.check_integrity()
    assert computed == [13, 9]
