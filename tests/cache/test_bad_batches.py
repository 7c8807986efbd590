"""Batches, sequences and operations on them that are refused."""

from __future__ import annotations

import pytest

from pagedtq import KeepFirstLast
from pagedtq.errors import EvictedError, OutOfPages, OutOfWindowSlots, UnknownSequence
from tests.cache.bad_input import BAD, KIND, P, cases, named, refuses

BATCHES = cases(
    "window",
    ("a batch without counts", BAD, "num_new_tokens", lambda s: s.append(to=[s.short, s.empty])),
    (
        "counts that do not add up",
        BAD,
        "add up to 2 tokens, got 3",
        lambda s: s.append(to=[s.short, s.empty], num_new_tokens=[1, 2]),
    ),
    ("too many counts", BAD, "one entry per", lambda s: s.append(num_new_tokens=[1, 1])),
    (
        "negative counts",
        BAD,
        "got -1",
        lambda s: s.append(to=[s.short, s.empty], num_new_tokens=[3, -1]),
    ),
    ("counts that are floats", KIND, "integers", lambda s: s.append(num_new_tokens=[2.0])),
    ("counts that are strings", KIND, "integers", lambda s: s.append(num_new_tokens=["2"])),
    ("counts that are bools", KIND, "bool", lambda s: s.cache.begin_step([s.short], [True])),
    ("a count that is a bool", KIND, "bool", lambda s: s.cache.begin_step(s.short, True)),
    ("no counts", KIND, "NoneType", lambda s: s.cache.begin_step(s.short, None)),
    ("an absurd count", BAD, "num_new_tokens", lambda s: s.cache.begin_step(s.short, 1 << 50)),
    ("a nested list of counts", KIND, "flat", lambda s: s.cache.begin_step(s.short, [[1], [1, 2]])),
    (
        "a sequence twice",
        BAD,
        "twice",
        lambda s: s.append(to=[s.short, s.short], num_new_tokens=[1, 1]),
    ),
    ("a closed sequence", UnknownSequence, "not open here", lambda s: s.append(to=s.closed)),
    ("a sequence of another cache", UnknownSequence, "another", lambda s: s.append(to=s.foreign)),
    (
        "sequences of two caches",
        UnknownSequence,
        "another cache",
        lambda s: s.append(to=[s.short, s.foreign], num_new_tokens=[1, 1]),
    ),
    ("sequence 0", UnknownSequence, "sequence 0 is", lambda s: s.append(to=0)),
    ("sequence -1", UnknownSequence, "sequence -1 is", lambda s: s.append(to=[-1])),
    ("a float as sequence", KIND, "seq_ids", lambda s: s.append(to=1.5)),
    ("a bool as sequence", KIND, "seq_ids", lambda s: s.append(to=True)),
    ("a string as sequence", KIND, "seq_ids", lambda s: s.append(to="7")),
    ("ids in two dimensions", BAD, "one-dimensional", lambda s: s.append(to=[[s.short]])),
    ("a ragged list of ids", KIND, "flat", lambda s: s.append(to=[[s.short], [1, 2]])),
    (
        "more pages than free",
        OutOfPages,
        "need 6 pages, 5 free of 11",
        lambda s: s.append(*s.tokens(6 * P), to=s.empty),
    ),
    (
        "pages exhausted half-way",
        OutOfPages,
        "need 7 pages, 5 free of 11",
        lambda s: s.append(*s.tokens(7 * P), to=[s.empty, s.short], num_new_tokens=[P, 6 * P]),
    ),
    (
        "window slots exhausted half-way",
        OutOfWindowSlots,
        "need 3 window slots, 1 free of 3",
        lambda s: s.append(*s.tokens(3), to=[s.empty, s.twin, s.other], num_new_tokens=[1, 1, 1]),
    ),
    (
        "window slots exhausted by forks alone",
        OutOfWindowSlots,
        "need 2 window slots, 1 free of 3",
        lambda s: s.cache.begin_step([s.other, s.long, s.empty], [0, 1, 1]),
    ),
)
BATCHES += cases(
    "plain",
    (
        "pages exhausted half-way, without a window",
        OutOfPages,
        "need 7 pages, 5 free of 11",
        lambda s: s.append(*s.tokens(7 * P), to=[s.empty, s.short], num_new_tokens=[P, 6 * P]),
    ),
    (
        "pages exhausted by a copy on write",
        OutOfPages,
        "need 6 pages, 5 free of 11",
        lambda s: s.append(*s.tokens(5 * P), to=s.twin),
    ),
)

