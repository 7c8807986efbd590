"""A model of the cache in which every byte is a token id: what the plans of PageTables must move.

`TokenCache` executes plans on integer arrays in the documented order; `model` is a plain dict of
Python lists. Two layers are kept: one with the exact overlay, one without (all codes at once).
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from export_model import DeviceTable
from token_layers import POISON, Layer

from pagedtq.errors import EvictedError, OutOfEvictablePages, OutOfPages, OutOfWindowSlots
from pagedtq.paging import (
    EvictLowest,
    KeepFirstLast,
    PageTables,
    RandomOrder,
    SharingOptions,
    StepPlan,
    eviction,
    plan_free,
)
from tests.table_snapshot import snapshot


class Sequence:
    """The model of one sequence: its tokens, its blocks, and what may be read."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.evicted: set[int] = set()
        self.keep = self.start = 0

    def fork(self) -> Sequence:
        child = type(self)()
        child.tokens, child.evicted = list(self.tokens), set(self.evicted)
        child.keep, child.start = self.keep, self.start
        return child


class TokenCache:
    """PageTables, the layers its plans move, and the model, checked against each other."""

    def __init__(
        self,
        page_size: int,
        num_pages: int,
        window: int = 0,
        num_sinks: int = 0,
        num_slots: int = 0,
        sharing: SharingOptions | None = None,
        num_host_pages: int = 0,
    ) -> None:
        self.tables = PageTables(
            page_size, num_pages, window, num_sinks, num_slots, sharing, num_host_pages
        )
        # The middle layer stands for one that an aborted step never reached.
        self.layers = [Layer(self.tables, overlay=True), Layer(self.tables, overlay=True)]
        self.layers.append(Layer(self.tables, overlay=False))
        self.model: dict[int, Sequence] = {}
        self.next_token = 0
        self.device = DeviceTable(self.tables)

    def open(self) -> int:
        seq_id = self.tables.open()
        self.model[seq_id] = Sequence()
        return seq_id

    def append(self, counts: dict[int, int], abort: bool = False, kept: int | None = None) -> bool:
        """Append that many tokens to each sequence; False if the pools are too small.

        Those behind the first ``kept`` of each are drafts.
        """
        tables, size = self.tables, self.tables.page_size
        seq_ids = np.array(list(counts), np.int64)
        lengths = tables.lengths(seq_ids)
        num_new = np.array(list(counts.values()), np.int64)
        need, slots = self._demand(counts)
        token_ids, tokens = self._tokens_of(counts)
        free, free_slots = tables.pool.num_free, tables.windows.num_free
        if need > free or slots > free_slots:
            before = self.snapshot()
            if need > free:
                expected, numbers = OutOfPages, (need, free, tables.pool.num_pages - 1)
            else:
                expected, numbers = OutOfWindowSlots, (slots, free_slots, tables.windows.num_slots)
            with pytest.raises(expected) as caught:
                tables.reserve(seq_ids, num_new, token_ids)
            assert (caught.value.need, caught.value.free, caught.value.total) == numbers
            assert before == self.snapshot()
            return False
        plan = tables.reserve(seq_ids, num_new, token_ids)
        self.device.sometimes(self.model)
        assert tables.pool.num_free == free - need
        assert tables.windows.num_free == free_slots - slots
        assert plan.new_pages.size + plan.copy_dst.size == need
        assert set(plan.copy_dst) <= set(plan.cow_dst)
        assert len(set(plan.cow_dst)) == plan.cow_dst.size
        assert np.array_equal(tables.lengths(seq_ids), lengths + num_new)
        self._check_filled(plan)
        for layer in self.layers:
            layer.begin(tables, plan)
        self.layers[0].store(plan, tokens)
        if abort:
            for layer in self.layers[1:]:
                layer.abort(plan)
            blocks = -(-(lengths + num_new) // size) - -(-lengths // size)
            freed = tables.abort(plan)
            assert freed.size == blocks.sum()
            self.poison(freed)
        else:
            for layer in self.layers[1:]:
                layer.store(plan, tokens)
            tables.commit(plan, None if kept is None else lengths + kept)
            for member, seq_id in enumerate(counts):
                self.model[seq_id].tokens += tokens[plan.token_rows == member].tolist()
        return True

    def _tokens_of(self, counts: dict[int, int]) -> tuple[np.ndarray | None, np.ndarray]:
        """Return the ids that reserve is given, and the bytes that are written."""
        tokens = np.arange(self.next_token, self.next_token + sum(counts.values()))
        self.next_token += tokens.size
        return None, tokens

    def fork(self, seq_id: int) -> int:
        free, free_slots = self.tables.pool.num_free, self.tables.windows.num_free
        child = self.tables.fork(seq_id)
        assert (free, free_slots) == (self.tables.pool.num_free, self.tables.windows.num_free)
        assert self.tables.state(child) == self.tables.state(seq_id)
        self.model[child] = self.model[seq_id].fork()
        return child

    def truncate(self, seq_id: int, length: int) -> None:
        size, sequence = self.tables.page_size, self.model[seq_id]
        if length % size and length // size in sequence.evicted:
            before = self.snapshot()
            with pytest.raises(EvictedError):
                self.tables.truncate(seq_id, length)
            assert before == self.snapshot()
            return
        state = self.tables.state(seq_id)
        self.poison(self.tables.truncate(seq_id, length))
        assert self.tables.state(seq_id) == tuple(min(value, length) for value in state)
        del sequence.tokens[length:]
        sequence.evicted = {block for block in sequence.evicted if block * size < length}
        sequence.start = min(sequence.start, self.tables.state(seq_id).ring_start)
        sequence.keep = min(sequence.keep, sequence.start)

    def evictable(self, seq_id: int) -> list[int]:
        blocks = range(self.tables.state(seq_id).ring_start // self.tables.page_size)
        return [block for block in blocks if block not in self.model[seq_id].evicted]

    def evict(self, seq_id: int, blocks: list[int]) -> None:
        self.poison(self.tables.evict(seq_id, blocks))
        self.model[seq_id].evicted |= set(blocks)

    def keep_first_last(self, seq_id: int, first: int, last: int) -> None:
        sequence, size = self.model[seq_id], self.tables.page_size
        before = self.snapshot()
        plan = KeepFirstLast(first, last).plan(self.tables, seq_id)
        assert before == self.snapshot()
        length, ring_start = len(sequence.tokens), self.tables.state(seq_id).ring_start
        start = min(max(length - last, 0), ring_start)
        unread = set(range(first, start))
        for block in range(-(-length // size)):
            wholly = set(range(block * size, (block + 1) * size)) <= unread
            assert (block in plan.blocks) == (wholly and block not in sequence.evicted)
        self.poison(eviction.apply(self.tables, plan))
        sequence.evicted |= set(plan.blocks.tolist())
        sequence.keep, sequence.start = (first, start) if unread else (0, 0)

    def evict_lowest(self, seq_id: int, max_pages: int, seed: int) -> None:
        before = self.snapshot()
        plan = EvictLowest(RandomOrder(seed), max_pages=max_pages).plan(self.tables, seq_id)
        assert before == self.snapshot()
        sequence, refs = self.model[seq_id], self.tables.pool.ref_counts
        pages = self.tables.block_table([seq_id])[0]
        own = [block for block in self.evictable(seq_id) if refs[pages[block]] == 1]
        excess = max(np.count_nonzero(pages) - max_pages, 0)
        assert set(plan.blocks.tolist()) <= set(own)
        assert plan.blocks.size == min(excess, len(own))
        freed = eviction.apply(self.tables, plan)
        assert freed.size == plan.blocks.size
        self.poison(freed)
        sequence.evicted |= set(plan.blocks.tolist())

    def free_pages(self, num_pages: int, seed: int) -> None:
        """Free pages over all sequences; refused, with nothing changed, if too few can go."""
        tables, refs = self.tables, self.tables.pool.ref_counts
        owners: Counter[int] = Counter()
        for seq_id in self._evicting():
            pages = tables.block_table([seq_id])[0]
            owners.update(int(pages[block]) for block in self.evictable(seq_id))
        possible = sum(refs[page] == count for page, count in owners.items())
        before = self.snapshot()
        if num_pages > possible:
            with pytest.raises(OutOfEvictablePages) as caught:
                plan_free(tables, num_pages, RandomOrder(seed))
            assert (caught.value.need, caught.value.free) == (num_pages, possible)
            assert before == self.snapshot()
            return
        plans = plan_free(tables, num_pages, RandomOrder(seed))
        assert before == self.snapshot()
        freed = eviction.apply_all(tables, plans)
        assert freed.size == num_pages
        self.poison(freed)
        for plan in plans:
            self.model[plan.seq_id].evicted |= set(plan.blocks.tolist())

    def close(self, seq_ids: list[int]) -> None:
        self.poison(self.tables.close(seq_ids))
        for seq_id in seq_ids:
            del self.model[seq_id]

    def poison(self, freed: np.ndarray) -> None:
        """Overwrite freed pages, so that reading one is noticed."""
        assert freed.size == np.unique(freed).size
        assert 0 not in freed
        assert not self.tables.pool.ref_counts[freed].any()
        if self.tables.prefix is not None:
            freed = freed[~self.tables.prefix.held[freed]]
        for layer in self.layers:
            layer.pages.reshape(-1, self.tables.page_size)[freed] = POISON

    def check(self) -> None:
        """Every resident position reads its own token from exactly one place, in every layer."""
        self.tables.check_integrity()
        ids = list(self.model)
        self.device.sometimes(ids)
        assert self.tables.num_sequences == len(ids)
        resident = 0
        for seq_id in ids:
            resident += self._check_sequence(seq_id)
        assert self.tables.resident_tokens == resident
        size, here = self.tables.page_size, self._readable()
        sequences = [self.model[seq_id] for seq_id in here]
        blocks = sum(-(-len(s.tokens) // size) - len(s.evicted) for s in sequences)
        assert self.tables.num_resident_blocks == blocks
        assert self.tables.logical_tokens == sum(len(s.tokens) for s in self.model.values())
        distinct = {int(page) for row in self.tables.block_table(here) for page in row if page}
        if self.tables.retention is not None:
            distinct |= set(np.flatnonzero(self.tables.retention.pinned).tolist())
        assert self.tables.pool.num_used == len(distinct | self._pages_in_flight())

    def _readable(self) -> list[int]:
        """Sequences whose pages are on the device."""
        return list(self.model)

    def _evicting(self) -> list[int]:
        """Sequences that pages can be taken from."""
        return list(self.model)

    def _pages_in_flight(self) -> set[int]:
        """Pages that a swap brings back, in no table yet."""
        return set()

    def snapshot(self) -> dict[str, object]:
        return snapshot(self.tables)

    def _demand(self, counts: dict[int, int]) -> tuple[int, int]:
        """Pages and slots of a step by the rules, one member after the other."""
        tables, size = self.tables, self.tables.page_size
        refs, slot_refs = tables.pool.ref_counts.copy(), tables.windows.ref_counts.copy()
        pages = slots = 0
        for seq_id, n in counts.items():
            length = len(self.model[seq_id].tokens)
            pages += -(-(length + n) // size) - -(-length // size)
            if n and length % size:
                page = tables.block_table([seq_id])[0, length // size]
                if refs[page] > 1:
                    refs[page] -= 1
                    pages += 1
            slot = tables.window_slots([seq_id])[0]
            if n and tables.window_tokens and slot < 0:
                slots += 1
            elif n and tables.window_tokens and slot_refs[slot] > 1:
                slot_refs[slot] -= 1
                slots += 1
        return pages, slots

    def _check_filled(self, plan: StepPlan) -> None:
        size, filled = self.tables.page_size, []
        for row, old, new in zip(plan.rows, plan.old.coded, plan.new.coded, strict=True):
            for block in range(old // size, new // size):
                filled.append(int(self.tables.row_pages(np.array([row]), np.array([block]))[0]))
        assert filled == plan.filled_pages.tolist()

    def _check_sequence(self, seq_id: int) -> int:
        tables, sequence = self.tables, self.model[seq_id]
        size, tokens = tables.page_size, np.array(sequence.tokens, np.int64)
        state = tables.state(seq_id)
        assert state.length == tokens.size
        positions = np.arange(tokens.size)
        blocks = positions // size
        resident = ~np.isin(blocks, list(sequence.evicted))
        slots = tables.slots_of(seq_id, positions)
        assert np.array_equal(slots >= 0, resident)
        assert tables.resident_lengths([seq_id])[0] == np.count_nonzero(resident)
        slot, record = tables.window_slots([seq_id])[0], tables.sink_records([seq_id])[0]
        readable = resident & ((positions < sequence.keep) | (positions >= sequence.start))
        for layer in self.layers:
            reads = tables.reads([seq_id], layer.overlay)
            kv_len, first, stop, keep, start = (int(field[0]) for field in reads)
            assert kv_len == tokens.size
            assert 0 <= first <= stop <= kv_len
            found = np.full(tokens.size, POISON)
            allowed = resident & ((positions < keep) | (positions >= start))
            assert np.array_equal(allowed, readable)
            body = allowed & (positions >= first) & (positions < stop)
            found[body] = layer.pages[slots[body]]
            sinks = allowed & (positions < first)
            found[sinks] = layer.sinks[record * tables.num_sinks + positions[sinks]]
            ring = allowed & (positions >= stop)
            if ring.any():
                window = tables.window_tokens
                found[ring] = layer.rings[slot * window + positions[ring] % window]
            assert np.array_equal(found[readable], tokens[readable])
            # Codes exist for every resident position below c, read or not.
            coded = resident & (positions < (state.coded if layer.overlay else kv_len))
            assert np.array_equal(layer.pages[slots[coded]], tokens[coded])
        exact = positions < state.num_sinks
        layer = self.layers[0]
        places = record * tables.num_sinks + positions[exact]
        assert np.array_equal(layer.sinks[places], tokens[exact])
        return int(np.count_nonzero(resident))
