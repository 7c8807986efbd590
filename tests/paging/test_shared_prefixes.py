"""Prefix sharing of PageTables: what is found, what is published, and what never is."""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import pytest

from pagedtq.errors import ArgumentError, ArgumentTypeError, StepError, TokenRangeError
from pagedtq.paging import BlockHasher, PageTables, SharingOptions
from tests.table_snapshot import snapshot

P = 4
PROMPT = list(range(100, 110))


def tables_of(num_pages=20, window=0, sinks=0, slots=0, **options) -> PageTables:
    return PageTables(P, num_pages, window, sinks, slots, SharingOptions(**options))


def filled(tables, tokens, *, more=(), **opening) -> int:
    """Open with tokens, append what is left of them and then more."""
    seq_id = tables.open(tokens, **opening)
    rest = len(tokens) - int(tables.lengths([seq_id])[0])
    tables.commit(tables.reserve([seq_id], rest))
    if more:
        append(tables, seq_id, more)
    return seq_id


def append(tables, seq_id, tokens) -> None:
    tables.commit(tables.reserve([seq_id], len(tokens), tokens))


def pages(tables, seq_id) -> list[int]:
    return tables.block_table([seq_id])[0].tolist()


def length(tables, seq_id) -> int:
    return int(tables.lengths([seq_id])[0])


def test_a_sequence_begins_with_the_pages_that_hold_its_first_blocks():
    tables = tables_of()
    first = filled(tables, PROMPT)
    second = tables.open([*PROMPT[:9], 7, 7, 7])
    assert length(tables, second) == 8
    assert pages(tables, second) == pages(tables, first)[:2] == [1, 2]
    assert tables.pool.ref_counts[:4].tolist() == [0, 2, 2, 1]
    tables.check_integrity()


def test_pages_are_found_after_their_owner_closed_until_they_are_taken_again():
    tables = tables_of(num_pages=6)
    first = filled(tables, PROMPT)
    tables.close(first)
    assert tables.num_cached_pages == 2
    assert tables.pool.num_free == 5
    second = tables.open(PROMPT)
    assert pages(tables, second) == [1, 2]
    tables.close(second)
    other = filled(tables, [5] * 13)
    # The page that was freed longest ago goes first: the last block of the prompt.
    assert pages(tables, other) == [4, 5, 3, 2]
    assert tables.num_shared_tokens(PROMPT) == 4
    tables.check_integrity()


def test_the_last_token_of_a_prompt_is_never_found_unless_asked_for():
    for leave_last, expected in ((True, [0, 0, 4, 4, 8]), (False, [0, 4, 4, 8, 8])):
        tables = tables_of(leave_last=leave_last)
        filled(tables, PROMPT)
        found = [tables.num_shared_tokens(PROMPT[:n]) for n in (0, 4, 5, 8, 9)]
        assert found == expected


def test_what_a_step_writes_is_found_only_after_its_commit():
    tables = tables_of()
    first = tables.open(PROMPT)
    plan = tables.reserve([first], 10)
    second = tables.open(PROMPT)
    assert length(tables, second) == 0
    tables.commit(plan)
    assert tables.num_shared_tokens(PROMPT) == 8


def test_an_aborted_step_publishes_nothing_and_can_be_repeated():
    tables = tables_of()
    first = tables.open(PROMPT)
    tables.abort(tables.reserve([first], 10))
    assert len(tables.prefix) == 0
    tables.commit(tables.reserve([first], 10))
    assert tables.num_shared_tokens(PROMPT) == 8
    tables.check_integrity()


def test_blocks_that_hold_drafts_wait_until_they_are_accepted():
    tables = tables_of()
    seq_id = filled(tables, PROMPT)
    plan = tables.reserve([seq_id], 6, [1, 2, 3, 4, 5, 6])
    tables.commit(plan, publish_to=[11])
    assert len(tables.prefix) == 2
    tables.truncate(seq_id, 11)
    append(tables, seq_id, [9])
    assert len(tables.prefix) == 3
    assert tables.num_shared_tokens([*PROMPT, 1, 9, 0]) == 12
    assert tables.num_shared_tokens([*PROMPT, 1, 2, 0]) == 8
    tables.check_integrity()


