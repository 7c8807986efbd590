"""Which blocks a sequence publishes, and under which keys, after cuts, forks and drafts."""

from __future__ import annotations

import pytest

from pagedtq.errors import ArgumentError
from pagedtq.paging import BlockHasher, PageTables, SharingOptions

SIZE = 4


def tables_of(num_pages=20):
    return PageTables(SIZE, num_pages, sharing=SharingOptions())


def append(tables, seq_id, count, tokens=None, publish_to=None):
    tables.commit(tables.reserve([seq_id], count, tokens), publish_to)


def held(tables):
    """Return the key of every page that holds a block."""
    keys = {page: tables.prefix.key_of(page) for page in range(1, tables.pool.num_pages)}
    return {page: key for page, key in keys.items() if key is not None}


def test_a_draft_that_was_held_back_is_published_where_it_is_when_decoding_goes_on():
    tables, tokens = tables_of(), list(range(50, 63))
    ids = [tables.open([])]
    tables.commit(tables.reserve(ids, 3, tokens[:3]))
    tables.commit(tables.reserve(ids, 1, tokens[3:4]), publish_to=[3])
    assert held(tables) == {}
    for token in tokens[4:12]:
        tables.commit(tables.reserve(ids, 1, [token]))
    keys = BlockHasher(SIZE).chain(tokens[:12])
    assert list(tables.keys_of(ids[0])) == keys
    assert held(tables) == dict(zip((1, 2, 3), keys, strict=True))
    # The second block is not found as anyone's first.
    assert tables.num_shared_tokens(tokens[4:9]) == 0
    assert tables.num_shared_tokens(tokens) == 12
    tables.check_integrity()


def test_blocks_that_a_fork_published_are_not_published_again_with_those_behind_them():
    tables, tokens = tables_of(), list(range(50, 70))
    parent = tables.open([])
    append(tables, parent, 8, tokens[:8], [0])
    child = tables.fork(parent)
    append(tables, parent, 4, tokens[8:12])
    assert tables.num_published(parent) == 3
    append(tables, child, 8, [*tokens[:4], *tokens[12:16]])
    keys = BlockHasher(SIZE).chain([*tokens[:8], *tokens[:4], *tokens[12:16]])
    assert list(tables.keys_of(child)) == keys
    first = BlockHasher(SIZE).chain(tokens[:12])
    assert held(tables) == dict(enumerate([*first, *keys[2:]], 1))
    tables.check_integrity()


def test_names_of_blocks_end_where_their_sequence_was_cut():
    tables = tables_of()
    seq_id = tables.open(block_keys=[b"a", b"b", b"c"])
    append(tables, seq_id, 12)
    tables.truncate(seq_id, 4)
    append(tables, seq_id, 8)
    assert tables.keys_of(seq_id) == (b"a",)
    pages = tables.block_table([seq_id])[0].tolist()
    assert [tables.prefix.key_of(page) for page in pages] == [b"a", None, None]
    assert tables.num_published(seq_id) == 1
    tables.check_integrity()


def test_a_sequence_that_lost_a_block_before_it_was_published_is_not_looked_at_again(monkeypatch):
    tables, looked = tables_of(), []
    seq_id = tables.open([])
    append(tables, seq_id, 12, range(12), [0])
    tables.evict(seq_id, [1])
    publish = tables._publish_blocks

    def counting(*arguments):
        looked.append(arguments)
        publish(*arguments)

    monkeypatch.setattr(tables, "_publish_blocks", counting)
    for at in range(3):
        append(tables, seq_id, 4, range(at, at + 4))
    assert len(looked) == 1
    assert held(tables) == {}
    tables.check_integrity()


def test_a_fork_of_a_named_sequence_publishes_under_names_when_the_other_is_closed():
    tables = tables_of()
    parent = tables.open(block_keys=[b"a", b"b"])
    append(tables, parent, 4)
    child = tables.fork(parent)
    tables.close(parent)
    append(tables, child, 4)
    assert held(tables) == {1: b"a", 2: b"b"}
    assert tables.prefix.longest([b"a", b"b"]) == [1, 2]
    tables.close(child)
    assert tables._num_opaque == 0
    tables.check_integrity()


def test_blocks_are_named_only_when_they_are_whole():
    tables = tables_of()
    seq_id = tables.open(block_keys=[b"a"])
    append(tables, seq_id, 7)
    with pytest.raises(ArgumentError, match=f"sequence {seq_id} has 7 tokens, not 2 whole blocks"):
        tables.publish_keys(seq_id, [b"b"])
    assert held(tables) == {1: b"a"}
    tables.lengthen(seq_id, 8)
    tables.publish_keys(seq_id, [b"b"])
    assert held(tables) == {1: b"a", 2: b"b"}


def test_growing_within_a_page_that_can_be_found_takes_its_block_away():
    tables = tables_of()
    seq_id = tables.open_on([], [])
    tables.lengthen(seq_id, 8)
    tables.publish_keys(seq_id, [b"a", b"b"])
    tables.truncate(seq_id, 6)
    assert held(tables) == {1: b"a", 2: b"b"}
    tables.lengthen(seq_id, 7)
    assert held(tables) == {1: b"a"}
    tables.check_integrity()
