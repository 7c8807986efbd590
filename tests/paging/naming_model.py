"""Sequences whose blocks have names: extra keys, keys of the caller, drafts, single rows.

A key that the model makes for the caller is the number of the context at the block's end. So it
says all that decides the block's bytes, and a block that is found under it must have just these.
"""

from __future__ import annotations

import numpy as np
import pytest
from sharing_model import Replay, SharedSequence
from swap_model import SharedSwapping
from token_layers import CLEARED

from pagedtq.errors import ArgumentError, CapacityError, OutOfPages, StepError

#: Where sequences begin that name their own blocks: no other sequence may find these.
OPAQUE = b"opaque"


class NamedReplay(Replay):
    """Blocks with names come without tokens, or with those that `publish_keys` was told."""

    def stored(self, keys, parent, tokens):
        if keys[0].startswith(b"k"):
            for key in keys:
                self.holders[key] += 1
                assert self.chains.setdefault(key, parent) == parent
                parent = key
        else:
            super().stored(keys, parent, tokens)


class NamedSequence(SharedSequence):
    def __init__(self) -> None:
        super().__init__()
        self.extras: dict[int, bytes] = {}
        self.opaque = False
        #: Whether the tables know of everything that was appended, and of nothing that is missing.
        self.plain = True

    def fork(self) -> NamedSequence:
        child = super().fork()
        child.extras, child.opaque, child.plain = self.extras, self.opaque, self.plain
        return child


