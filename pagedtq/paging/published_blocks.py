"""Publication of blocks: which ones a step completes, and under which keys they are found."""

from __future__ import annotations

from itertools import compress
from typing import NamedTuple

import numpy as np

from ..errors import ArgumentError, TokenRangeError
from .arguments import Bools, Int32, Int64, ranges
from .block_chain import NO_TOKENS, BlockChain, Tokens
from .block_keys import token_array
from .shared_prefixes import SharedPrefixes
from .step_plan import NO_IDS


class StepTokens(NamedTuple):
    """Token ids of one step: members that have them (None for all), counts, and the ids."""

    members: Int64 | None
    counts: Int64
    tokens: Int32


class PublishedBlocks(SharedPrefixes):
    """What appending, cutting and pruning mean for the blocks that others can find."""

    def _step_tokens(
        self, rows: Int64, length: Int64, num_new: Int64, token_ids: Tokens | None
    ) -> StepTokens:
        """Return the token ids of a step that are known; refuse wrong ones."""
        members, prompts = (self._prompt_end.take(rows) > length).nonzero()[0], []
        if members.size:
            members = members[num_new[members] > 0]
        if members.size:
            prompts = [
                self._chains[row].prompt[at : at + n]
                for row, at, n in zip(
                    rows[members].tolist(),
                    length[members].tolist(),
                    num_new[members].tolist(),
                    strict=True,
                )
            ]
        if token_ids is None:
            counts = np.array([prompt.size for prompt in prompts], np.int64)
            return StepTokens(members, counts, np.concatenate([*prompts, NO_TOKENS]))
        total = int(np.add.reduce(num_new))
        try:
            tokens = token_array("token_ids", token_ids)
        except TokenRangeError as error:
            if error.index >= total:
                raise
            of = int(np.searchsorted(np.cumsum(num_new), error.index, side="right"))
            error.args = (f"sequence {int(self._ids[rows[of]])}: {error}",)
            raise
        if tokens.size != total:
            raise ArgumentError(
                f"token_ids must have one entry per new token: expected {total}, got {tokens.size}"
            )
        if prompts:
            self._check_announced(rows, length, num_new, tokens, members, prompts)
        return StepTokens(None, num_new, tokens)

    def _check_announced(
        self,
        rows: Int64,
        length: Int64,
        num_new: Int64,
        tokens: Int32,
        members: Int64,
        prompts: list[Int32],
    ) -> None:
        """Refuse tokens that differ from those their sequences were opened with."""
        first = (np.cumsum(num_new) - num_new)[members]
        for member, at, prompt in zip(members.tolist(), first.tolist(), prompts, strict=True):
            if not np.array_equal(tokens[at : at + prompt.size], prompt):
                raise ArgumentError(
                    f"sequence {int(self._ids[rows[member]])}: token_ids differ from those it was "
                    f"opened with, at or behind position {int(length[member])}"
                )

    def _note_writes(self, rows: Int64, length: Int64, num_new: Int64, step: StepTokens) -> None:
        """Let open pages that are written on forget their blocks, and take the new token ids."""
        assert self.prefix is not None
        size = self.page_size
        members, counts, tokens = step
        if tokens.size == rows.size and members is None and np.count_nonzero(counts) == counts.size:
            # One token each, as in decoding. (As many tokens as members, none without.)
            blocks = length // self._size
            pages = self._table[rows, blocks]
            self.prefix.forget(pages)
            self._slot_tokens[pages * self._size + (length - blocks * self._size)] = tokens
            known = self._known.take(rows)
            self._known[rows] = known + (known == length)
            return
        blocks = length // size
        inside = np.flatnonzero((blocks * size < length) & (num_new > 0))
        self.prefix.forget(self._table[rows[inside], blocks[inside]])
        if not tokens.size:
            return
        if members is not None:
            rows, length = rows[members], length[members]
        into = np.repeat(np.arange(rows.size), counts)
        positions = length[into] + ranges(counts)
        blocks = positions // size
        self._page_tokens[self._table[rows[into], blocks], positions - blocks * size] = tokens
        known = self._known[rows]
        self._known[rows] = np.where(known == length, known + counts, known)

    def _take(
        self, num_pages: int, num_slots: int = 0, num_records: int = 0, kept: Int32 = NO_IDS
    ) -> tuple[Int32, Int32, Int32]:
        """Take pages, window slots and sink records: all of them, or nothing if one call fails.

        Whatever was known of the pages' bytes is forgotten. There may be fewer records; those of
        pages in ``kept`` stay with them.
        """
        pages = self.pool.acquire(num_pages)
        slots = records = NO_IDS
        if num_slots or num_records:
            try:
                slots = self.windows.acquire(num_slots)
                records = self.windows.take_records(num_records, pages, kept)
            except BaseException:
                self.windows.put_back(slots)
                self.pool.put_back(pages)
                raise
        if self._twins.count:
            self._twins.part(pages)
        if self.prefix is not None:
            self._forget(pages)
        return pages, slots, records

    def _part_written(self, rows: Int64, length: Int64, num_new: Int64) -> None:
        """Part open pages that are written on from their twins on the host."""
        blocks = length // self.page_size
        inside = np.flatnonzero((blocks * self.page_size < length) & (num_new > 0))
        self._twins.part(np.unique(self._table[rows[inside], blocks[inside]]))

    def _forget(self, pages: Int32) -> None:
        """Let pages that were just taken forget what they held."""
        assert self.prefix is not None
        self.prefix.forget(pages)
        if self.num_sinks and pages.size:
            self.windows.release_records(pages)

    def _publish(self, rows: Int64, upto: Int64 | None = None) -> None:
        """Publish the blocks of rows that are complete, of positions below ``upto`` only."""
        if self.prefix is None:
            return
        limit = self._known.take(rows)
        if self._num_opaque:
            limit = np.maximum(limit, np.minimum(self._keyed[rows], self._length[rows]))
        # With a window too: all codes of whole blocks are in their pages.
        if upto is not None:
            limit = np.minimum(limit, upto)
        taint = self._taint.take(rows)
        if np.count_nonzero(taint):
            limit = np.where(taint > 0, np.minimum(limit, taint), limit)
        complete = limit // self._size
        done = self._published.take(rows)
        due = (complete > done).nonzero()[0]
        if due.size == 0:
            return
        rows, complete, done = rows[due], complete[due], done[due]
        self._published[rows] = complete
        pages = self._table[rows, done]
        chains = [self._chains[row] for row in rows.tolist()]
        keys = [chain.keys for chain in chains]
        # One block is due, and its key depends on nothing but its tokens.
        chosen = (complete == done + 1) & (pages > 0)
        chosen &= np.array([*map(len, keys)]) == done
        for at in [at for at, chain in enumerate(chains) if chain.extras]:
            chosen[at] &= int(done[at]) not in chains[at].extras
        if np.count_nonzero(chosen) == chosen.size:
            self._publish_next_blocks(keys, pages)
            return
        self._publish_next_blocks(list(compress(keys, chosen.tolist())), pages[chosen])
        rows, done, complete = rows[~chosen], done[~chosen], complete[~chosen]
        for row, first, stop in zip(rows.tolist(), done.tolist(), complete.tolist(), strict=True):
            self._publish_blocks(row, first, stop)

    def _publish_next_blocks(
        self, chains: list[list[bytes]], pages: Int32 | Int64, *, fresh: bool = False
    ) -> None:
        """Hash and publish one further block of each sequence, all at once; given are their keys.

        No two of them have the same list of keys. ``fresh`` is as in `PrefixIndex.publish_each`.
        """
        assert self.prefix is not None
        keys = self._hasher.extend(chains, self._page_blocks[pages].tolist())
        if self.prefix.observer is None:
            self.prefix.publish_each(keys, pages, fresh=fresh)
            return
        parents = [own[-2] if len(own) > 1 else None for own in chains]
        self.prefix.publish_each(keys, pages, parents, self._page_tokens[pages])

    def _publish_blocks(self, row: int, first: int, stop: int, tokens: Int32 | None = None) -> None:
        """Publish blocks ``[first, stop)`` of one row; extend its chain of keys as needed."""
        if self.prefix is None:
            return
        chain = self._chains[row]
        have = len(chain.keys)
        if chain.opaque and stop == first + 1 <= have:
            # One block with a name, as decoding request by request fills them.
            page = self._table.item(row, first)
            if page and not self.prefix.holds(page):
                parent = chain.keys[first - 1] if first else None
                self.prefix.enter(chain.keys[first:stop], (page,), parent, tokens)
            return
        pages = self._table[row, first:stop]
        if have < stop:
            unnamed = self._table[row, have:stop]
            if not unnamed.all():
                # A block went before it was published: the chain ends here for good.
                self._known[row] = have * self.page_size
                self._published[row] = stop = max(first, have)
                if stop <= first:
                    return
                pages = self._table[row, first:stop]
            else:
                parent = chain.keys[-1] if have else None
                known = self._page_tokens[unnamed].ravel()
                chain.keys += self._hasher.chain(known, parent, chain.extras, have)
        by_block: Int32 | None = None if chain.opaque else self._page_tokens[pages]
        if tokens is not None:
            by_block = tokens.reshape(pages.size, self.page_size)
        held = self.prefix.held.take(pages)
        if np.count_nonzero(held) or np.count_nonzero(pages) < pages.size:
            # Pages that hold their block already were published by a fork; evicted ones are gone.
            self._enter_runs(chain, first, pages, (pages > 0) & ~held, by_block)
            return
        keys = chain.keys[first:stop] if first or stop < len(chain.keys) else chain.keys
        parent = chain.keys[first - 1] if first else None
        self.prefix.enter(
            keys, pages.tolist(), parent, None if by_block is None else by_block.ravel()
        )

    def _enter_runs(
        self, chain: BlockChain, first: int, pages: Int32, fit: Bools, by_block: Int32 | None
    ) -> None:
        """Publish the blocks from ``first`` on that fit: one announcement per run of them."""
        assert self.prefix is not None
        fresh = np.flatnonzero(fit)
        runs = np.split(fresh, np.flatnonzero(np.diff(fresh) > 1) + 1)
        for run in runs:
            if run.size:
                at = first + int(run[0])
                self.prefix.enter(
                    chain.keys[at : at + run.size],
                    pages[run].tolist(),
                    chain.keys[at - 1] if at else None,
                    None if by_block is None else by_block[run].ravel(),
                )

    def _taint_rows(self, rows: Int64) -> None:
        """Note that what these rows append from now on depends on what was pruned."""
        taint = self._taint[rows]
        self._taint[rows] = np.where(taint > 0, taint, self._length[rows])

    def _cut(self, rows: Int64, lengths: Int64) -> Int32:
        freed = super()._cut(rows, lengths)
        self._known[rows] = np.minimum(self._known[rows], lengths)
        self._published[rows] = np.minimum(self._published[rows], lengths // self.page_size)
        taint = self._taint[rows]
        if taint.any():
            # What follows a cut below the taint is computed on a pruned prefix too, unless nothing
            # is missing or hidden any more.
            whole = (self._evicted[rows] == 0) & (self._start[rows] <= self._keep[rows])
            cleared = whole & (lengths <= taint)
            self._taint[rows] = np.where(cleared, 0, np.minimum(taint, lengths))
        return freed


NO_MEMBERS: Int64 = np.empty(0, np.int64)