def test_drafts_that_are_accepted_are_published_by_the_next_commit():
    tables = tables_of()
    seq_id = filled(tables, PROMPT)
    tables.commit(tables.reserve([seq_id], 6, [1, 2, 3, 4, 5, 6]), publish_to=[10])
    append(tables, seq_id, [7])
    assert tables.num_shared_tokens([*PROMPT, 1, 2, 3, 4, 5, 6, 0]) == 16


def test_tokens_behind_the_prompt_are_shared_only_if_they_are_given():
    tables = tables_of()
    silent, telling = tables.open(PROMPT), tables.open(PROMPT, salt=b"x")
    ids = np.array([silent, telling])
    tables.commit(tables.reserve(ids, 10))
    plan = tables.reserve(ids[1:], 2, [1, 2])
    tables.commit(plan)
    tables.commit(tables.reserve(ids[:1], 2))
    assert tables.num_shared_tokens([*PROMPT, 1, 2, 3], salt=b"x") == 12
    append(tables, silent, [3, 4, 5, 6])
    assert len(tables.keys_of(silent)) == 2
    tables.check_integrity()


def test_sequences_without_tokens_are_never_shared():
    tables = tables_of()
    seq_id = tables.open()
    append(tables, seq_id, PROMPT)
    assert len(tables.prefix) == 0
    assert tables.keys_of(seq_id) == ()
    assert tables.num_shared_tokens(PROMPT) == 0


def test_salts_and_extra_keys_keep_sequences_apart_from_their_block_on():
    tables = tables_of()
    filled(tables, PROMPT, salt=b"a", extra_keys={1: b"image"})
    found = tables.num_shared_tokens
    assert found(PROMPT, salt=b"a", extra_keys={1: b"image"}) == 8
    assert found(PROMPT, salt=b"a", extra_keys={1: b"other"}) == 4
    assert found(PROMPT, salt=b"a") == 4
    assert found(PROMPT, salt=b"b", extra_keys={1: b"image"}) == 0
    assert found(PROMPT) == 0
    # Moving a byte between salt and extra key makes another key.
    filled(tables, PROMPT, salt=b"ab", extra_keys={0: b"c"})
    assert found(PROMPT, salt=b"a", extra_keys={0: b"bc"}) == 0


@pytest.mark.parametrize("algorithm", ["sha256", "blake2b"])
def test_keys_are_the_documented_hashes_of_raw_tokens(algorithm):
    def hashed(data):
        if algorithm == "sha256":
            return hashlib.sha256(data).digest()
        return hashlib.blake2b(data, digest_size=32).digest()

    tables = tables_of(algorithm=algorithm)
    tokens = [-1, 0, 1, 2**31 - 1, -(2**31), 5, 6, 7]
    extra = {0: b"adapter", 1: b"image"}
    seq_id = filled(tables, tokens, more=[8, 9, 10, 11], salt=b"tenant", extra_keys=extra)
    root = hashed(b"pagedtq.prefix.1")
    salted = struct.pack("<4iI", *tokens[:4], 6) + b"tenantadapter"
    first = hashed(root + salted)
    second = hashed(first + struct.pack("<4iI", *tokens[4:], 0) + b"image")
    third = hashed(second + struct.pack("<4i", 8, 9, 10, 11))
    assert tables.keys_of(seq_id) == (first, second, third)


def test_no_prefix_is_hashed_twice():
    tables = tables_of(num_pages=200)
    hashed, blocks = tables._hasher._hash, []
    tables._hasher._hash = lambda data: blocks.append(data) or hashed(data)
    seq_id = filled(tables, PROMPT)
    for token in range(90):
        append(tables, seq_id, [token])
    child = tables.fork(seq_id)
    append(tables, child, [1] * 8)
    tables.truncate(child, 60)
    append(tables, child, [2] * 8)
    assert len(blocks) == len(set(blocks)) == 25 + 2 + 2
    tables.check_integrity()


