"""Bad calls of the block manager have their error and change nothing."""

from __future__ import annotations

import numpy as np
import pytest
from served import COMMON, SIZE, admit, manager_of, request_of, state

from pagedtq.errors import ArgumentError, ArgumentTypeError
from pagedtq.paging import PageTables, SharingOptions
from pagedtq.serving import Blocks


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