class NamingCache(SharedSwapping):
    """A cache of sequences that are shared in every way there is."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.replay = self.tables.prefix.observer = NamedReplay()
        self.named_hits = self.num_drafts = self.num_adopted = 0

    # -- opening -----------------------------------------------------------------------------

    def open_with(self, prompt, salt=b"", extras=None):
        sequence, extras = NamedSequence(), extras or {}
        if prompt is None:
            seq_id = self.tables.open()
        else:
            options = {"salt": salt, "extra_keys": extras}
            found = self.tables.num_shared_tokens(prompt, **options)
            seq_id = self.tables.open(prompt, **options)
            assert self.tables.length_of(seq_id) == found < max(len(prompt), 1)
            self.hits += found
            sequence.salt, sequence.extras, sequence.prompt = salt, extras, list(prompt)
            self.begin(sequence, found)
        self.model[seq_id] = sequence
        return seq_id

    def open_named(self, prompt, num_keys, on_pages):
        """Open a sequence by names of its first blocks: looked up by the tables, or before."""
        tables, size, sequence = self.tables, self.tables.page_size, NamedSequence()
        sequence.opaque, sequence.salt, sequence.prompt = True, OPAQUE, list(prompt)
        contexts = self.written(sequence, [], prompt, False)
        keys = [name_of(contexts, block, size) for block in range(len(prompt) // size)][:num_keys]
        if on_pages:
            pages = tables.prefix.longest(keys)
            seq_id = tables.open_on(keys[: len(pages)], pages, len(prompt))
        else:
            pages = tables.find_pages(tables.prepare(block_keys=keys))
            seq_id = tables.open(block_keys=keys)
        assert tables.length_of(seq_id) == len(pages) * size
        self.named_hits += len(pages)
        self.begin(sequence, len(pages) * size)
        self.model[seq_id] = sequence
        return seq_id

    def begin(self, sequence, found):
        sequence.ids = sequence.prompt[:found]
        sequence.tokens = self.written(sequence, [], sequence.ids, False)

    def written(self, sequence, before, ids, pruned):
        size = self.tables.page_size
        tokens, context = [], (before[-1] if before else ("salt", sequence.salt))
        for at, token in enumerate(ids, len(before)):
            extra = sequence.extras.get(at // size)
            key = (context, token, extra, len(self.contexts) if pruned else None)
            context = self.contexts.setdefault(key, len(self.contexts))
            tokens.append(context)
        return tokens

    # -- names -------------------------------------------------------------------------------

    def names_of(self, seq_id, first, stop):
        """Return true names of blocks, written or to be written as things stand now."""
        sequence, size = self.model[seq_id], self.tables.page_size
        have = len(sequence.tokens)
        ids = sequence.next_tokens(have, max(stop * size - have, 0))
        contexts = sequence.tokens + self.written(sequence, sequence.tokens, ids, False)
        return [name_of(contexts, block, size) for block in range(first, stop)]

    def extend_keys(self, seq_id, count):
        have = len(self.tables.keys_of(seq_id))
        self.tables.extend_keys(seq_id, self.names_of(seq_id, have, have + count))

    def publish_keys(self, seq_id, count, with_tokens):
        """Name and publish the next blocks; refused if they have names that are not true (now)."""
        tables, size, sequence = self.tables, self.tables.page_size, self.model[seq_id]
        first = tables.num_published(seq_id)
        stop = min(first + count, len(sequence.tokens) // size)
        names, known = self.names_of(seq_id, first, stop), tables.keys_of(seq_id)[first:stop]
        tokens = np.array(sequence.ids[first * size : stop * size], np.int32)
        arguments = (seq_id, names, tokens) if with_tokens else (seq_id, names)
        if list(known) != names[: len(known)]:
            before = self.snapshot()
            with pytest.raises(ArgumentError, match="opened with other keys"):
                tables.publish_keys(*arguments)
            assert before == self.snapshot()
            return
        tables.publish_keys(*arguments)
        assert tables.num_published(seq_id) == max(stop, first)
        for block, page in enumerate(tables.block_table([seq_id])[0][first:stop], first):
            assert not page or tables.prefix.key_of(page) == names[block - first]

    # -- appending ---------------------------------------------------------------------------

    def append(self, counts, abort=False, kept=None):
        tables, size = self.tables, self.tables.page_size
        published = {seq_id: tables.num_published(seq_id) for seq_id in counts}
        lengths = {seq_id: len(self.model[seq_id].tokens) for seq_id in counts}
        held = tables.prefix.held.copy()
        done = super().append(counts, abort, kept)
        if not done or abort:
            return done
        for seq_id, before in published.items():
            coded = tables.state(seq_id).coded if tables.window_tokens else tables.length_of(seq_id)
            sequence, after = self.model[seq_id], tables.num_published(seq_id)
            limit = coded if kept is None else min(coded, lengths[seq_id] + kept)
            if sequence.opaque:
                limit = min(limit, len(tables.keys_of(seq_id)) * size)
            assert after <= max(before, limit // size)
            if sequence.ids is not None and sequence.plain:
                assert after == max(before, limit // size)
            if kept is not None:
                self.num_drafts += coded // size > after
                for page in tables.block_table([seq_id])[0][after : coded // size]:
                    assert held[page] or not tables.prefix.holds(page) or self.forked(page)
        return done

    def forked(self, page):
        return self.tables.pool.ref_counts[page] > 1

    def lengthen(self, seq_id, count, keep_free):
        """Append to one row without a plan; its bytes go where its table says afterwards."""
        tables, size, sequence = self.tables, self.tables.page_size, self.model[seq_id]
        assert not tables.window_tokens
        old = len(sequence.tokens)
        need, _ = self._demand({seq_id: count})
        free, was = tables.pool.num_free, tables.block_table([seq_id])[0]
        if count and old % size and self.forked(was[old // size]):
            before = self.snapshot()
            with pytest.raises(StepError, match="shares its open page: append with reserve"):
                tables.lengthen(seq_id, old + count, keep_free)
            assert before == self.snapshot()
            return
        if need and need > free - keep_free:
            before = self.snapshot()
            with pytest.raises(OutOfPages) as caught:
                tables.lengthen(seq_id, old + count, keep_free)
            assert (caught.value.need, caught.value.free) == (need, max(free - keep_free, 0))
            assert before == self.snapshot()
            return
        ids, values = self._tokens_of({seq_id: count})
        new = tables.lengthen(seq_id, old + count, keep_free)
        now = tables.block_table([seq_id])[0]
        first = -(-old // size)
        assert now[first : first + len(new)].tolist() == new
        assert tables.pool.num_free == free - need
        assert was[:first].tolist() == now[:first].tolist()
        slots = tables.slots_of(seq_id, np.arange(old, old + count))
        for layer in self.layers:
            rows = layer.pages.reshape(-1, size)
            rows[new] = CLEARED
            layer.pages[slots] = values
        sequence.tokens += values.tolist()
        if sequence.ids is not None:
            sequence.ids += ids.tolist()
        # Tokens that were not told end what is published, names do not.
        sequence.plain = sequence.plain and (sequence.opaque or not count)

    # -- what ends sharing -------------------------------------------------------------------

    def evict(self, seq_id, blocks):
        self.model[seq_id].plain &= not blocks
        super().evict(seq_id, blocks)

    def keep_first_last(self, seq_id, first, last):
        super().keep_first_last(seq_id, first, last)
        self.model[seq_id].plain &= not self.model[seq_id].pruned

    def evict_lowest(self, seq_id, max_pages, seed):
        super().evict_lowest(seq_id, max_pages, seed)
        self.model[seq_id].plain &= not self.model[seq_id].pruned

    def free_pages(self, num_pages, seed):
        super().free_pages(num_pages, seed)
        for sequence in self.model.values():
            sequence.plain &= not sequence.pruned

    # -- other tables ------------------------------------------------------------------------

    def adopt(self, seq_ids):
        """Take sequences out and in again: copies of their bytes, shared with nobody."""
        tables, size = self.tables, self.tables.page_size
        taken = tables.extract(seq_ids, False)
        before = self.snapshot()
        if tables.window_tokens and any(
            tables.length_of(one) and tables.window_slots([one])[0] < 0 for one in seq_ids
        ):
            # Opened on found pages, and nothing appended since: it has no ring to take along.
            with pytest.raises(ArgumentError, match="has tokens, but no ring"):
                tables.plan_adoption(taken.image, False)
            assert before == self.snapshot()
            return
        try:
            plan = tables.plan_adoption(taken.image, False)
        except CapacityError as error:
            assert error.need > error.free
            assert before == self.snapshot()
            return
        src = tables.windows.sink_record[taken.pages[plan.first_pages]]
        for layer in self.layers:
            rows = layer.pages.reshape(-1, size)
            rows[plan.pages] = rows[taken.pages]
            if tables.window_tokens:
                rings = layer.rings.reshape(-1, tables.window_tokens)
                rings[plan.slots] = rings[taken.slots]
            if tables.num_sinks:
                sinks = layer.sinks.reshape(-1, tables.num_sinks)
                sinks[plan.records] = sinks[src[: plan.records.size]]
        for old, new in zip(seq_ids, tables.adopt(plan).tolist(), strict=True):
            child = self.model[new] = self.model[old].fork()
            child.ids, child.prompt, child.salt, child.extras = None, [], b"", {}
            child.opaque = child.plain = False
            assert tables.state(new) == tables.state(old)
            assert tables.keys_of(new) == ()
        self.num_adopted += len(seq_ids)


def name_of(contexts, block, size):
    """Return the key of a block by the context in which its last token stands."""
    return b"k%d" % contexts[(block + 1) * size - 1]