def test_a_published_page_that_was_cut_is_forgotten_when_its_only_owner_writes_on():
    tables = tables_of()
    seq_id = filled(tables, PROMPT)
    tables.truncate(seq_id, 6)
    assert tables.num_shared_tokens(PROMPT) == 8
    append(tables, seq_id, [1])
    assert pages(tables, seq_id) == [1, 2]
    assert tables.num_shared_tokens(PROMPT) == 4
    append(tables, seq_id, [2, 3])
    assert tables.num_shared_tokens([*PROMPT[:6], 1, 2, 3]) == 8
    tables.check_integrity()


def test_a_published_page_that_was_cut_is_copied_if_it_was_found_meanwhile():
    tables = tables_of()
    seq_id = filled(tables, PROMPT)
    tables.truncate(seq_id, 6)
    finder = tables.open(PROMPT)
    plan = tables.reserve([seq_id], 2, [1, 2])
    assert (plan.cow_src.tolist(), plan.copy_src.tolist()) == ([2], [2])
    tables.commit(plan)
    assert pages(tables, finder) == [1, 2]
    assert tables.num_shared_tokens(PROMPT) == 8
    assert tables.num_shared_tokens([*PROMPT[:6], 1, 2, 3]) == 8
    tables.check_integrity()


def test_copies_of_one_block_are_all_kept_and_the_first_one_is_found():
    tables = tables_of()
    first, second = tables.open(PROMPT), tables.open(PROMPT)
    tables.commit(tables.reserve([first, second], 10))
    key = tables.keys_of(first)[0]
    assert tables.prefix.pages_of(key) == [1, 4]
    assert tables.prefix.num_pages_held == 4
    assert tables.forget_blocks([1]) == 1
    assert tables.prefix.get(key) == 4
    assert tables.forget_blocks([4]) == 1
    assert key not in tables.prefix
    tables.check_integrity()


def test_what_is_computed_after_an_eviction_is_never_published():
    tables = tables_of()
    seq_id = filled(tables, PROMPT)
    tables.evict(seq_id, [0])
    child = tables.fork(seq_id)
    append(tables, seq_id, [1, 2, 3])
    append(tables, child, [1, 2, 3])
    assert len(tables.prefix) == 2
    tables.truncate(seq_id, 8)
    append(tables, seq_id, [1, 2, 3, 4])
    assert len(tables.prefix) == 2
    tables.truncate(seq_id, 0)
    append(tables, seq_id, [1, 2, 3, 4])
    assert tables.num_shared_tokens([1, 2, 3, 4, 5]) == 4
    tables.check_integrity()


def test_hidden_positions_taint_like_evicted_ones():
    tables = tables_of()
    seq_id = filled(tables, PROMPT)
    tables.set_start(seq_id, 1, 7)
    # Cut below the length at which it was hidden: what follows is computed without [1, 7) too.
    tables.truncate(seq_id, 9)
    append(tables, seq_id, [1, 2, 3])
    assert len(tables.prefix) == 2
    # Showing them again does not repair what was computed without them.
    tables.set_start(seq_id, 0, 0)
    append(tables, seq_id, [1, 2, 3, 4])
    assert len(tables.prefix) == 2
    tables.truncate(seq_id, 9)
    append(tables, seq_id, [1, 2, 3])
    assert len(tables.prefix) == 3
    tables.check_integrity()


def test_sinks_travel_with_the_page_of_block_0():
    tables = tables_of(window=4, sinks=2, slots=2)
    first = filled(tables, PROMPT)
    record = tables.sink_records([first])[0]
    tables.close(first)
    assert tables.windows.num_records_used == 1
    second = tables.open(PROMPT)
    assert tables.state(second) == (8, 8, 8, 2)
    assert tables.sink_records([second])[0] == record
    tables.check_integrity()


