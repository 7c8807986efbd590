"""The block manager behaves like vLLM V1's where a scheduler can see it; page ids are literal."""

from __future__ import annotations

import numpy as np
import pytest
from served import COMMON, SIZE, admit, decode, manager_of, request_of

from pagedtq.errors import ArgumentError, ArgumentTypeError
from pagedtq.paging import BlockHasher, PageTables, SharingOptions
from pagedtq.serving import Blocks, ServedRequest


def free_order(manager) -> list[int]:
    return manager.tables.pool.free_ids().tolist()


def refs(manager) -> list[int]:
    return manager.tables.pool.ref_counts.tolist()


def state(manager):
    tables = manager.tables
    return refs(manager), free_order(manager), tables._table.tolist(), len(tables.prefix)


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


def test_usage_leaves_out_the_null_page():
    manager = manager_of(11)
    assert manager.usage == 0.0
    admit(manager, request_of("0", [1] * (5 * SIZE)))
    assert manager.usage == 0.5


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


def test_a_request_hashes_each_block_once_and_with_what_decides_its_bytes():
    hasher = BlockHasher(4)
    request = ServedRequest("0", [1, 2, 3], hasher, salt=b"s", extra_keys={1: b"x"})
    assert request.block_hashes == []
    for tokens in ([4], [5, 6, 7, 8, 9], [10, 11, 12]):
        request.append(tokens)
    tables = PageTables(4, 9, sharing=SharingOptions())
    seq_id = tables.open(list(range(1, 13)), salt=b"s", extra_keys={1: b"x"})
    assert tuple(request.block_hashes) == tables.keys_of(seq_id)
    assert request.all_token_ids.tolist() == list(range(1, 13))
    single = ServedRequest("1", [1], hasher, salt=b"s", extra_keys={1: b"x"})
    for token in range(2, 13):
        single.append_token(token)
    assert single.block_hashes == request.block_hashes
    for bad, error in ((2**31, ArgumentError), (1.0, ArgumentTypeError)):
        with pytest.raises(error, match="token_id"):
            single.append_token(bad)
    assert single.num_tokens == 12


def test_blocks_add_up():
    both = Blocks([1, 2]) + Blocks([3])
    assert both.get_block_ids() == both.blocks == ([1, 2, 3],)
    assert Blocks().get_block_ids(allow_none=True) is None
    assert repr(both) == "Blocks([1, 2, 3])"


def other(**options):
    return request_of("1", [9] * 40, **options)


def with_hashes(*hashes):
    request = other()
    request.block_hashes[:] = hashes
    return request


def with_tokens(*tokens):
    request = other()
    request._tokens = np.array(tokens)
    return request


