"""A rule-based state machine over every operation with prefix sharing on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sharing_model import SALTS
from swap_model import SharedSwapping
from swap_rules import INDEX, SwapRules

from pagedtq.errors import PinLimit
from pagedtq.paging import Retention


def machine_for(page_size, window, num_sinks, algorithm, totals, retained=False):
    chunks = st.sampled_from([0, 1, 1, 2, page_size, page_size + 1, 3 * page_size + 1])

    class Machine(SwapRules):
        def __init__(self):
            super().__init__()
            slots = 3 if window else 0
            self.cache = SharedSwapping(
                page_size,
                28,
                window,
                num_sinks,
                slots,
                num_host_pages=24,
                algorithm=algorithm,
                verify_tokens=page_size == 4,
            )
            self.now = 0.0
            self.retention = None
            if retained:
                self.retention = Retention(self.cache.tables, 0.2, lambda: self.now)

        @initialize(twins=st.booleans())
        def begin(self, twins):
            # Drawn prompts meet by chance; with these, every other run shares from the start.
            for _ in range(2 if twins else 0):
                self.open_whole([at % 3 for at in range(3 * page_size + 1)], SALTS[0])

        def open_whole(self, prompt, salt):
            seq_id = self.cache.open_with(prompt, salt)
            self.cache.append({seq_id: len(prompt) - len(self.cache.model[seq_id].tokens)})

        @precondition(lambda self: len(self.cache.model) < 7)
        @rule(
            length=st.sampled_from([5 * page_size, 3 * page_size + 1, 2 * page_size, 1, 0]),
            strange=st.sampled_from([None, None, None, 0, page_size, 2 * page_size - 1]),
            salt=st.sampled_from(SALTS),
            chunk=st.one_of(st.none(), chunks),
        )
        def open(self, length, strange, salt, chunk):
            prompt = [at % 3 for at in range(length)]
            if strange is not None and strange < length:
                prompt[strange] = 9
            seq_id = self.cache.open_with(prompt, salt)
            if chunk is None:
                chunk = length - len(self.cache.model[seq_id].tokens)
            self.cache.append({seq_id: chunk})

        @precondition(lambda self: len(self.cache.model) < 7)
        @rule(chunk=chunks)
        def open_without_tokens(self, chunk):
            self.cache.append({self.cache.open_with(None): chunk})

        @precondition(SwapRules.some_open)
        @rule(
            members=st.lists(st.tuples(INDEX, chunks), min_size=1, max_size=6),
            abort=st.sampled_from([False, False, True]),
        )
        def append(self, members, abort):
            self.cache.append({self.pick(i): chunk for i, chunk in members}, abort)

        @precondition(lambda self: self.cache.usable() and len(self.cache.model) < 8)
        @rule(index=INDEX)
        def fork(self, index):
            self.cache.fork(self.pick(index))

        @precondition(SwapRules.some_open)
        @rule(index=INDEX, length=INDEX)
        def truncate(self, index, length):
            seq_id = self.pick(index)
            self.cache.truncate(seq_id, length % (len(self.cache.model[seq_id].tokens) + 1))

        @precondition(SwapRules.some_open)
        @rule(index=INDEX, picks=st.lists(INDEX, min_size=1, max_size=2))
        def evict(self, index, picks):
            seq_id = self.pick(index)
            blocks = self.cache.evictable(seq_id)
            self.cache.evict(seq_id, sorted({blocks[i % len(blocks)] for i in picks if blocks}))

        @precondition(SwapRules.some_open)
        @rule(index=INDEX, first=st.integers(0, page_size), last=st.integers(0, 3 * page_size))
        def keep_first_last(self, index, first, last):
            self.cache.keep_first_last(self.pick(index), first, last)

        @precondition(SwapRules.some_open)
        @rule(index=INDEX, budget=st.integers(0, 6), seed=st.integers(0, 3))
        def evict_lowest(self, index, budget, seed):
            self.cache.evict_lowest(self.pick(index), budget, seed)

        @rule(count=st.integers(0, 4), seed=st.integers(0, 3))
        def free_pages(self, count, seed):
            self.cache.free_pages(count, seed)

        @precondition(lambda self: self.retention is not None and self.some_open())
        @rule(
            index=INDEX,
            priority=st.sampled_from([0, 35, 36, 100]),
            seconds=st.sampled_from([None, 0.0, 2.0]),
        )
        def retain(self, index, priority, seconds):
            self.retention.keep(self.pick(index), priority, seconds=seconds)

        @precondition(lambda self: self.retention is not None)
        @rule()
        def pass_time(self):
            self.now += 1.0

        @precondition(lambda self: self.retention is not None)
        @rule(index=INDEX)
        def pin(self, index):
            held = np.flatnonzero(self.cache.tables.prefix.held)
            if held.size:
                page = held[index % held.size]
                full = self.retention.num_pinned == self.retention.max_pinned == 5
                if full and not self.retention.pinned[page]:
                    with pytest.raises(PinLimit):
                        self.retention.pin_pages([page])
                else:
                    self.retention.pin_pages([page])

        @precondition(lambda self: self.retention is not None)
        @rule(index=INDEX)
        def unpin(self, index):
            pinned = np.flatnonzero(self.retention.pinned)
            if pinned.size:
                self.cache.poison(self.retention.unpin(pinned[index % pinned.size :][:1]))

        @precondition(SwapRules.some_open)
        @rule(picks=st.lists(INDEX, min_size=1, max_size=3))
        def close(self, picks):
            self.cache.close(sorted({self.pick(i) for i in picks}))

        @rule(page=st.integers(1, 27))
        def forget(self, page):
            tables = self.cache.tables
            held = bool(tables.prefix.held[page])
            parked = tables.pool.parked_ids()
            assert tables.forget_blocks([page]) == held
            # A pin ends with the block it is for; the page may have had no other owner.
            self.cache.poison(np.setdiff1d(tables.pool.parked_ids(), parked))

        @precondition(lambda self: not self.cache.model)
        @rule()
        def reset(self):
            unused = self.cache.tables.pool.num_used == 0
            assert self.cache.tables.reset_prefix_cache() is unused

        @invariant()
        def every_position_reads_its_own_context(self):
            self.cache.check()

        def teardown(self):
            totals.append(self.cache.hits)
            if self.retention is not None:
                self.cache.poison(self.retention.unpin(np.flatnonzero(self.retention.pinned)))
            self.cache.drain()
            assert self.cache.tables.pool.num_used == 0
            assert self.cache.tables.windows.num_used == 0
            assert self.cache.tables.reset_prefix_cache()
            self.cache.check()
            assert self.cache.tables.windows.num_records_used == 0

    return Machine


@pytest.mark.parametrize(
    ("page_size", "window", "num_sinks", "algorithm", "retained"),
    [
        (4, 0, 0, "sha256", False),
        (4, 4, 2, "blake2b", False),
        (4, 8, 4, "sha256", True),
        (16, 16, 4, "sha256", False),
        (16, 0, 0, "blake2b", True),
    ],
)
def test_no_operation_shares_what_was_computed_in_another_context(
    page_size, window, num_sinks, algorithm, retained
):
    totals = []
    run_state_machine_as_test(
        machine_for(page_size, window, num_sinks, algorithm, totals, retained),
        settings=settings(
            max_examples=25,
            stateful_step_count=40,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    assert sum(totals) > page_size, "hardly anything was shared: the machine proves little"
