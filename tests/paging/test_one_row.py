"""Single sequences: what `lengthen` leaves to others, and what `publish_keys` may name."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from pagedtq.errors import ArgumentError, ArgumentTypeError, OutOfPages, StepError
from pagedtq.paging import PageTables, SharingOptions

P = 4
KEYS = [b"a", b"b", b"c"]


class Told:
    """What an observer is told was published: keys and their parent."""

    def __init__(self):
        self.stored_runs = []

    def stored(self, keys, parent, tokens):
        self.stored_runs.append((list(keys), parent, None if tokens is None else tokens.tolist()))

    def removed(self, key):
        pass

    def cleared(self):
        pass


def tables_of(num_pages=20, **options):
    return PageTables(P, num_pages, sharing=SharingOptions(), **options)


def append(tables, seq_id, count, **options):
    tables.commit(tables.reserve([seq_id], count, **options))


def pages_of(tables, seq_id):
    return [page for page in tables.block_table([seq_id])[0].tolist() if page]


def held(tables):
    return {page: tables.prefix.key_of(page) for page in np.flatnonzero(tables.prefix.held)}


def state(tables):
    chains = {row: list(chain.keys) for row, chain in tables._chains.items()}
    pool, ids = tables.pool, tables._ids.tolist()
    table, fields = tables._table.tolist(), tables._fields.tolist()
    counts = tables.prefix_queries, tables.prefix_hits
    pages = pool.free_ids().tolist(), pool.ref_counts.tolist()
    return held(tables), chains, ids, table, fields, counts, pages, tables.version


def refused(tables, error, message, call):
    before = state(tables)
    with pytest.raises(error, match=message) as caught:
        call()
    assert before == state(tables)
    tables.check_integrity()
    return caught.value


# -- lengthen --------------------------------------------------------------------------------------


def test_inside_its_open_page_a_sequence_grows_without_a_page():
    tables = tables_of()
    seq_id = tables.open()
    assert tables.lengthen(seq_id, 5) == [1, 2]
    version = tables.version
    assert tables.lengthen(seq_id, 8) == []
    assert (tables.length_of(seq_id), pages_of(tables, seq_id)) == (8, [1, 2])
    assert tables.version > version
    assert tables.lengthen(seq_id, 9) == [3]
    assert tables.lengthen(seq_id, 3) == tables.lengthen(seq_id, 9) == []
    assert tables.length_of(seq_id) == 9


@pytest.mark.parametrize(("window", "what"), [(0, "open page"), (P, "open page"), (P, "window")])
@pytest.mark.parametrize("length", [7, 20])
def test_a_sequence_whose_bytes_must_be_copied_first_is_not_lengthened(window, what, length):
    """Only a plan says what to copy: without one the owners would write over each other."""
    options = {"window_tokens": window, "num_window_slots": 3 if window else 0}
    tables = tables_of(**options)
    parent = tables.open()
    tables.lengthen(parent, 4 if what == "window" else 6)
    child = tables.fork(parent)
    for seq_id in (parent, child):
        message = f"sequence {seq_id} shares its .*{what}: append with reserve, whose plan says"
        refused(tables, StepError, message, partial(tables.lengthen, seq_id, length))
    append(tables, child, 1)
    # The last owner writes in place.
    assert tables.lengthen(parent, 7) == ([] if what == "open page" else [3])
    assert pages_of(tables, parent)[0] == pages_of(tables, child)[0]
    assert not set(pages_of(tables, parent)[1:]) & set(pages_of(tables, child)[1:])
    tables.check_integrity()


@pytest.mark.parametrize("window", [0, P])
def test_lengthening_publishes_nothing(window):
    tables = tables_of(window_tokens=window, num_window_slots=3 if window else 0)
    seq_id = tables.open(range(8))
    tables.lengthen(seq_id, 6)
    tables.lengthen(seq_id, 8)
    assert held(tables) == {}
    tables.check_integrity()


def test_a_block_that_is_written_on_can_not_be_found_any_more():
    tables = tables_of()
    seq_id = tables.open(range(8))
    append(tables, seq_id, 8)
    assert sorted(held(tables)) == [1, 2]
    tables.truncate(seq_id, 6)
    assert sorted(held(tables)) == [1, 2]
    assert tables.lengthen(seq_id, 7) == []
    assert sorted(held(tables)) == [1]
    assert tables.num_shared_tokens([*range(8), 9]) == 4
    tables.check_integrity()


def test_a_page_that_is_written_on_is_no_copy_of_the_hosts_any_more():
    """A fork on the host that began with these bytes gets them back, not what came after."""
    tables = tables_of(num_host_pages=8)
    parent = tables.open()
    tables.lengthen(parent, 8)
    child = tables.fork(parent)
    tables.commit_swap(tables.begin_swap_out([child]))
    tables.truncate(parent, 6)
    assert tables.lengthen(parent, 8) == []
    plan = tables.begin_swap_in([child])
    # Page 1 is there as it was; page 2 must be brought.
    assert (plan.num_reused, plan.pages.tolist()) == (1, [3])
    tables.commit_swap(plan)
    assert (pages_of(tables, parent), pages_of(tables, child)) == ([1, 2], [1, 3])
    tables.check_integrity()


@pytest.mark.parametrize("keep_free", [7, 8, 100])
def test_pages_that_must_stay_free_are_not_taken(keep_free):
    tables = tables_of(11)
    seq_id = tables.open()
    tables.lengthen(seq_id, 6)
    error = refused(
        tables, OutOfPages, "need 2 pages", lambda: tables.lengthen(seq_id, 16, keep_free)
    )
    assert (error.need, error.free, error.total) == (2, max(8 - keep_free, 0), 10)
    # Inside the open page none is taken, and six may stay.
    assert tables.lengthen(seq_id, 8, keep_free) == []
    assert tables.lengthen(seq_id, 16, 6) == [3, 4]


@pytest.mark.parametrize(
    ("length", "error"), [(-1, ArgumentError), (1 << 41, ArgumentError), (1.5, ArgumentTypeError)]
)
def test_a_length_is_a_number_of_tokens(length, error):
    tables = tables_of()
    seq_id = tables.open()
    refused(tables, error, "length must be", lambda: tables.lengthen(seq_id, length))


def test_a_sequence_of_an_open_step_is_not_lengthened():
    tables = tables_of()
    seq_id = tables.open()
    plan = tables.reserve([seq_id], 3)
    refused(tables, StepError, "lengthen must wait", lambda: tables.lengthen(seq_id, 4))
    tables.abort(plan)


# -- publish_keys ----------------------------------------------------------------------------------


def named(num_keys, length, **options):
    """Tables and a sequence that was opened with so many keys and has so many tokens."""
    tables = tables_of(**options)
    seq_id = tables.open(block_keys=KEYS[:num_keys])
    tables.lengthen(seq_id, length)
    return tables, seq_id


def test_the_next_blocks_are_published_under_their_names():
    tables, seq_id = named(2, 12)
    assert held(tables) == {}
    tables.publish_keys(seq_id, KEYS[:1])
    tables.publish_keys(seq_id, KEYS[1:])
    assert held(tables) == {1: b"a", 2: b"b", 3: b"c"}
    assert (tables.num_published(seq_id), tables.keys_of(seq_id)) == (3, tuple(KEYS))
    tables.check_integrity()


def test_a_block_that_has_a_name_gets_no_other_one():
    tables, seq_id = named(2, 8)
    for keys in ([b"x"], [b"a", b"x"], [b"b"]):
        refused(
            tables,
            ArgumentError,
            f"sequence {seq_id} was opened with other keys",
            lambda keys=keys: tables.publish_keys(seq_id, keys),
        )
    tables.publish_keys(seq_id, KEYS[:2])


@pytest.mark.parametrize(("length", "num_keys"), [(3, 1), (7, 2), (8, 3), (0, 1)])
def test_a_block_that_is_not_whole_is_not_published(length, num_keys):
    tables, seq_id = named(0, length)
    refused(
        tables,
        ArgumentError,
        f"sequence {seq_id} has {length} tokens, not {num_keys} whole blocks",
        lambda: tables.publish_keys(seq_id, KEYS[:num_keys]),
    )


@pytest.mark.parametrize(
    ("keys", "error"),
    [("a", ArgumentTypeError), (b"a", ArgumentTypeError), ([1], ArgumentTypeError)],
)
def test_names_are_bytes(keys, error):
    tables, seq_id = named(0, 8)
    refused(tables, error, "must be", lambda: tables.publish_keys(seq_id, keys))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (range(7), ArgumentError, "token_ids of 2 blocks must be 8, got 7"),
        ([1.5] * 8, ArgumentTypeError, "token_ids must be integers"),
        ([1 << 31] * 8, ArgumentError, "token_ids must fit int32, got 2147483648"),
    ],
)
def test_tokens_of_named_blocks_are_all_of_theirs(tokens, error, message):
    tables, seq_id = named(0, 8)
    refused(tables, error, message, lambda: tables.publish_keys(seq_id, KEYS[:2], tokens))


@pytest.mark.parametrize("prompt", [None, range(8)])
def test_only_sequences_that_name_their_blocks_publish_names(prompt):
    tables = tables_of()
    seq_id = tables.open(prompt)
    append(tables, seq_id, 8)
    refused(
        tables,
        ArgumentError,
        "not opened with block_keys",
        lambda: tables.publish_keys(seq_id, KEYS),
    )


def test_blocks_around_a_hole_are_announced_apart_and_each_with_its_parent():
    tables = tables_of()
    told = tables.prefix.observer = Told()
    seq_id = tables.open(block_keys=[])
    append(tables, seq_id, 12)
    tables.evict(seq_id, [1])
    tables.publish_keys(seq_id, KEYS, np.arange(12, dtype=np.int32))
    assert told.stored_runs == [([b"a"], None, [0, 1, 2, 3]), ([b"c"], b"b", [8, 9, 10, 11])]
    assert held(tables) == {1: b"a", 3: b"c"}
    tables.check_integrity()


# -- open_on ---------------------------------------------------------------------------------------


def test_a_sequence_begins_on_the_pages_that_were_found():
    tables, seq_id = named(0, 12)
    tables.publish_keys(seq_id, KEYS)
    other = tables.open_on(KEYS[:2], tables.prefix.longest(KEYS[:2]), 11)
    assert (pages_of(tables, other), tables.length_of(other)) == ([1, 2], 8)
    assert (tables.num_published(other), tables.keys_of(other)) == (2, (b"a", b"b"))
    assert (tables.prefix_queries, tables.prefix_hits) == (11, 8)
    # What it goes on with is its own, and has other names.
    assert tables.lengthen(other, 12) == [4]
    tables.publish_keys(other, [b"x"])
    assert held(tables)[4] == b"x"
    tables.check_integrity()


@pytest.mark.parametrize(
    ("keys", "pages", "num_tokens", "error", "message"),
    [
        ([b"a"], [2], None, ArgumentError, "page 2 does not hold block 61"),
        ([b"a", b"b"], [1, 1], None, ArgumentError, "page 1 does not hold block 62"),
        ([b"a"], [0], None, ArgumentError, "page 0 does not hold block"),
        ([b"a"], [20], None, ArgumentError, "page 20 does not hold block"),
        ([b"a"], [-19], None, ArgumentError, "page -19 does not hold block"),
        ([b"a"], [], None, ArgumentError, "one page per key, got 1 and 0"),
        ([b"a"], ["1"], None, ArgumentTypeError, "pages must be integers"),
        ([b"a"], [1.0], None, ArgumentTypeError, "pages must be integers"),
        (["a"], [1], None, ArgumentTypeError, "a block key must be bytes, got str"),
        ([b"a"], [1], "9", ArgumentTypeError, "num_tokens must be an integer, got str"),
        ([b"a"], [1], -9, ArgumentError, "num_tokens must be >= 0, got -9"),
    ],
)
def test_a_page_that_holds_another_block_is_refused(keys, pages, num_tokens, error, message):
    tables, seq_id = named(0, 12)
    tables.publish_keys(seq_id, KEYS)
    refused(tables, error, message, lambda: tables.open_on(keys, pages, num_tokens))


def test_without_sharing_a_sequence_is_opened_on_nothing():
    tables = PageTables(P, 20)
    with pytest.raises(ArgumentError, match="page 1 does not hold block 61"):
        tables.open_on([b"a"], [1])
    seq_id = tables.open_on([], [])
    assert tables.lengthen(seq_id, 5) == [1, 2]
    tables.check_integrity()