TABLES = cases(
    "window",
    ("a negative length", BAD, "length", lambda s: s.cache.truncate(s.long, -1)),
    ("a length beyond the end", BAD, "got 86", lambda s: s.cache.truncate(s.long, 5 * P + 6)),
    ("a float as length", KIND, "length", lambda s: s.cache.truncate(s.long, 2.0)),
    ("a bool as length", KIND, "bool", lambda s: s.cache.truncate(s.long, True)),
    ("no length", KIND, "NoneType", lambda s: s.cache.truncate(s.long, None)),
    (
        "an evicted end",
        EvictedError,
        "block 1 was evicted",
        lambda s: s.cache.truncate(s.long, P + 1),
    ),
    ("truncating a closed one", UnknownSequence, "open", lambda s: s.cache.truncate(s.closed, 0)),
    ("truncating many", KIND, "seq_id", lambda s: s.cache.truncate([s.long], 0)),
    ("forking a closed one", UnknownSequence, "open", lambda s: s.cache.fork(s.closed)),
    ("forking a foreign one", UnknownSequence, "another", lambda s: s.cache.fork(s.foreign)),
    ("forking by name", KIND, "seq_id", lambda s: s.cache.fork("long")),
    ("closing twice", UnknownSequence, "open", lambda s: s.cache.close(s.closed)),
    ("closing one twice at once", BAD, "twice", lambda s: s.cache.close([s.long, s.long])),
    (
        "closing good ones and a foreign one",
        UnknownSequence,
        "another cache",
        lambda s: s.cache.close([s.long, s.short, s.foreign]),
    ),
    ("evicting what the ring holds", BAD, "exact window", lambda s: s.cache.evict(s.long, [4])),
    ("evicting the open block", BAD, "block 5 is open", lambda s: s.cache.evict(s.long, [5])),
    ("evicting a block that is not", BAD, "no block 6", lambda s: s.cache.evict(s.long, [6])),
    ("evicting a negative block", BAD, "no block -1", lambda s: s.cache.evict(s.long, [-1])),
    ("evicting one block twice", BAD, "twice", lambda s: s.cache.evict(s.long, [2, 2])),
    ("evicting again", EvictedError, "block 1", lambda s: s.cache.evict(s.long, [1])),
    ("good blocks and an open one", BAD, "open", lambda s: s.cache.evict(s.long, [0, 2, 5])),
    ("good blocks and an evicted one", EvictedError, "1", lambda s: s.cache.evict(s.long, [0, 1])),
    ("blocks that are floats", KIND, "blocks", lambda s: s.cache.evict(s.long, [0.0])),
    ("blocks that are bools", KIND, "bool", lambda s: s.cache.evict(s.long, [True])),
    ("a block that is no list", KIND, "blocks", lambda s: s.cache.evict(s.long, 0)),
    ("evicting from nothing", UnknownSequence, "open", lambda s: s.cache.evict(s.closed, [0])),
    (
        "a policy on a foreign sequence",
        UnknownSequence,
        "another cache",
        lambda s: s.cache.evict(s.foreign, KeepFirstLast(1, 1)),
    ),
    (
        "keeping fewer than none",
        BAD,
        "first",
        lambda s: s.cache.evict(s.long, KeepFirstLast(-1, 4)),
    ),
    ("keeping half a token", KIND, "last", lambda s: s.cache.evict(s.long, KeepFirstLast(1, 0.5))),
    (
        "a boundary inside the ring",
        BAD,
        "exact window",
        lambda s: s.cache.tables.set_start(s.long, 0, 5 * P),
    ),
    ("a boundary upside down", BAD, "keep", lambda s: s.cache.tables.set_start(s.long, 20, 10)),
    ("the length of a closed one", UnknownSequence, "open", lambda s: s.cache.length(s.closed)),
    ("the state of a foreign one", UnknownSequence, "another", lambda s: s.cache.state(s.foreign)),
)
TABLES += cases(
    "plain",
    ("the open block, without a window", BAD, "is open", lambda s: s.cache.evict(s.long, [5])),
    ("a negative length, without one", BAD, "length", lambda s: s.cache.truncate(s.long, -1)),
)


@pytest.mark.parametrize("case", [*BATCHES, *TABLES], ids=named)
def test_bad_batches_are_refused_by_type_and_change_nothing(case):
    refuses(case)
