"""How much room the block manager finds, takes and refuses; page ids are literal."""

from __future__ import annotations

import pytest
from served import COMMON, SIZE, admit, decode, manager_of, refs, request_of, state


def test_found_blocks_are_not_taken_for_the_request_that_found_them():
    manager = manager_of(3)
    first, other = request_of("0", [0] * SIZE), request_of("1", [1] * SIZE)
    assert admit(manager, first)[1] == [1]
    assert admit(manager, other)[1] == [2]
    manager.free(first)
    manager.free(other)
    second = request_of("2", [0] * (2 * SIZE))
    assert admit(manager, second) == ([1], [2])


def test_without_caching_nothing_is_found_and_a_full_pool_refuses():
    manager = manager_of(5, 4, enable_caching=False)
    first = request_of("0", list(range(10)), 4)
    assert admit(manager, first) == ([], [1, 2, 3])
    manager.free(first)
    second = request_of("1", list(range(16)), 4)
    assert admit(manager, second) == ([], [4, 3, 2, 1])
    assert admit(manager, request_of("2", [1, 2, 3, 4], 4)) == ([], None)


def test_the_null_page_is_never_given():
    manager = manager_of(6)
    assert admit(manager, request_of("0", [1] * (5 * SIZE)))[1] == [1, 2, 3, 4, 5]
    assert refs(manager)[0] == 0


def test_a_failed_allocation_with_found_blocks_changes_no_owner():
    manager = manager_of()
    first = request_of("0", COMMON)
    admit(manager, first)
    second = request_of("1", COMMON + [100] * (3 * SIZE))
    assert admit(manager, second) == ([1, 2, 3], [4, 5, 6])
    manager.free(second)
    third = request_of("2", [200] * (4 * SIZE))
    assert admit(manager, third)[1] == [7, 8, 9, 10]
    # Pages 4 to 6 are free and can be found; four more are not there.
    fourth = request_of("3", COMMON + [100] * (3 * SIZE) + [300] * SIZE)
    found, num_found = manager.get_computed_blocks(fourth)
    assert (found.page_ids, num_found) == ([1, 2, 3, 4, 5, 6], 6 * SIZE)
    before = state(manager)
    assert manager.allocate_slots(fourth, SIZE, num_found, found) is None
    assert before == state(manager)
    assert manager.get_block_ids("3") == ([],)


def test_found_pages_without_an_owner_count_as_taken_but_once():
    manager = manager_of(4)
    first = request_of("0", [1] * (2 * SIZE))
    admit(manager, first)
    manager.free(first)
    second = request_of("1", [1] * (3 * SIZE))
    # Two are found among the three free ones, one is taken.
    assert admit(manager, second) == ([1, 2], [3])


@pytest.mark.parametrize(("new", "lookahead"), [(3, 0), (3, 1), (3, 4), (7, 8), (16, 2)])
def test_lookahead_takes_the_pages_that_more_tokens_would(new, lookahead):
    plain, ahead = manager_of(block_size=4), manager_of(block_size=4)
    long = request_of("0", list(range(new + lookahead)), 4)
    short = request_of("0", list(range(new)), 4)
    expected = plain.allocate_slots(long, new + lookahead)
    given = ahead.allocate_slots(short, new, num_lookahead_tokens=lookahead)
    assert expected == given
    # The room is used before more is taken.
    short.num_computed_tokens = new
    short.append([1] * lookahead)
    if lookahead:
        assert len(ahead.allocate_slots(short, lookahead)) == 0
    ahead.tables.check_integrity()


def test_tokens_from_elsewhere_get_room_behind_those_found():
    manager = manager_of()
    admit(manager, request_of("0", [0] * SIZE))
    request = request_of("1", [0] * (3 * SIZE))
    found, num_found = manager.get_computed_blocks(request)
    new = manager.allocate_slots(request, SIZE, num_found, found, num_external_computed_tokens=SIZE)
    assert (found.page_ids, new.page_ids) == ([1], [2, 3])
    assert manager.get_block_ids("1") == ([1, 2, 3],)


def test_a_watermark_holds_for_new_requests_beside_others_only():
    manager = manager_of(11, watermark=0.2)
    running = request_of("0", [1] * (7 * SIZE))
    admit(manager, running)
    waiting = request_of("1", [2] * (2 * SIZE))
    assert manager.allocate_slots(waiting, 2 * SIZE) is None
    assert manager.allocate_slots(waiting, 2 * SIZE, has_scheduled_reqs=False) is not None
    assert decode(manager, running, [1]) == [10]


def test_reserved_blocks_count_as_taken():
    manager = manager_of()
    request = request_of("0", [1] * (4 * SIZE))
    assert manager.allocate_slots(request, 4 * SIZE, reserved_blocks=7) is None
    assert manager.allocate_slots(request, 4 * SIZE, reserved_blocks=6) is not None


def test_a_request_can_be_refused_until_all_of_it_fits():
    manager = manager_of()
    request = request_of("0", [1] * (11 * SIZE))
    assert manager.allocate_slots(request, SIZE, full_sequence_must_fit=True) is None
    assert manager.allocate_slots(request, SIZE).page_ids == [1]
    limited = manager_of(max_model_len=10 * SIZE)
    assert limited.allocate_slots(request, SIZE, full_sequence_must_fit=True).page_ids == [1]


def test_usage_leaves_out_the_null_page():
    manager = manager_of(11)
    assert manager.usage == 0.0
    admit(manager, request_of("0", [1] * (5 * SIZE)))
    assert manager.usage == 0.5
