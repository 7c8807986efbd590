"""Rules of the state machines that move sequences between the tiers, and fence pages."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

INDEX = st.integers(0, 1 << 16)


class SwapRules(RuleBasedStateMachine):
    """For machines whose ``cache`` is a `SwappingCache`."""

    def pick(self, index: int) -> int:
        ids = self.cache.usable()
        return ids[index % len(ids)]

    def some_open(self) -> bool:
        return bool(self.cache.usable())

    @precondition(some_open)
    @rule(picks=st.lists(INDEX, min_size=1, max_size=3), early=st.booleans())
    def swap_out(self, picks: list[int], early: bool) -> None:
        self.cache.begin_swap(True, sorted({self.pick(i) for i in picks}), early)

    @precondition(lambda self: self.cache.on_host())
    @rule(picks=st.lists(INDEX, min_size=1, max_size=3), early=st.booleans())
    def swap_in(self, picks: list[int], early: bool) -> None:
        ids = sorted(self.cache.on_host())
        self.cache.begin_swap(False, sorted({ids[i % len(ids)] for i in picks}), early)

    @precondition(lambda self: self.cache.swaps)
    @rule(index=INDEX, commit=st.sampled_from([True, True, True, False]))
    def end_swap(self, index: int, commit: bool) -> None:
        self.cache.end_swap(index % len(self.cache.swaps), commit)

    @precondition(lambda self: self.cache.swapped or self.cache.moving)
    @rule(index=INDEX)
    def change_what_is_away(self, index: int) -> None:
        away = sorted(self.cache.swapped | self.cache.moving)
        self.cache.refuse_changes(away[index % len(away)])

    @precondition(lambda self: self.cache.on_host())
    @rule(index=INDEX)
    def close_on_the_host(self, index: int) -> None:
        ids = sorted(self.cache.on_host())
        self.cache.close([ids[index % len(ids)]])

    @precondition(lambda self: len(self.cache.fences) < 3)
    @rule()
    def open_fence(self) -> None:
        self.cache.open_fence()

    @precondition(lambda self: self.cache.fences)
    @rule(index=INDEX)
    def close_fence(self, index: int) -> None:
        self.cache.close_fence(index % len(self.cache.fences))
