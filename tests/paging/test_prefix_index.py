"""The map from block keys to pages."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import ArgumentError, ArgumentTypeError, IntegrityError
from pagedtq.paging import PrefixIndex


def ids(*pages):
    return np.array(pages, np.int32)


def test_keys_of_any_length_find_their_page():
    index = PrefixIndex(8)
    index.publish([b"", b"a" * 40], [3, 5])
    assert (index.get(b""), index.get(b"a" * 40), index.get(b"b")) == (3, 5, 0)
    assert index.key_of(5) == b"a" * 40
    assert b"" in index
    assert len(index) == index.num_pages_held == 2
    index.check_integrity()


def test_the_longest_prefix_ends_at_the_first_key_that_nobody_holds():
    index = PrefixIndex(8)
    index.publish([b"a", b"b", b"d"], [1, 2, 4])
    assert index.longest([b"a", b"b", b"c", b"d"]) == [1, 2]
    assert index.longest([b"x", b"a"]) == []
    assert index.longest([]) == []


def test_the_first_of_several_pages_is_found_and_the_next_one_when_it_goes():
    index = PrefixIndex(8)
    for page in (4, 2, 7):
        index.publish([b"a", b"only %d" % page], [page, page - 1])
    assert index.pages_of(b"a") == [4, 2, 7]
    index.forget(ids(4))
    assert (index.get(b"a"), index.pages_of(b"a")) == (2, [2, 7])
    index.forget(ids(7, 5))
    assert index.pages_of(b"a") == [2]
    index.check_integrity()
    index.forget(ids(2))
    assert b"a" not in index
    assert index.pages_of(b"a") == []
    index.check_integrity()


def test_a_block_that_comes_twice_in_one_sequence_is_held_twice():
    index = PrefixIndex(8)
    index.publish([b"a", b"a", b"b"], [1, 2, 3])
    assert index.pages_of(b"a") == [1, 2]
    index.check_integrity()


def test_forgetting_skips_pages_that_hold_nothing():
    index = PrefixIndex(8)
    index.forget(ids(1, 2))
    index.publish([b"a"], [1])
    index.forget(ids(2, 1, 0))
    assert index.num_pages_held == len(index) == 0


def test_a_cleared_index_starts_anew():
    index = PrefixIndex(8)
    index.publish([b"a", b"b"], [1, 2])
    index.publish([b"a"], [3])
    index.clear()
    assert not index.held.any()
    index.publish([b"a"], [3])
    assert index.pages_of(b"a") == [3]
    index.check_integrity()


@pytest.mark.parametrize(
    ("keys", "pages", "error", "message"),
    [
        ([b"x", b"y"], [2], ArgumentError, "one page per key"),
        ([b"x", b"y"], [2, 2], ArgumentError, "twice"),
        ([b"x", "y"], [2, 3], ArgumentTypeError, "bytes"),
        ([b"x", b"y"], [2, 0], ArgumentError, "got 0"),
        ([b"x", b"y"], [2, 8], ArgumentError, "got 8"),
        ([b"x", b"y"], [2, 1], ArgumentError, "page 1 holds"),
    ],
)
def test_a_bad_publication_changes_nothing(keys, pages, error, message):
    index = PrefixIndex(8)
    index.publish([b"a"], [1])
    with pytest.raises(error, match=message):
        index.publish(keys, pages)
    assert np.flatnonzero(index.held).tolist() == [1]
    assert len(index) == 1
    index.check_integrity()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda index: index._held.__setitem__(5, True), "marked"),
        (lambda index: setattr(index, "_num_held", 9), "counted"),
        (lambda index: index._first.__setitem__(b"z", 4), "other keys"),
        (lambda index: index._first.__setitem__(b"a", 2), "finds"),
        (lambda index: index._copies.__setitem__(b"b", {2: None}), "single page"),
        (lambda index: index._copies[b"a"].pop(3), "finds"),
    ],
)
def test_integrity_finds_a_map_that_disagrees_with_its_pages(damage, message):
    index = PrefixIndex(8)
    index.publish([b"a", b"b"], [1, 2])
    index.publish([b"a"], [3])
    index.check_integrity()
    damage(index)
    with pytest.raises(IntegrityError, match=message):
        index.check_integrity()
