"""Integers as callers give them: what NumPy would wrap or round on the way is refused by name."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from pagedtq.errors import ArgumentError, ArgumentTypeError, TokenRangeError
from pagedtq.paging import BlockHasher, PageTables, SharingOptions
from pagedtq.paging.arguments import integer, integers
from pagedtq.paging.block_keys import token_array
from pagedtq.serving import BlockManager, GenerationRequest, Scheduler, ServedRequest
from tests.table_snapshot import snapshot

#: As int64 it is -5, and as int32 too.
WRAPS = (1 << 64) - 5

#: What is too large, the first value that is, and its place.
TOO_LARGE = {
    "a list of large ones": ([WRAPS] * 4, WRAPS, 0),
    "the first beyond int64": ([1, 1 << 63, 1, 1], 1 << 63, 1),
    "negative and large ones": ([-1, 2, WRAPS, 3], WRAPS, 2),
    "beyond 64 bits": ([1, 2, 3, 1 << 70], 1 << 70, 3),
    "far below 0": ([1, -(1 << 70), 3, 1 << 70], -(1 << 70), 1),
    "an array of unsigned ones": (np.array([1, WRAPS, 2, 3], np.uint64), WRAPS, 1),
    "an array of the standard library": (array("Q", [1, 2, 3, WRAPS]), WRAPS, 3),
    "NumPy's integers": ([np.uint64(WRAPS), np.int64(-1), np.int32(1), 1], WRAPS, 0),
    "a tuple": ((1, 1, 1, WRAPS), WRAPS, 3),
}
NO_INTEGERS = {
    "none": None,
    "one integer": 5,
    "text": "ab",
    "no text": "",
    "bytes": b"ab",
    "no bytes": b"",
    "a set": {1, 2},
    "an empty mapping": {},
    "fractions": [1.5],
    "fractions and large integers": [1.5, 1 << 70],
    "fractions and huge integers": [1.5, 10**400],
    "None among them": [1, None],
    "objects": [object()],
    "a bool": [True, 2],
    "a bool beside a large one": [True, 1 << 70],
    "an array of objects": np.array([1, 2], object),
}


def shared():
    return PageTables(4, 20, sharing=SharingOptions())


@pytest.mark.parametrize("name", TOO_LARGE)
def test_an_integer_beyond_int64_is_named_with_its_place(name):
    values, worst, at = TOO_LARGE[name]
    with pytest.raises(ArgumentError, match=f"^ids must fit int64, got {worst} at {at}$"):
        integers("ids", values)


@pytest.mark.parametrize("name", TOO_LARGE)
def test_a_token_beyond_int64_is_a_token_out_of_range(name):
    values, worst, at = TOO_LARGE[name]
    with pytest.raises(TokenRangeError, match=f"^prompt must fit int32, got {worst} at") as caught:
        token_array("prompt", values)
    assert (caught.value.token, caught.value.index) == (worst, at)


@pytest.mark.parametrize("name", NO_INTEGERS)
@pytest.mark.parametrize("check", [integers, token_array])
def test_what_holds_no_integers_is_of_the_wrong_type(check, name):
    with pytest.raises(ArgumentTypeError, match=r"^slots must be"):
        check("slots", NO_INTEGERS[name])


@pytest.mark.parametrize(
    "values",
    [
        [np.uint64(5), -3],
        (5, -3),
        array("q", [5, -3]),
        np.array([5, -3], np.int8),
        np.array([5, -3]).view(np.recarray),
    ],
)
@pytest.mark.parametrize("check", [integers, token_array])
def test_integers_of_any_width_and_container_are_taken_as_they_are(check, values):
    assert check("ids", values).tolist() == [5, -3]


def test_the_ends_of_int64_and_of_int32_are_inside():
    ends = [-(1 << 63), (1 << 63) - 1]
    assert integers("ids", ends).tolist() == ends
    assert integers("ids", np.array([(1 << 63) - 1], np.uint64)).tolist() == ends[1:]
    ends = [-(1 << 31), (1 << 31) - 1]
    assert token_array("tokens", ends).tolist() == ends


def test_an_integer_too_long_to_be_written_is_refused_all_the_same():
    """Python raises an error of its own when it is to write more than 4300 digits."""
    long = 10**5000
    with pytest.raises(ArgumentError, match="page must be >= 0, got an integer of 16610 bits"):
        integer("page", -long, 0)
    with pytest.raises(ArgumentError, match="got an integer of 16610 bits at 1"):
        integers("ids", [1, long])
    with pytest.raises(TokenRangeError, match="got an integer of 16610 bits at 1"):
        token_array("tokens", [1, long])


@pytest.mark.parametrize("name", TOO_LARGE)
def test_no_call_stores_a_token_that_does_not_fit(name):
    """Each of them would have stored the token -5, and hashed it."""
    tokens, worst, _ = TOO_LARGE[name]
    tables = shared()
    seq = tables.open([])
    manager = BlockManager(20, 4, enable_events=True)
    scheduler = Scheduler(shared())
    scheduler.add(GenerationRequest(request_id="a", prompt=[1, 2, 3], max_tokens=2))
    scheduler.schedule()
    hasher = BlockHasher(4)
    ours = ServedRequest("0", [1], hasher)
    theirs = ServedRequest("1", [1, 2, 3, 4], hasher)
    request = _with_tokens(theirs, tokens)
    for call, within in (
        (lambda: tables.open(tokens), tables),
        (lambda: tables.prepare(tokens), tables),
        (lambda: tables.num_shared_tokens(tokens), tables),
        (lambda: tables.reserve([seq], 4, tokens), tables),
        (lambda: ServedRequest("2", tokens, hasher), tables),
        (lambda: ours.append(tokens), tables),
        (lambda: ours.append_token(worst), tables),
        (lambda: manager.allocate_slots(request, 4), manager.tables),
        (lambda: scheduler.update(tokens), scheduler.tables),
    ):
        before = snapshot(within)
        with pytest.raises(ArgumentError, match=f"got {worst}"):
            call()
        assert before == snapshot(within)
    for fields in ({"prompt": tokens}, {"prompt": [1], "stop_token_ids": tokens}):
        with pytest.raises(ArgumentError, match=f"request 'b': .* got {worst}"):
            scheduler.add(GenerationRequest(request_id="b", max_tokens=1, **fields))
    assert ours.num_tokens == 1
    assert manager.get_block_ids("1") == ([],)


@pytest.mark.parametrize("name", TOO_LARGE)
def test_no_call_takes_a_large_number_for_an_id_a_count_or_a_page(name):
    numbers, _, at = TOO_LARGE[name]
    tables = shared()
    seq = tables.open(range(8))
    tables.commit(tables.reserve([seq], 8))
    before = snapshot(tables)
    for call in (
        lambda: tables.lengths(numbers),
        lambda: tables.close(numbers),
        lambda: tables.reserve([seq], numbers[at : at + 1]),
        lambda: tables.slots_of(seq, numbers),
        lambda: tables.evict(seq, numbers),
        lambda: tables.forget_blocks(numbers),
        lambda: tables.pool.release(numbers),
        lambda: tables.pool.touch(numbers),
        lambda: tables.windows.acquire_records(numbers),
    ):
        with pytest.raises(ArgumentError):
            call()
    tables.check_integrity()
    assert before == snapshot(tables)


def _with_tokens(request, tokens):
    """A request of somebody else's class, whose tokens are as they came."""

    class Foreign:
        request_id, num_tokens, num_computed_tokens = request.request_id, 4, 0
        block_hashes, all_token_ids = request.block_hashes, tokens

    return Foreign()
