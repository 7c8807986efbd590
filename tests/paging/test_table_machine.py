"""A rule-based state machine over every operation, for windows of 0, P and 2P."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from swap_model import PlainSwapping
from swap_rules import INDEX, SwapRules

SHAPES = [
    (4, 0, 0),
    (4, 4, 2),
    (4, 8, 4),
    (16, 0, 0),
    (16, 16, 4),
    (16, 32, 4),
    (64, 0, 0),
    (64, 64, 4),
    (64, 128, 64),
]


def machine_for(page_size: int, window: int, num_sinks: int) -> type[RuleBasedStateMachine]:
    chunks = st.sampled_from(
        [1, 1, 2, page_size - 1, page_size, page_size + 1, 3 * page_size + 5, 0]
    )

    class Machine(SwapRules):
        def __init__(self) -> None:
            super().__init__()
            self.cache = PlainSwapping(
                page_size, 48, window, num_sinks, 5 if window else 0, num_host_pages=32
            )

        @precondition(lambda self: len(self.cache.model) < 7)
        @rule(chunk=chunks)
        def open(self, chunk: int) -> None:
            self.cache.append({self.cache.open(): chunk})

        @precondition(SwapRules.some_open)
        @rule(
            members=st.lists(st.tuples(INDEX, chunks), min_size=1, max_size=6),
            abort=st.sampled_from([False, False, True]),
        )
        def append(self, members: list[tuple[int, int]], abort: bool) -> None:
            self.cache.append({self.pick(i): chunk for i, chunk in members}, abort)

        @precondition(lambda self: self.cache.usable() and len(self.cache.model) < 8)
        @rule(index=INDEX)
        def fork(self, index: int) -> None:
            self.cache.fork(self.pick(index))

        @precondition(SwapRules.some_open)
        @rule(index=INDEX, cut=st.integers(0, window + 2 * page_size))
        def truncate_a_little(self, index: int, cut: int) -> None:
            seq_id = self.pick(index)
            self.cache.truncate(seq_id, max(0, len(self.cache.model[seq_id].tokens) - cut))

        @precondition(SwapRules.some_open)
        @rule(index=INDEX, length=INDEX)
        def truncate_anywhere(self, index: int, length: int) -> None:
            seq_id = self.pick(index)
            self.cache.truncate(seq_id, length % (len(self.cache.model[seq_id].tokens) + 1))

        @precondition(SwapRules.some_open)
        @rule(index=INDEX, picks=st.lists(INDEX, max_size=3))
        def evict(self, index: int, picks: list[int]) -> None:
            seq_id = self.pick(index)
            blocks = self.cache.evictable(seq_id)
            self.cache.evict(seq_id, sorted({blocks[i % len(blocks)] for i in picks if blocks}))

        @precondition(SwapRules.some_open)
        @rule(
            index=INDEX,
            first=st.integers(0, 2 * page_size),
            last=st.integers(0, 4 * page_size),
        )
        def keep_first_last(self, index: int, first: int, last: int) -> None:
            self.cache.keep_first_last(self.pick(index), first, last)

        @precondition(SwapRules.some_open)
        @rule(picks=st.lists(INDEX, max_size=2))
        def close(self, picks: list[int]) -> None:
            self.cache.close(sorted({self.pick(i) for i in picks}))

        @invariant()
        def every_position_reads_its_own_token(self) -> None:
            self.cache.check()

        def teardown(self) -> None:
            self.cache.drain()
            assert self.cache.tables.pool.num_used == 0
            assert self.cache.tables.windows.num_used == 0
            assert self.cache.tables.windows.num_records_used == 0

    return Machine


@pytest.mark.parametrize(("page_size", "window", "num_sinks"), SHAPES)
def test_any_sequence_of_operations_keeps_every_token(page_size, window, num_sinks):
    run_state_machine_as_test(
        machine_for(page_size, window, num_sinks),
        settings=settings(
            max_examples=25,
            stateful_step_count=40,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
