"""Which page holds which block: a map from block keys to pages.

A key is opaque bytes of any length: a chained hash of tokens (`BlockHasher`), or whatever an engine
uses at its own granularity. Several pages may hold the same block (two sequences computed it at the
same time): all are kept, the first one is found, and the key lives until the last of them goes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np

from ..errors import ArgumentError, ArgumentTypeError, IntegrityError
from .arguments import MAX_PAGES, Bools, Int32, Int64, integer, integers
from .block_keys import key_list, token_array

#: Up to so many pages a loop is faster than NumPy's calls.
FEW = 16


class PrefixObserver(Protocol):
    """What is told of every change of a `PrefixIndex`."""

    def stored(self, keys: Sequence[bytes], parent: bytes | None, tokens: Int32 | None) -> None:
        """Note that blocks of one sequence were published; ``tokens`` are theirs if known."""
        ...

    def removed(self, key: bytes) -> None:
        """Note that a page that held this block holds it no longer."""
        ...

    def cleared(self) -> None:
        """Note that no page holds any block any more."""
        ...


class PrefixIndex:
    """Keys of the blocks that pages hold, whether the pages have owners or wait to be reused.

    Parameters
    ----------
    num_pages : int
        Pages of the pool, the null page 0 included.

    Attributes
    ----------
    observer : PrefixObserver or None
        Told of every change.
    num_forgotten : int
        How often a page lost the block it held; only grows.
    """

    def __init__(self, num_pages: int) -> None:
        count = integer("num_pages", num_pages, 2, MAX_PAGES)
        self.observer: PrefixObserver | None = None
        self._first: dict[bytes, int] = {}
        # Keys that more than one page holds: those pages, the first one included, in order.
        self._copies: dict[bytes, dict[int, None]] = {}
        self._keys: list[bytes | None] = [None] * count
        self._held = np.zeros(count, np.bool_)
        self._flags = self._held.data
        self._num_held = self.num_forgotten = 0

    def __len__(self) -> int:
        return len(self._first)

    def __contains__(self, key: bytes) -> bool:
        return key in self._first

    @property
    def nbytes(self) -> int:
        """Bytes of the index, its keys included, as ``sys.getsizeof`` counts Python's objects."""
        objects = (self._first, self._copies, self._keys, *self._copies.values())
        return self._held.nbytes + sum(map(sys.getsizeof, (*objects, *self._first)))

    @property
    def num_pages_held(self) -> int:
        """Pages that hold a block; not fewer than there are keys."""
        return self._num_held

    @property
    def held(self) -> Bools:
        """Whether each page holds a block, ``bool[num_pages]``; not to be written."""
        return self._held

    def get(self, key: bytes) -> int:
        """Return the first page that holds a block, 0 without one."""
        return self._first.get(key, 0)

    def holds(self, page: int) -> bool:
        """Return whether a page holds a block."""
        return bool(self._flags[page])

    def key_of(self, page: int) -> bytes | None:
        """Return the key of the block that a page holds, None without one."""
        return self._keys[page]

    def pages_of(self, key: bytes) -> list[int]:
        """Return all pages that hold a block, the first one first."""
        if key in self._copies:
            return list(self._copies[key])
        return [self._first[key]] if key in self._first else []

    def longest(self, keys: Iterable[bytes]) -> list[int]:
        """Return the pages of the leading keys, up to the first that no page holds.

        They end before a key that came before, too: callers may name two blocks alike, but a
        sequence has a page once.
        """
        found, pages = self._first.get, []
        for key in keys:
            page = found(key)
            if page is None:
                break
            pages.append(page)
        if len(set(pages)) < len(pages):
            first = dict(zip(reversed(pages), range(len(pages) - 1, -1, -1)))
            del pages[next(at for at, page in enumerate(pages) if first[page] < at) :]
        return pages

    def publish(
        self,
        keys: Sequence[bytes],
        pages: Sequence[int],
        parent: bytes | None = None,
        tokens: Int32 | None = None,
    ) -> None:
        """Let pages hold blocks of one sequence.

        Parameters
        ----------
        keys, pages : sequence
            Consecutive blocks of a sequence, as many of either; no page holds a block yet.
        parent : bytes, optional
            Key of the block before the first, for the observer.
        tokens : int32[n], optional
            Their tokens, for the observer.

        Raises
        ------
        ArgumentTypeError
            If a key is not bytes, a page no integer or a token none.
        ArgumentError
            If a page is the null page, out of range, given twice, or holds a block already, there
            is not one per key, or a token does not fit int32.
        """
        keys, pages = key_list("keys", keys), integers("pages", pages).tolist()
        self._check(keys, pages)
        if parent is not None and not isinstance(parent, bytes):
            raise ArgumentTypeError(f"parent must be bytes, got {type(parent).__name__}")
        self.enter(keys, pages, parent, None if tokens is None else token_array("tokens", tokens))

    def enter(
        self,
        keys: Sequence[bytes],
        pages: Sequence[int],
        parent: bytes | None = None,
        tokens: Int32 | None = None,
    ) -> None:
        """Do what `publish` does, without a check."""
        if len(keys) == 1:
            self._enter_one(keys[0], pages[0])
            self._held[pages[0]] = True
        else:
            self._enter_many(keys, pages)
        if self.observer is not None and len(keys):
            self.observer.stored(keys, parent, tokens)

    def publish_each(
        self,
        keys: Sequence[bytes],
        pages: Int32 | Int64,
        parents: Sequence[bytes | None] = (),
        tokens: Int32 | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        """Let pages hold one block each of several sequences.

        Pages that hold a block already (a fork published it) are skipped, unless the caller knows
        that all are ``fresh``: none does, and none is given twice. Nothing is checked; ``parents``
        and ``tokens`` (int32[n, P]) are needed only with an observer.
        """
        observer, by_page = self.observer, self._keys
        listed = pages.tolist()
        if observer is None and not fresh:
            fresh = not np.count_nonzero(self._held[pages]) and len(set(listed)) == len(listed)
        if observer is None and fresh:
            self._enter_many(keys, listed)
            return
        for at, (key, page) in enumerate(zip(keys, listed, strict=True)):
            if by_page[page] is None:
                self._enter_one(key, page)
                if observer is not None:
                    observer.stored([key], parents[at], None if tokens is None else tokens[at])
        self._held[pages] = True

    def forget(self, pages: Int32) -> None:
        """Let pages hold nothing; those that hold nothing already are skipped."""
        if not self._num_held:
            return
        if pages.size <= FEW:
            flags = self._flags
            some = [page for page in pages.tolist() if flags[page]]
            if some:
                self.forget_held(np.array(some, np.int32))
            return
        # Counting costs a fraction of picking, and mostly there is nothing to pick.
        held = self._held.take(pages)
        if np.count_nonzero(held):
            self.forget_held(pages[held])

    def forget_held(self, pages: Int32) -> None:
        """Let pages hold nothing; each of them holds a block, each is given once."""
        self._held[pages] = False
        self._num_held -= pages.size
        self.num_forgotten += pages.size
        removed = None if self.observer is None else self.observer.removed
        first, copies, keys = self._first, self._copies, self._keys
        for page in pages.tolist():
            key = keys[page]
            assert key is not None
            keys[page] = None
            if copies and key in copies:
                self._drop_copy(key, page)
            else:
                del first[key]
            if removed is not None:
                removed(key)

    def clear(self) -> None:
        """Let no page hold anything."""
        self.num_forgotten += self._num_held
        self._first.clear()
        self._copies.clear()
        self._keys = [None] * len(self._keys)
        self._held[:] = False
        self._num_held = 0
        if self.observer is not None:
            self.observer.cleared()

    def check_integrity(self) -> None:
        """Prove that keys and pages name each other.

        Raises
        ------
        IntegrityError
            Naming the first broken invariant and where.
        """
        pages = [page for page, key in enumerate(self._keys) if key is not None]
        if pages != np.flatnonzero(self._held).tolist() or len(pages) != self._num_held:
            raise IntegrityError("the pages that hold a block are marked or counted wrongly")
        if 0 in pages:
            raise IntegrityError("the null page holds a block")
        expected: dict[bytes, set[int]] = {}
        for page in pages:
            key = self._keys[page]
            assert key is not None
            expected.setdefault(key, set()).add(page)
        if expected.keys() != self._first.keys():
            raise IntegrityError("the prefix map has other keys than its pages")
        for key, holders in expected.items():
            known = self.pages_of(key)
            if set(known) != holders or known[0] != self._first[key]:
                raise IntegrityError(f"key {key.hex()} is held by {holders}, but finds {known}")
        if any(len(copies) < 2 for copies in self._copies.values()):
            raise IntegrityError("a key with a single page is listed among the copies")

    def _check(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        if len(keys) != len(pages):
            raise ArgumentError(f"expected one page per key, got {len(keys)} and {len(pages)}")
        if len(set(pages)) != len(pages):
            raise ArgumentError("a page to publish is given twice")
        for page in pages:
            if not 0 < page < len(self._keys):
                raise ArgumentError(f"pages must be in [1, {len(self._keys) - 1}], got {page}")
            if self._keys[page] is not None:
                raise ArgumentError(f"page {page} holds a block already")

    def _enter_many(self, keys: Sequence[bytes], pages: Sequence[int]) -> None:
        # `_enter_one` for each, with what it looks up looked up once.
        by_page, held, enter = self._keys, self._flags, self._first.setdefault
        for key, page in zip(keys, pages, strict=True):
            by_page[page] = key
            held[page] = True
            first = enter(key, page)
            if first != page:
                self._copies.setdefault(key, {first: None})[page] = None
        self._num_held += len(keys)

    def _enter_one(self, key: bytes, page: int) -> None:
        """Enter a key; the caller marks the page as held."""
        self._keys[page] = key
        self._num_held += 1
        first = self._first.setdefault(key, page)
        if first != page:
            self._copies.setdefault(key, {first: None})[page] = None

    def _drop_copy(self, key: bytes, page: int) -> None:
        copies = self._copies[key]
        del copies[page]
        self._first[key] = next(iter(copies))
        if len(copies) == 1:
            del self._copies[key]