def test_a_record_that_rests_is_given_up_for_a_new_sequence():
    tables = tables_of(window=4, sinks=2, slots=1)
    tables.close(filled(tables, PROMPT))
    other = filled(tables, [1, 2, 3])
    assert tables.state(other).num_sinks == 2
    found = tables.open(PROMPT)
    assert tables.state(found) == (8, 8, 8, 0)
    tables.check_integrity()


def test_without_a_record_left_a_sequence_has_no_sinks_and_goes_on():
    tables = tables_of(window=4, sinks=2, slots=2)
    tables.close(filled(tables, PROMPT))
    holder, writer = tables.open(PROMPT), filled(tables, [1, 2, 3])
    child = tables.fork(writer)
    plan = tables.reserve([child], 1, [4])
    assert plan.sink_copy_src.size == 0
    tables.commit(plan)
    assert tables.state(child).num_sinks == 0
    tables.check_integrity()
    tables.close([writer])
    late = tables.open()
    tables.close([holder])
    tables.commit(tables.reserve([late], 3))
    assert tables.state(late).num_sinks == 2
    tables.check_integrity()


def test_keys_made_by_the_caller_work_like_hashes():
    tables = tables_of()
    first = tables.open(block_keys=[b"a", b"b"])
    tables.commit(tables.reserve([first], 9))
    second = tables.open(block_keys=[b"a", b"x"])
    assert length(tables, second) == 4
    third = tables.open(block_keys=[b"a", b"b", b"c"])
    assert length(tables, third) == 8
    tables.commit(tables.reserve([third], 9))
    assert b"c" in tables.prefix
    tables.extend_keys(third, [b"d"])
    tables.commit(tables.reserve([third], 3))
    assert tables.prefix.get(b"d") == pages(tables, third)[3]
    assert len(tables.prefix) == 4
    tables.check_integrity()


def test_tokens_are_compared_where_keys_collide_if_asked_to():
    for verify, expected in ((False, 8), (True, 4)):
        tables = tables_of(verify_tokens=verify)
        # A hash that does not see the last token of a block.
        tables._hasher._hash = lambda data: hashlib.sha256(data[:-4])
        filled(tables, [1, 2, 3, 4, 5, 6, 7, 8])
        assert tables.num_shared_tokens([1, 2, 3, 4, 5, 6, 7, 0, 0]) == expected


def test_the_cache_is_reset_only_when_no_page_has_an_owner():
    tables = tables_of(window=4, sinks=2, slots=2)
    seq_id = filled(tables, PROMPT)
    assert not tables.reset_prefix_cache()
    assert len(tables.prefix) == 2
    tables.close(seq_id)
    assert tables.reset_prefix_cache()
    assert len(tables.prefix) == 0
    assert tables.windows.num_records_used == 0
    tables.check_integrity()


def test_without_sharing_tokens_are_taken_and_nothing_is_found():
    tables = PageTables(P, 20)
    first = filled(tables, PROMPT, more=[1, 2])
    assert tables.num_shared_tokens(PROMPT) == 0
    assert length(tables, tables.open(PROMPT)) == 0
    assert tables.forget_blocks(pages(tables, first)) == 0
    tables.close(first)
    assert tables.reset_prefix_cache()


