"""The block manager behaves like vLLM V1's where a scheduler can see it; page ids are literal."""

from __future__ import annotations

import numpy as np
from served import COMMON, SIZE, admit, decode, free_order, manager_of, refs, request_of

from pagedtq.serving import Blocks


def test_prefill_shares_whole_blocks_and_re_uses_freed_ones_in_order():
    manager = manager_of()
    first = request_of("0", COMMON + [3] * 7)
    assert admit(manager, first) == ([], [1, 2, 3, 4])
    prefix = manager.tables.prefix
    assert [prefix.key_of(page) for page in (1, 2, 3)] == first.block_hashes
    assert prefix.key_of(4) is None
    assert refs(manager)[1:5] == [1, 1, 1, 1]

    second = request_of("1", COMMON + [3] * 5)
    assert admit(manager, second) == ([1, 2, 3], [5])
    assert refs(manager)[1:6] == [2, 2, 2, 1, 1]
    assert manager.num_free_blocks == 5

    manager.free(first)
    manager.free(second)
    assert free_order(manager) == [6, 7, 8, 9, 10, 4, 5, 3, 2, 1]

    third = request_of("2", COMMON + [3] * 6)
    assert admit(manager, third) == ([1, 2, 3], [6])
    assert manager.num_free_blocks == 6
    assert not any(refs(manager)[page] for page in free_order(manager))
    manager.free(third)

    fourth = request_of("3", [99] * (SIZE * 10))
    assert admit(manager, fourth) == ([], [7, 8, 9, 10, 4, 5, 6, 3, 2, 1])
    assert manager.num_free_blocks == 0
    assert free_order(manager) == []


def test_a_block_is_published_when_decoding_fills_it():
    manager = manager_of()
    request = request_of("0", COMMON + [3] * 7)
    admit(manager, request)
    prefix = manager.tables.prefix
    assert decode(manager, request, [4] * 4) == []
    assert prefix.key_of(4) is None
    assert decode(manager, request, [5] * 19) == [5]
    assert prefix.key_of(4) == request.block_hashes[3]
    assert prefix.key_of(5) is None


def test_pages_are_evicted_in_the_order_in_which_they_were_freed():
    manager = manager_of()
    first = request_of("0", list(range(5 * SIZE + 7)))
    second = request_of("1", [1000 + at for at in range(3 * SIZE)])
    admit(manager, first)
    admit(manager, second)
    assert manager.num_free_blocks == 1
    manager.free(first)
    manager.free(second)
    assert free_order(manager) == [10, 6, 5, 4, 3, 2, 1, 9, 8, 7]
    third = request_of("2", [*range(2 * SIZE), 5, 5, 5])
    assert admit(manager, third) == ([1, 2], [10])
    assert manager.num_free_blocks == 7


def test_a_page_that_is_re_used_loses_its_block():
    manager = manager_of(2)
    first = request_of("0", [1] * SIZE)
    assert admit(manager, first)[1] == [1]
    assert manager.tables.prefix.key_of(1) == first.block_hashes[0]
    manager.free(first)
    second = request_of("1", [2] * (SIZE - 1))
    assert admit(manager, second) == ([], [1])
    assert manager.tables.prefix.key_of(1) is None


def test_salts_keep_requests_apart():
    manager = manager_of()
    first = request_of("0", COMMON + [3] * 11, salt=b"salt1")
    assert admit(manager, first) == ([], [1, 2, 3, 4])
    same = request_of("1", COMMON + [3] * 11, salt=b"salt1")
    other = request_of("2", COMMON + [4] * 11, salt=b"salt2")
    assert admit(manager, same)[0] == [1, 2, 3]
    assert admit(manager, other)[0] == []


def test_a_request_that_skips_the_lookup_publishes_copies():
    manager = manager_of()
    first = request_of("0", COMMON + [3] * 7)
    admit(manager, first)
    second = request_of("1", COMMON + [3] * 7, skip_reading_prefix_cache=True)
    assert admit(manager, second) == ([], [5, 6, 7, 8])
    prefix = manager.tables.prefix
    assert [prefix.pages_of(key) for key in first.block_hashes] == [[1, 5], [2, 6], [3, 7]]
    assert admit(manager, request_of("2", COMMON + [3] * 2))[0] == [1, 2, 3]