REFUSED = {
    "no tokens": (
        lambda m, r: m.allocate_slots(r, 0),
        ArgumentError,
        "request 0: no token .* expected num_new_tokens or num_external_computed_tokens >= 1",
    ),
    "negative tokens": (
        lambda m, r: m.allocate_slots(r, -1),
        ArgumentError,
        "request 0: num_new_tokens must be >= 0, got -1",
    ),
    "negative lookahead": (
        lambda m, r: m.allocate_slots(r, 1, num_lookahead_tokens=-2),
        ArgumentError,
        "request 0: num_lookahead_tokens must be >= 0, got -2",
    ),
    "negative tokens from elsewhere": (
        lambda m, r: m.allocate_slots(r, 1, num_external_computed_tokens=-2),
        ArgumentError,
        "request 0: num_external_computed_tokens must be >= 0, got -2",
    ),
    "negative reserve": (
        lambda m, r: m.allocate_slots(r, 1, reserved_blocks=-2),
        ArgumentError,
        "request 0: reserved_blocks must be >= 0, got -2",
    ),
    "a fraction of a token": (
        lambda m, r: m.allocate_slots(r, 1.5),
        ArgumentTypeError,
        "request 0: num_new_tokens must be an integer, got float",
    ),
    "a bool of tokens": (
        lambda m, r: m.allocate_slots(r, True),
        ArgumentTypeError,
        "request 0: num_new_tokens must be an integer, got bool",
    ),
    "found blocks for one that runs": (
        lambda m, r: m.allocate_slots(r, 1, 16, Blocks([1])),
        ArgumentError,
        "request 0 holds blocks already; .* or free it before",
    ),
    "found blocks that are none": (
        lambda m, r: m.allocate_slots(other(), 1, 16, Blocks([1])),
        ArgumentError,
        "request 1: page 1 does not hold block .*; look its blocks up again",
    ),
    "a found block out of range": (
        lambda m, r: m.allocate_slots(other(), 1, 16, Blocks([99])),
        ArgumentError,
        "request 1: page 99 does not hold block",
    ),
    "the null page as a found block": (
        lambda m, r: m.allocate_slots(other(), 1, 16, Blocks([0])),
        ArgumentError,
        "request 1: page 0 does not hold block",
    ),
    "found tokens without their blocks": (
        lambda m, r: m.allocate_slots(other(), 1, 16),
        ArgumentError,
        "request 1: 16 computed tokens were given with 0 blocks of 16 tokens",
    ),
    "hashes that are text": (
        lambda m, r: m.allocate_slots(with_hashes("a", "b"), 40),
        ArgumentTypeError,
        "request 1: block hashes must be bytes, got str",
    ),
    "hashes that are numbers": (
        lambda m, r: m.allocate_slots(with_hashes(b"a", 2), 40),
        ArgumentTypeError,
        "request 1: block hashes must be bytes, got int",
    ),
    "tokens to announce outside int32": (
        lambda m, r: m.allocate_slots(with_tokens(*[1 << 31] * 40), 40),
        ArgumentError,
        "request 1: all_token_ids must fit int32, got 2147483648",
    ),
    "a salt that is text": (
        lambda m, r: other(salt="a"),
        ArgumentTypeError,
        "request 1: salt must be bytes, got str",
    ),
    "an extra key that is text": (
        lambda m, r: other(extra_keys={0: "a"}),
        ArgumentTypeError,
        "request 1: the extra key of block 0 must be bytes, got str",
    ),
    "a prompt outside int32": (
        lambda m, r: request_of("1", [1, -(1 << 31) - 1]),
        ArgumentError,
        "request 1: token_ids must fit int32, got -2147483649",
    ),
    "a prompt of floats": (
        lambda m, r: request_of("1", [1.0]),
        ArgumentTypeError,
        "request 1: token_ids must be integers",
    ),
    "a generated token outside int32": (
        lambda m, r: r.append_token(1 << 31),
        ArgumentError,
        "request 0: token_id must be in",
    ),
    "a negative count to publish": (
        lambda m, r: m.cache_blocks(r, -1),
        ArgumentError,
        "request 0: num_computed_tokens must be >= 0, got -1",
    ),
    "the null page to evict": (
        lambda m, r: m.evict_blocks({0}),
        ArgumentError,
        r"pages must be in \[1, 10\], got 0",
    ),
    "a page to evict that is none": (
        lambda m, r: m.evict_blocks({3, 11}),
        ArgumentError,
        r"pages must be in \[1, 10\], got 11",
    ),
    "half a page to evict": (
        lambda m, r: m.evict_blocks([1.5]),
        ArgumentTypeError,
        "pages must be integers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_call_has_its_error_and_changes_nothing(name):
    call, error, message = REFUSED[name]
    manager = manager_of(enable_events=True)
    request = request_of("0", COMMON)
    admit(manager, request)
    before = state(manager)
    with pytest.raises(error, match=message):
        call(manager, request)
    assert before == state(manager)
    assert (request.num_tokens, len(request.block_hashes)) == (48, 3)
    assert manager.sequence_of("1") is None
    manager.tables.check_integrity()


def test_freeing_a_request_twice_is_freeing_it_once():
    manager = manager_of()
    request = request_of("0", COMMON)
    admit(manager, request)
    manager.free(request)
    before = state(manager)
    manager.free(request)
    manager.free(other())
    assert before == state(manager)
    assert manager.get_block_ids("0") == ([],)


def test_two_requests_of_one_name_are_one():
    manager = manager_of()
    first = request_of("0", COMMON)
    admit(manager, first)
    with pytest.raises(ArgumentError, match="request 0 holds blocks already"):
        admit(manager, request_of("0", [*COMMON, 7]))
    assert manager.get_block_ids("0") == ([1, 2, 3],)


@pytest.mark.parametrize(
    "options",
    [
        {"watermark": 1.0},
        {"max_model_len": 0},
        {"tables": PageTables(SIZE, 11)},
        {"tables": PageTables(SIZE, 11, SIZE, 0, 2, SharingOptions())},
        {"tables": PageTables(SIZE, 12, sharing=SharingOptions())},
    ],
)
def test_a_bad_configuration_is_refused(options):
    with pytest.raises(ArgumentError):
        manager_of(**options)
