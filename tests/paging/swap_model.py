"""The host tier of the token model: what `SwapPlan`s move, and what must still be there.

`SwappingCache` adds swaps and fences to a `TokenCache` or `SharingCache`. Bytes are copied either
when a swap begins or when it is committed, so that a page that is used for something else in
between shows as a wrong byte; and pages that wait for a fence are compared with what they held when
they were released.
"""

from __future__ import annotations

import numpy as np
import pytest
from sharing_model import SharingCache
from token_layers import POISON, HostLayer
from token_model import TokenCache

from pagedtq.errors import CapacityError, StepError, SwappedError


class SwappingCache(TokenCache):
    """Mixed in before a model cache: its sequences can be swapped, its pages fenced."""

    def __init__(self, *args, num_host_pages=20, **options):
        super().__init__(*args, num_host_pages=num_host_pages, **options)
        self.hosts = [HostLayer(layer, self.tables) for layer in self.layers]
        self.swaps: list[tuple[object, bool]] = []
        self.swapped: set[int] = set()
        self.moving: set[int] = set()
        self.fences: list[int] = []
        self.parked: dict[int, list[bytes]] = {}
        self.num_swapped_in = self.num_reused = 0

    # -- which sequences can be used -----------------------------------------------------------

    def usable(self) -> list[int]:
        return [i for i in self.model if i not in self.swapped and i not in self.moving]

    def on_host(self) -> list[int]:
        return [i for i in self.swapped if i not in self.moving]

    # -- swaps ---------------------------------------------------------------------------------

    def begin_swap(self, out: bool, seq_ids: list[int], early: bool) -> bool:
        """Begin a swap; copy its bytes now, or when it is committed. False if it does not fit."""
        tables = self.tables
        begin = tables.begin_swap_out if out else tables.begin_swap_in
        before = self.snapshot()
        try:
            plan = begin(seq_ids)
        except CapacityError as error:
            assert error.need > error.free
            assert before == self.snapshot()
            return False
        assert plan.seq_ids.tolist() == seq_ids
        for ids in (plan.pages, plan.host_pages, plan.sink_records, plan.rings, plan.window_slots):
            assert np.unique(ids).size == ids.size
        if early:
            self.copy(plan)
        self.swaps.append((plan, early))
        self.moving |= set(seq_ids)
        return True

    def copy(self, plan) -> None:
        for layer in self.hosts:
            layer.copy(plan)

    def end_swap(self, index: int, commit: bool) -> None:
        plan, copied = self.swaps.pop(index)
        seq_ids = set(plan.seq_ids.tolist())
        out = plan.direction == "out"
        if commit:
            if not copied:
                self.copy(plan)
            freed = self.tables.commit_swap(plan)
            self.poison(freed)
            self.swapped = self.swapped | seq_ids if out else self.swapped - seq_ids
            if not out:
                assert freed.size == 0
                self.num_swapped_in += len(seq_ids)
                self.num_reused += plan.num_reused
        else:
            self.poison(self.tables.abort_swap(plan))
        with pytest.raises(StepError):
            self.tables.commit_swap(plan)
        self.moving -= seq_ids
        self._poison_host()

    def close(self, seq_ids):
        super().close(seq_ids)
        self.swapped -= set(seq_ids)
        self._poison_host()

    def _poison_host(self) -> None:
        host = self.tables.host
        free = np.flatnonzero(host.ref_counts[1:] == 0) + 1
        rings = set(np.flatnonzero(host.rings.ref_counts == 0).tolist())
        for layer in self.hosts:
            layer.poison(free, rings)

    # -- fences --------------------------------------------------------------------------------

    def open_fence(self) -> None:
        self.fences.append(self.tables.fences.open())

    def close_fence(self, index: int) -> None:
        epoch = self.fences.pop(index)
        self.compare_parked()
        back = self.tables.fences.close(epoch)
        for page in back.tolist():
            self.parked.pop(page)
        self.poison(back)

    def poison(self, freed):
        waiting = np.isin(freed, self.tables.pool.parked_ids())
        for page in freed[waiting].tolist():
            self.parked[page] = self._page_bytes(page)
        super().poison(freed[~waiting])

    def compare_parked(self) -> None:
        """Whoever still reads a page that was freed behind a fence finds what was there."""
        parked = self.tables.pool.parked_ids().tolist()
        # Pages that were found again have an owner now, who may write.
        self.parked = {page: was for page, was in self.parked.items() if page in set(parked)}
        assert sorted(self.parked) == sorted(parked)
        for page, was in self.parked.items():
            assert was == self._page_bytes(page)

    def _page_bytes(self, page: int) -> list[bytes]:
        size = self.tables.page_size
        return [layer.pages[page * size : (page + 1) * size].tobytes() for layer in self.layers]

    # -- claims --------------------------------------------------------------------------------

    def check(self):
        self.compare_parked()
        ids = list(self.model)
        assert self.tables.is_swapped(ids).tolist() == [i in self.swapped for i in ids]
        assert self.tables.num_swapped == len(self.swapped)
        super().check()

    def _readable(self):
        return [seq_id for seq_id in self.model if seq_id not in self.swapped]

    def _pages_in_flight(self):
        plans = [plan for plan, _ in self.swaps if plan.direction == "in"]
        return {int(page) for plan in plans for page in plan._entry_pages if page}

    def _check_sequence(self, seq_id):
        if seq_id not in self.swapped:
            return super()._check_sequence(seq_id)
        with pytest.raises((SwappedError, StepError)):
            self.tables.reads([seq_id], True)
        tables, sequence = self.tables, self.model[seq_id]
        row = tables._row_of(seq_id)
        left, size = tables._swapped[row], tables.page_size
        state, tokens = tables.state(seq_id), np.array(sequence.tokens, np.int64)
        positions = np.arange(tokens.size)
        pages = left.host_pages[positions // size].astype(np.int64)
        resident = pages > 0
        evicted = np.isin(positions // size, list(sequence.evicted))
        assert np.array_equal(resident, ~evicted)
        for host in self.hosts:
            coded = resident & (positions < (state.coded if host.layer.overlay else tokens.size))
            places = pages[coded] * size + positions[coded] % size
            assert np.array_equal(host.pages[places], tokens[coded])
            if not host.layer.overlay or not tables.window_tokens:
                continue
            ring = positions >= state.ring_start
            if ring.any():
                rows = host.rings[left.ring]
                assert np.array_equal(rows[positions[ring] % tables.window_tokens], tokens[ring])
            exact = positions < state.num_sinks
            if exact.any():
                sinks = host.sinks[int(left.host_pages[0])]
                assert np.array_equal(sinks[: exact.sum()], tokens[exact])
        return 0

    def refuse_changes(self, seq_id: int) -> None:
        """Whatever would change a sequence that is away is refused, and changes nothing."""
        tables = self.tables
        expected = StepError if seq_id in self.moving else SwappedError
        before = self.snapshot()
        for call in (
            lambda: tables.reserve([seq_id], 1),
            lambda: tables.lengthen(seq_id, len(self.model[seq_id].tokens) + 1),
            lambda: tables.fork(seq_id),
            lambda: tables.truncate(seq_id, 0),
            lambda: tables.evict(seq_id, [0]),
            lambda: tables.set_start(seq_id, 0, 0),
            lambda: tables.begin_swap_out([seq_id]),
            lambda: tables.extract([seq_id], True),
        ):
            with pytest.raises(expected):
                call()
        if seq_id in self.moving:
            for call in (tables.close, lambda i: tables.begin_swap_in([i])):
                with pytest.raises(StepError):
                    call(seq_id)
        assert before == self.snapshot()

    def drain(self) -> None:
        """End what is under way, and leave nothing behind."""
        while self.swaps:
            self.end_swap(0, True)
        self.close(list(self.model))
        while self.fences:
            self.close_fence(0)
        self.check()
        host = self.tables.host
        assert (host.num_used, host.rings.num_used) == (0, 0)
        for layer in self.hosts:
            assert (layer.pages == POISON).all()


class PlainSwapping(SwappingCache, TokenCache):
    """Sequences without tokens: only forks share."""


class SharedSwapping(SwappingCache, SharingCache):
    """Sequences with tokens."""