def test_a_block_is_found_until_its_last_copy_is_evicted():
    manager = manager_of()
    first = request_of("0", COMMON)
    second = request_of("1", COMMON, skip_reading_prefix_cache=True)
    admit(manager, first)
    admit(manager, second)
    prefix, key = manager.tables.prefix, first.block_hashes[0]
    manager.evict_blocks({1})
    assert prefix.get(key) == 4
    manager.evict_blocks({4})
    assert key not in prefix
    # The owners keep their pages.
    assert manager.get_block_ids("0") == ([1, 2, 3],)


def test_the_whole_of_a_prompt_is_never_found():
    manager = manager_of()
    admit(manager, request_of("0", COMMON))
    assert manager.get_computed_blocks(request_of("1", COMMON))[1] == 2 * SIZE
    assert manager.get_computed_blocks(request_of("2", [*COMMON, 7]))[1] == 3 * SIZE


def test_the_cache_is_reset_only_while_nobody_holds_a_page():
    manager = manager_of(enable_events=True)
    first = request_of("0", COMMON + [3] * 7)
    admit(manager, first)
    assert not manager.reset_prefix_cache()
    assert len(manager.tables.prefix) == 3
    manager.free(first)
    assert manager.reset_prefix_cache()
    assert len(manager.tables.prefix) == 0
    assert admit(manager, request_of("1", COMMON))[0] == []


def test_drafts_are_not_published():
    manager = manager_of(block_size=4)
    request = request_of("0", list(range(6)), 4)
    # Two drafts that would fill the second block.
    manager.allocate_slots(request, 8)
    assert len(manager.tables.prefix) == 1
    request.append([6, 7])
    manager.cache_blocks(request, 8)
    assert len(manager.tables.prefix) == 2


def test_delayed_blocks_are_published_when_the_caller_says_so():
    manager = manager_of()
    request = request_of("0", COMMON + [3] * 7)
    assert manager.allocate_slots(request, 55, delay_cache_blocks=True) == Blocks([1, 2, 3, 4])
    assert len(manager.tables.prefix) == 0
    manager.cache_blocks(request, 40)
    assert len(manager.tables.prefix) == 2
    manager.cache_blocks(request, 55)
    assert len(manager.tables.prefix) == 3
    manager.tables.check_integrity()


def test_common_prefix_blocks_are_those_that_every_request_holds():
    manager = manager_of(20)
    first = request_of("0", COMMON + [3] * 7)
    second = request_of("1", COMMON + [4] * 7)
    admit(manager, first)
    assert manager.get_num_common_prefix_blocks("0") == [4]
    admit(manager, second)
    assert manager.get_num_common_prefix_blocks("0") == [3]
    admit(manager, request_of("2", [9] * 20))
    assert manager.get_num_common_prefix_blocks("1") == [0]


def test_lookups_are_counted_if_asked_for():
    manager = manager_of(log_stats=True)
    admit(manager, request_of("0", COMMON))
    admit(manager, request_of("1", COMMON))
    stats = manager.make_prefix_cache_stats()
    assert (stats.requests, stats.queries, stats.hits) == (2, 96, 32)
    assert manager.make_prefix_cache_stats().requests == 0
    assert manager_of().make_prefix_cache_stats() is None


def test_requests_can_be_stepped_by_the_batched_calls_as_well():
    manager = manager_of(40)
    requests = [request_of(str(i), COMMON + [i] * (i + 1)) for i in range(3)]
    for request in requests:
        admit(manager, request)
    ids = np.array([manager.sequence_of(request.request_id) for request in requests])
    for _ in range(SIZE):
        manager.tables.commit(manager.tables.reserve(ids, 1))
    manager.tables.check_integrity()
    for request in requests:
        request.append([7] * SIZE)
        request.num_computed_tokens = request.num_tokens
        manager.cache_blocks(request, request.num_tokens)
        assert len(manager.get_blocks(request.request_id)) == 5
    assert manager.get_computed_blocks(request_of("9", [*COMMON, 2, 2, 2, *[7] * 14]))[1] == 64
    for request in requests:
        manager.free(request)
    manager.tables.check_integrity()
    assert manager.usage == 0.0


def test_a_request_can_be_freed_before_it_holds_anything_and_come_back():
    manager = manager_of()
    request = request_of("0", COMMON + [3] * 7)
    manager.free(request)
    admit(manager, request)
    manager.free(request)
    request.num_computed_tokens = 0
    assert admit(manager, request) == ([1, 2, 3], [5])
    assert manager.sequence_of("1") is None
