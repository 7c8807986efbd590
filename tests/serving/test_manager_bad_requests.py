"""Requests that a manager must not believe: refused by name, with what to do, nothing changed."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from served import COMMON, SIZE, admit, manager_of, request_of

from pagedtq.errors import ArgumentError, ArgumentTypeError, UnsupportedError
from pagedtq.paging import BlockHasher, PageTables, SharingOptions
from pagedtq.serving import BlockManager, Blocks


def everything(manager):
    """All that a refused call must leave alone."""
    tables, prefix = manager.tables, manager.tables.prefix
    held = {name: one.seq_id for name, one in manager._holdings.items()}
    return (
        tables.pool.ref_counts.tolist(),
        tables.pool.free_ids().tolist(),
        tables._fields.tolist(),
        tables._table.tolist(),
        [prefix.key_of(page) for page in range(tables.pool.num_pages)],
        {row: list(chain.keys) for row, chain in tables._chains.items()},
        (tables.version, tables.prefix_queries, tables.prefix_hits),
        held,
        manager._stats,
        list(manager._log._events),
    )


def other(name="1", **fields):
    """A request that holds nothing, with some of its fields replaced."""
    request = request_of(name, [9] * 40)
    for field, value in fields.items():
        setattr(request, field, value)
    return request


def changed(request, **fields):
    for field, value in fields.items():
        setattr(request, field, value)
    return request


TWIN = r"request 0 holds blocks already, as another object of that name; give each request an id"

REFUSED = {
    "another request of a name that runs": (
        lambda m, r: m.allocate_slots(other("0"), 40),
        ArgumentError,
        TWIN,
    ),
    "an equal request of a name that runs": (
        lambda m, r: m.allocate_slots(changed(request_of("0", COMMON), num_computed_tokens=48), 1),
        ArgumentError,
        TWIN,
    ),
    "another request to publish": (
        lambda m, r: m.cache_blocks(request_of("0", COMMON), 48),
        ArgumentError,
        TWIN,
    ),
    "another request to free": (
        lambda m, r: m.free(request_of("0", COMMON)),
        ArgumentError,
        TWIN,
    ),
    "negative computed tokens of a new one": (
        lambda m, r: m.allocate_slots(other(num_computed_tokens=-3), 3),
        ArgumentError,
        "request 1: num_computed_tokens must be >= 0, got -3",
    ),
    "negative computed tokens of one that runs": (
        lambda m, r: m.allocate_slots(changed(r, num_computed_tokens=-3), 60),
        ArgumentError,
        "request 0: num_computed_tokens must be >= 0, got -3",
    ),
    "a fraction of a computed token": (
        lambda m, r: m.allocate_slots(changed(r, num_computed_tokens=1.5), 1),
        ArgumentTypeError,
        "request 0: num_computed_tokens must be an integer, got float",
    ),
    "computed tokens of one that holds nothing": (
        lambda m, r: m.allocate_slots(other(num_computed_tokens=8), 32),
        ArgumentError,
        "request 1 holds no blocks, but has num_computed_tokens 8; set it to 0: .*"
        "num_new_computed_tokens.*num_external_computed_tokens",
    ),
    "computed tokens counted twice": (
        lambda m, r: m.allocate_slots(
            changed(request_of("1", COMMON), num_computed_tokens=32), 16, 32, Blocks([1, 2])
        ),
        ArgumentError,
        "request 1 holds no blocks, but has num_computed_tokens 32",
    ),
    "text as hashes to look up": (
        lambda m, r: m.get_computed_blocks(other(block_hashes=["a", "b"])),
        ArgumentTypeError,
        "request 1: block hashes must be bytes, got str",
    ),
    "numbers as hashes to look up": (
        lambda m, r: m.get_computed_blocks(other(block_hashes=[b"a", 2])),
        ArgumentTypeError,
        "request 1: block hashes must be bytes, got int",
    ),
    "byte arrays as hashes to look up": (
        lambda m, r: m.get_computed_blocks(other(block_hashes=[bytearray(32)])),
        ArgumentTypeError,
        "request 1: block hashes must be bytes, got bytearray",
    ),
    "one hash instead of a list of them": (
        lambda m, r: m.get_computed_blocks(other(block_hashes=b"abcdef")),
        ArgumentTypeError,
        "request 1: block hashes must be bytes, got int",
    ),
    "half a token known": (
        lambda m, r: m.get_computed_blocks(other(num_tokens=40.5)),
        ArgumentTypeError,
        "request 1: num_tokens must be an integer, got float",
    ),
    "a number of tokens as text, all to fit": (
        lambda m, r: m.allocate_slots(other(num_tokens="4"), 1, full_sequence_must_fit=True),
        ArgumentTypeError,
        "request 1: num_tokens must be an integer, got str",
    ),
    "page ids instead of blocks": (
        lambda m, r: m.allocate_slots(request_of("1", COMMON), 32, 16, [1]),
        ArgumentTypeError,
        "request 1: new_computed_blocks must be the Blocks that get_computed_blocks returned, "
        "got list",
    ),
    "page ids that are text": (
        lambda m, r: m.allocate_slots(request_of("1", COMMON), 32, 16, Blocks(["1"])),
        ArgumentTypeError,
        "request 1: page ids of new_computed_blocks must be int, got str",
    ),
    "page ids that are floats": (
        lambda m, r: m.allocate_slots(request_of("1", COMMON), 32, 16, Blocks([1.0])),
        ArgumentTypeError,
        "request 1: page ids of new_computed_blocks must be int, got float",
    ),
    "the page behind the last as a found block": (
        lambda m, r: m.allocate_slots(request_of("1", COMMON), 16, 32, Blocks([1, 11])),
        ArgumentError,
        "request 1: page 11 does not hold block 1, pages are 1 to 10; look its blocks up again",
    ),
    "found blocks with hashes that are text": (
        lambda m, r: m.allocate_slots(other(block_hashes=["a", "b"]), 8, 32, Blocks([1, 2])),
        ArgumentTypeError,
        "request 1: block hashes must be bytes, got str",
    ),
    "more found blocks than hashes": (
        lambda m, r: m.allocate_slots(other(block_hashes=[]), 8, 32, Blocks([1, 2])),
        ArgumentError,
        "request 1: expected one page per key, got 0 and 2; look its blocks up again",
    ),
    "more tokens to publish than there is room for": (
        lambda m, r: m.cache_blocks(r, 49),
        ArgumentError,
        "request 0: num_computed_tokens is 49, but it has room for 48 tokens; allocate slots",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_request_that_is_wrong_is_refused_by_name_and_changes_nothing(name):
    call, error, message = REFUSED[name]
    manager = manager_of(enable_events=True, log_stats=True)
    request = request_of("0", COMMON)
    admit(manager, request)
    before = everything(manager)
    with pytest.raises(error, match=message):
        call(manager, request)
    assert before == everything(manager)
    manager.tables.check_integrity()


def test_a_name_is_free_again_when_its_request_was_freed():
    manager = manager_of()
    first, second = request_of("0", COMMON), request_of("0", [9] * 20)
    admit(manager, first)
    manager.free(first)
    assert admit(manager, second) == ([], [4, 5])
    with pytest.raises(ArgumentError, match=TWIN):
        manager.free(first)
    assert manager.get_block_ids("0") == ([4, 5],)


def test_a_request_may_count_in_integers_of_numpy():
    manager = manager_of()
    request = request_of("0", COMMON)
    admit(manager, request)
    request.append([1] * 17)
    request.num_computed_tokens = np.int64(48)
    assert manager.allocate_slots(request, np.int32(17)) == Blocks([4, 5])


def test_blocks_that_nobody_wrote_cannot_be_found():
    """What a new request claims to have computed lies in no page, so no hash may stand for one."""
    manager = manager_of(block_size=4)
    request = request_of("0", range(12), 4)
    request.num_computed_tokens = 8
    with pytest.raises(ArgumentError, match="set it to 0"):
        manager.allocate_slots(request, 4)
    assert len(manager.tables.prefix) == 0
    request.num_computed_tokens = 0
    # From elsewhere: the caller says that they will be written.
    assert manager.allocate_slots(
        request, 4, num_external_computed_tokens=8, delay_cache_blocks=True
    ) == Blocks([1, 2, 3])
    assert len(manager.tables.prefix) == 0


def test_what_is_published_ends_with_the_longest_length():
    manager = manager_of(block_size=4, max_model_len=10)
    request = request_of("0", range(16), 4)
    assert manager.allocate_slots(request, 16) == Blocks([1, 2, 3])
    assert [manager.tables.prefix.get(key) for key in request.block_hashes] == [1, 2, 0, 0]
    manager.free(request)
    manager.tables.check_integrity()


@pytest.mark.parametrize(
    ("watermark", "error"),
    [
        *((value, ArgumentTypeError) for value in ("a", None, True)),
        *((value, ArgumentError) for value in (float("nan"), -0.1, 1)),
    ],
)
def test_a_watermark_is_a_fraction_of_the_pages(watermark, error):
    with pytest.raises(error, match=r"watermark must be .*\[0, 1\), got"):
        manager_of(watermark=watermark)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (SharingOptions(verify_tokens=True), "verify_tokens=True"),
        (SharingOptions(leave_last=False), "leave_last=False"),
        (SharingOptions(leave_last=False, verify_tokens=True), "verify_tokens=True or leave_last"),
    ],
)
def test_tables_that_promise_what_hashes_cannot_keep_are_refused(options, named):
    """Found by their hashes alone, blocks of other tokens would pass for those asked for."""
    tables = PageTables(SIZE, 11, sharing=options)
    with pytest.raises(UnsupportedError, match=f"does not keep {named}"):
        BlockManager(11, SIZE, tables=tables)
    # Without caching nothing is found, so that nothing is promised.
    manager = BlockManager(11, SIZE, tables=tables, enable_caching=False)
    assert admit(manager, request_of("0", COMMON)) == ([], [1, 2, 3])
    assert admit(manager, request_of("1", COMMON)) == ([], [4, 5, 6])


def test_a_request_need_not_be_ours():
    manager, tokens = manager_of(), np.arange(33)
    keys = BlockHasher(SIZE).chain(tokens)
    fields = {"request_id": 7, "num_tokens": 33, "num_computed_tokens": 0, "block_hashes": keys}
    request = SimpleNamespace(**fields)
    assert admit(manager, request) == ([], [1, 2, 3])
    assert admit(manager, SimpleNamespace(**fields | {"request_id": 8})) == ([1, 2], [4])
    manager.free(request)
    assert manager.get_block_ids(7) == ([],)