REFUSED = {
    "tokens outside int32": (lambda t, s: t.open([2**31]), ArgumentError, "int32"),
    "tokens outside int64": (lambda t, s: t.open([2**70]), TokenRangeError, "int32"),
    "huge unsigned tokens": (
        lambda t, s: t.open(np.array([2**64 - 1], np.uint64)),
        ArgumentError,
        "int32",
    ),
    "tokens of the wrong type": (lambda t, s: t.open([1.5]), ArgumentTypeError, "token_ids"),
    "a salt that is text": (lambda t, s: t.open([1], salt="a"), ArgumentTypeError, "salt"),
    "a salt without tokens": (lambda t, s: t.open(salt=b"a"), ArgumentError, "token_ids"),
    "an extra key that is text": (
        lambda t, s: t.open([1], extra_keys={0: "a"}),
        ArgumentTypeError,
        "block 0",
    ),
    "extra keys in a list": (
        lambda t, s: t.open([1], extra_keys=[b"a"]),
        ArgumentTypeError,
        "extra_keys",
    ),
    "an extra key of block -1": (
        lambda t, s: t.open([1], extra_keys={-1: b"a"}),
        ArgumentError,
        "block",
    ),
    "tokens and keys": (lambda t, s: t.open([1], block_keys=[b"a"]), ArgumentError, "both"),
    "keys and a salt": (
        lambda t, s: t.open(block_keys=[b"a"], salt=b"a"),
        ArgumentError,
        "block_keys",
    ),
    "keys that are numbers": (
        lambda t, s: t.open(block_keys=[1]),
        ArgumentTypeError,
        "bytes",
    ),
    "one key for a list": (lambda t, s: t.open(block_keys=b"ab"), ArgumentTypeError, "sequence"),
    "keys for a sequence with tokens": (
        lambda t, s: t.extend_keys(s, [b"a"]),
        ArgumentError,
        "block_keys",
    ),
    "too few token ids": (lambda t, s: t.reserve([s], 2, [1]), ArgumentError, "expected 2"),
    "other tokens than announced": (
        lambda t, s: t.reserve([s], 2, [103, 0]),
        ArgumentError,
        "opened with",
    ),
    "a page to forget that does not exist": (
        lambda t, s: t.forget_blocks([20]),
        ArgumentError,
        "pages",
    ),
    "the null page to forget": (lambda t, s: t.forget_blocks([0]), ArgumentError, "pages"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_input_has_its_error_and_changes_nothing(name):
    call, error, message = REFUSED[name]
    tables = tables_of()
    seq_id = tables.open(PROMPT)
    tables.commit(tables.reserve([seq_id], 3))

    before = snapshot(tables)
    with pytest.raises(error, match=message):
        call(tables, seq_id)
    assert before == snapshot(tables)
    tables.check_integrity()


def test_a_bad_hash_name_is_refused():
    with pytest.raises(ArgumentError, match="md5"):
        BlockHasher(4, "md5")


def test_publish_to_is_checked_before_the_step_ends():
    tables = tables_of()
    seq_id = tables.open(PROMPT)
    plan = tables.reserve([seq_id], 5)
    with pytest.raises(ArgumentError, match="publish_to"):
        tables.commit(plan, publish_to=[1, 2])
    tables.commit(plan)
    with pytest.raises(StepError):
        tables.commit(plan)


@pytest.mark.parametrize("decoded", [0, 3])
def test_a_token_outside_int32_names_its_sequence_its_place_and_itself(decoded):
    """As the first step, and within a run of steps of one token each."""
    tables = tables_of()
    ids = [tables.open([]), tables.open(), tables.open([])]
    for _ in range(decoded):
        tables.commit(tables.reserve(ids, 1, [1, 2, 3]))
    before = snapshot(tables)
    for tokens, place in (([1, 2, 1 << 31], 2), (np.array([1, -(1 << 40), 1 << 31]), 1)):
        message = f"sequence {ids[place]}: token_ids must fit int32, got {tokens[place]} at {place}"
        with pytest.raises(TokenRangeError, match=message) as caught:
            tables.reserve(ids, 1, tokens)
        assert (caught.value.token, caught.value.index) == (tokens[place], place)
    with pytest.raises(TokenRangeError, match=f"sequence {ids[2]}: .* at 4$"):
        tables.reserve(ids, [4, 0, 3], [1, 2, 3, 4, 1 << 32, 6, 7])
    huge = r"^token_ids must fit int32, got 18446744073709551615 at 3$"
    with pytest.raises(TokenRangeError, match=huge):
        tables.reserve(ids, 1, np.array([1, 2, 3, (1 << 64) - 1], np.uint64))
    assert before == snapshot(tables)
    tables.commit(tables.reserve(ids, 1, [1, 2, 3]))
    tables.check_integrity()
