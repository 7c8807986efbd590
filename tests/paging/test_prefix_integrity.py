"""What `check_integrity` says of shared pages: every broken rule is found, and named."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pagedtq.errors import IntegrityError
from pagedtq.paging import PageTables, Retention, SharingOptions
from tests.table_snapshot import snapshot

SIZE = 4
TOKENS = list(range(100, 111))


class World:
    """Tables in which each kind of sequence is open: row 0 has tokens, and so on."""

    def __init__(self) -> None:
        self.tables = tables = PageTables(SIZE, 40, SIZE, 2, 8, SharingOptions(), num_host_pages=20)
        self.retention = Retention(tables)
        # Pages 1 2 3, two blocks published; 4 5, none; 6 7, both, named by the caller.
        self.known = self.filled(11, TOKENS)
        self.unshared = self.filled(8)
        self.named = self.filled(8, block_keys=[b"a", b"b"])
        # Pages 8 9: cached without an owner, the sinks of 8 rest with it.
        tables.close(self.filled(8, range(8)))
        # Rows 3 and 4: on the host with page 10, and on the way there with page 11.
        self.away = self.filled(4, range(20, 24))
        self.leaving = self.filled(4, range(30, 34))
        tables.commit_swap(tables.begin_swap_out([self.away]))
        self.swap = tables.begin_swap_out([self.leaving])

    def filled(self, length: int, tokens=None, **opening) -> int:
        seq_id = self.tables.open(tokens, **opening)
        self.tables.commit(self.tables.reserve([seq_id], length))
        return seq_id


def held_otherwise(key):
    """Let page 1 hold another block, as if it had been published so."""

    def damage(w):
        w.tables.prefix.forget(np.array([1], np.int32))
        w.tables.prefix.publish([key], [1])

    return damage


def pin_nothing(w):
    """Pin a page that holds no block, its owners counted right."""
    w.tables.pool.retain([4])
    w.retention._pinned[4] = True


def rest_while_owned(w):
    """Let the record of a page rest that row 0 owns, but not as its block 0."""
    w.tables.windows.acquire_records([2])
    w.tables.windows._resting[2] = None


def share_a_record(w):
    """Let pages 1 and 4 have the same record, its owners counted right."""
    windows = w.tables.windows
    windows.release_records(np.array([4], np.int32))
    windows._records.retain([0])
    windows._record_of[4] = 0


def hold_on_the_null_page(w):
    prefix = w.tables.prefix
    prefix._keys[0], prefix._held[0], prefix._first[b"n"] = b"n", True, 0
    prefix._num_held += 1


def lose_what_is_due(w):
    w.retention.keep(w.known, 80, seconds=9.0)
    w.tables.close(w.known)
    w.retention._queue._due.clear()


def close_and_keep(w):
    chain = w.tables._chains[0]
    w.tables.close(w.known)
    w.tables._chains[0] = chain


DAMAGE = {
    # what is done: the error
    "a row is closed and its keys are kept": (
        close_and_keep,
        "row 0 is closed, but keys of its blocks are kept",
    ),
    "a page of a sequence without tokens can be found": (
        lambda w: w.tables.prefix.publish([b"x"], [5]),
        "row 1 was opened without tokens, but one of its pages can be found",
    ),
    "more blocks are published than are whole": (
        lambda w: w.tables._published.__setitem__(0, 3),
        "row 0 published more",
    ),
    "more blocks are published than have keys": (
        lambda w: w.tables._chains[0].keys.pop(),
        "row 0 published more",
    ),
    "tokens are known behind the end": (
        lambda w: w.tables._known.__setitem__(0, 12),
        "row 0 knows tokens that it does not have",
    ),
    "a page holds another block": (
        held_otherwise(b"x"),
        "page 1 of row 0 holds another block than 0",
    ),
    "a page holds a block of a named sequence in its place": (
        lambda w: w.tables._chains[2].keys.reverse(),
        "page 6 of row 2 holds another block than 0",
    ),
    "a token in a page is another": (
        lambda w: w.tables._page_tokens.__setitem__((2, 3), 9),
        "row 0 has keys that its tokens do not hash to",
    ),
    "a token in a page of the host is another": (
        lambda w: w.tables._host_tokens.__setitem__((1, 0), 9),
        "row 3 has keys that its tokens do not hash to",
    ),
    "a salt is another": (
        lambda w: w.tables._chains[0].extras.__setitem__(1, b"x"),
        "row 0 has keys that its tokens do not hash to",
    ),
    "a pinned page holds no block": (pin_nothing, "page 4 is pinned, but holds no block"),
    "a page rests that has an owner": (
        rest_while_owned,
        "page 2 rests, but is owned or holds no block",
    ),
    "a page rests that holds no block": (
        lambda w: w.tables.prefix.forget(np.array([8], np.int32)),
        "page 8 rests, but is owned or holds no block",
    ),
    "a page that is no block 0 has a sink record": (
        lambda w: w.tables.windows.acquire_records([2]),
        "page 2 has a sink record or lacks one wrongly",
    ),
    "a page that is block 0 of an owner rests": (
        lambda w: w.tables.windows._resting.__setitem__(1, None),
        "page 1 has a sink record or lacks one wrongly",
    ),
    "the null page holds a block": (hold_on_the_null_page, "the null page holds a block"),
    "a page rests without a record": (
        lambda w: w.tables.windows._resting.__setitem__(7, None),
        "a page without a sink record counts as resting",
    ),
    "a record has two pages": (
        share_a_record,
        "two pages have the same sink record",
    ),
    "sinks have no record": (
        lambda w: w.tables.windows.release_records(np.array([4], np.int32)),
        "row 1 has sinks without a sink record of block 0",
    ),
    "ids in bands are miscounted": (
        lambda w: setattr(w.retention._queue, "_num_banded", 1),
        "the ids in bands of priority are counted or marked wrongly",
    ),
    "a priority would never end": (
        lose_what_is_due,
        "the ids whose priority ends are not those that wait for it",
    ),
    "a page of the host without an owner is a twin": (
        lambda w: w.tables._twins.join(np.array([20], np.int32), np.array([9], np.int32)),
        "a page of the host is a twin, but has no owner",
    ),
    "a swap has ended and its row is marked": (
        lambda w: w.tables._swaps.clear(),
        "the rows that are marked as being swapped are not those of swaps",
    ),
    "a row is on its way without a swap": (
        lambda w: w.tables._away.__setitem__(0, 1),
        "the rows that are marked as being swapped are not those of swaps",
    ),
    "a row is away that is not on the host": (
        lambda w: w.tables._swapped.clear(),
        "the rows that are marked as swapped out are not those on the host",
    ),
    "swapped rows are miscounted": (
        lambda w: setattr(w.tables, "_num_away", 1),
        "the number of swapped rows is wrong: 1",
    ),
    "a row on the host has a page": (
        lambda w: w.tables._table.__setitem__((3, 0), 8),
        "row 3 is swapped out, but has pages or a window slot",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_integrity_finds_damage_to_what_is_shared(name):
    damage, message = DAMAGE[name]
    world = World()
    world.tables.check_integrity()
    before = snapshot(world.tables)
    damage(world)
    assert snapshot(world.tables) != before
    with pytest.raises(IntegrityError, match=re.escape(message)):
        world.tables.check_integrity()


def test_integrity_finds_a_window_slot_without_a_window():
    tables = PageTables(SIZE, 10)
    tables.open()
    tables._slot[0] = 0
    with pytest.raises(IntegrityError, match="row 0 has a window slot, but there is no window"):
        tables.check_integrity()
