"""Every operation of the cache, in any order, against a plain dict model: to the byte."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.cache.bank import FORMATS, KV_DTYPES, LAYERS
from tests.cache.model import CheckedCache

INDEX = st.integers(0, 1 << 16)
SHAPES = list(itertools.product((16, 64), (0, 1, 2)))
MAX_SEQUENCES = 5


def chunk_sizes(page_size: int) -> list[int]:
    return [1, 1, page_size - 1, page_size, page_size + 1, 3 * page_size + 5, 0]


def idle(machine: CacheMachine) -> bool:
    return machine.run.step is None


def idle_and_open(machine: CacheMachine) -> bool:
    return machine.run.step is None and bool(machine.run.usable())


def in_step(machine: CacheMachine) -> bool:
    return machine.run.step is not None


def has_room(machine: CacheMachine) -> bool:
    return idle(machine) and len(machine.run.sequences) < MAX_SEQUENCES


class CacheMachine(RuleBasedStateMachine):
    """Rules of one shape; formats and types are drawn per run."""

    page_size = 16
    windows = 0

    def pick(self, index: int) -> int:
        ids = self.run.usable()
        return ids[index % len(ids)]

    def counts(self, members: list[tuple[int, int]]) -> dict[int, int]:
        sizes = chunk_sizes(self.page_size)
        return {self.pick(i): sizes[size % len(sizes)] for i, size in members}

    @initialize(
        name=st.sampled_from(FORMATS),
        kv_dtype=st.sampled_from(KV_DTYPES),
        head_dim=st.sampled_from([16, 32]),
        order=st.sampled_from(["layer_major", "page_major"]),
        seed=st.integers(0, 999),
    )
    def start(self, name: str, kv_dtype: str, head_dim: int, order: str, seed: int) -> None:
        window = self.windows * self.page_size
        self.run = CheckedCache(
            name,
            kv_dtype,
            self.page_size,
            window,
            head_dim=head_dim,
            seed=seed,
            pool_order=order,
        )

    @precondition(has_room)
    @rule(size=INDEX)
    def open(self, size: int) -> None:
        self.run.open()
        sizes = chunk_sizes(self.page_size)
        self.run.append({list(self.run.sequences)[-1]: sizes[size % len(sizes)]})

    @precondition(idle_and_open)
    @rule(members=st.lists(st.tuples(INDEX, INDEX), min_size=1, max_size=4))
    def append(self, members: list[tuple[int, int]]) -> None:
        self.run.append(self.counts(members))

    @precondition(idle_and_open)
    @rule(members=st.lists(st.tuples(INDEX, INDEX), min_size=1, max_size=4))
    def begin_step(self, members: list[tuple[int, int]]) -> None:
        self.run.begin_step(self.counts(members))

    @precondition(in_step)
    @rule(which=INDEX)
    def store(self, which: int) -> None:
        missing = self.run.missing_layers()
        if missing:
            self.run.store(missing[which % len(missing)])

    @precondition(in_step)
    @rule()
    def commit(self) -> None:
        self.run.commit()

    @precondition(in_step)
    @rule()
    def abort_step(self) -> None:
        self.run.abort_step()

    @precondition(lambda self: in_step(self) and self.run.usable())
    @rule(index=INDEX)
    def change_inside_a_step(self, index: int) -> None:
        self.run.refuses_changes(self.pick(index))

    @precondition(lambda self: has_room(self) and self.run.usable())
    @rule(index=INDEX)
    def fork(self, index: int) -> None:
        self.run.fork(self.pick(index))

    @precondition(idle_and_open)
    @rule(index=INDEX, share=st.floats(0, 1))
    def truncate(self, index: int, share: float) -> None:
        seq_id = self.pick(index)
        self.run.truncate(seq_id, round(share * len(self.run.sequences[seq_id].tokens)))

    @precondition(idle_and_open)
    @rule(index=INDEX, chosen=st.sets(INDEX, max_size=3))
    def evict(self, index: int, chosen: set[int]) -> None:
        seq_id = self.pick(index)
        blocks = self.run.evictable(seq_id)
        self.run.evict(seq_id, sorted({blocks[i % len(blocks)] for i in chosen} if blocks else []))
        self.run.refuse_eviction(seq_id)

    @precondition(idle_and_open)
    @rule(index=INDEX, first=st.integers(0, 70), last=st.integers(0, 150))
    def keep_first_last(self, index: int, first: int, last: int) -> None:
        self.run.keep_first_last(self.pick(index), first, last)

    @precondition(idle_and_open)
    @rule(chosen=st.sets(INDEX, min_size=1, max_size=2))
    def close(self, chosen: set[int]) -> None:
        self.run.close(sorted({self.pick(index) for index in chosen}))

    @precondition(lambda self: idle(self) and self.run.on_host())
    @rule(index=INDEX)
    def close_on_the_host(self, index: int) -> None:
        self.run.close([self.run.on_host()[index % len(self.run.on_host())]])

    @precondition(lambda self: self.run.away)
    @rule(index=INDEX)
    def use_on_the_host(self, index: int) -> None:
        self.run.refuses_uses(sorted(self.run.away)[index % len(self.run.away)])

    @precondition(lambda self: idle(self) and (self.run.usable() or self.run.on_host()))
    @rule(chosen=st.sets(INDEX, min_size=1, max_size=2), at_once=st.booleans(), out=st.booleans())
    def swap(self, chosen: set[int], at_once: bool, out: bool) -> None:
        out = bool(self.run.usable()) if not self.run.on_host() else out and self.run.usable()
        ids = self.run.usable() if out else self.run.on_host()
        members = sorted({ids[index % len(ids)] for index in chosen})
        if at_once:
            self.run.swap(bool(out), members)
        elif len(self.run.swaps) < 3:
            self.run.begin_swap(bool(out), members)

    @precondition(lambda self: self.run.swaps)
    @rule(index=INDEX)
    def copy_swap(self, index: int) -> None:
        self.run.copy_swap(index % len(self.run.swaps))

    @precondition(lambda self: idle(self) and self.run.swaps)
    @rule(index=INDEX, commit=st.sampled_from([True, True, False]))
    def end_swap(self, index: int, commit: bool) -> None:
        self.run.end_swap(index % len(self.run.swaps), commit)

    @invariant()
    def agree(self) -> None:
        self.run.check()


@pytest.mark.parametrize(("page_size", "windows"), SHAPES)
def test_every_operation_agrees_with_the_model(page_size, windows):
    # A class of its own per shape: Hypothesis derives the examples from the name.
    name = f"Machine{page_size}Window{windows}"
    machine = type(name, (CacheMachine,), {"page_size": page_size, "windows": windows})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=10,
            stateful_step_count=20,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def random_operation(run: CheckedCache, rng: np.random.Generator) -> list[int]:
    """Do something; return the sequences it concerned (those that still exist)."""
    size = run.config.page_size
    ids = run.usable()
    if run.step is not None:
        members = list(run.step.chunks)
        kind = rng.integers(5)
        if kind < 3 and len(run.step.stored) < LAYERS:
            run.store(run.missing_layers()[0])
        elif kind == 3:
            run.abort_step()
        else:
            run.commit()
        return members
    if not ids and run.sequences and rng.random() < 0.7:
        return random_swap(run, rng)
    if not ids or (len(ids) < MAX_SEQUENCES and rng.random() < 0.05):
        return [run.open()]
    if rng.random() < 0.15:
        return random_swap(run, rng)
    one = int(rng.choice(ids))
    length = len(run.sequences[one].tokens)
    kind = rng.random()
    if kind < 0.5:
        chosen = rng.permutation(ids)[: rng.integers(1, 4)].tolist()
        counts = {seq_id: int(rng.choice(chunk_sizes(size))) for seq_id in chosen}
        done = run.append(counts) if kind < 0.25 else run.begin_step(counts)
        if not done:
            run.close([one])
            chosen = [seq_id for seq_id in chosen if seq_id != one]
        return chosen
    if kind < 0.6 and len(ids) < MAX_SEQUENCES:
        return [one, run.fork(one)]
    if kind < 0.75:
        low = max(0, length - 3 * size) if rng.random() < 0.7 else 0
        run.truncate(one, int(rng.integers(low, length + 1)))
    elif kind < 0.87:
        blocks = run.evictable(one)
        run.evict(one, sorted(rng.permutation(blocks)[: rng.integers(1, 3)].tolist()))
        run.refuse_eviction(one)
    elif kind < 0.97:
        run.keep_first_last(one, int(rng.integers(0, 2 * size)), int(rng.integers(0, 4 * size)))
    else:
        run.close([one])
        return []
    return [one]


def random_swap(run: CheckedCache, rng: np.random.Generator) -> list[int]:
    """Begin, copy or end a swap, or swap in one call."""
    if run.swaps and (len(run.swaps) > 2 or rng.random() < 0.5):
        at = int(rng.integers(len(run.swaps)))
        concerned = run.swaps[at][0].seq_ids.tolist()
        if rng.random() < 0.3:
            run.copy_swap(at)
        else:
            run.end_swap(at, bool(rng.random() < 0.8))
        return concerned
    out = bool(rng.random() < 0.4)
    ids = run.usable() if out else run.on_host()
    if not ids:
        return []
    members = rng.permutation(ids)[: rng.integers(1, 3)].tolist()
    if rng.random() < 0.5:
        run.swap(out, members)
    else:
        run.begin_swap(out, members)
    return members


def walk(run: CheckedCache, operations: int, full_check_every: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for number in range(operations):
        concerned = random_operation(run, rng)
        if number % full_check_every:
            left = [seq_id for seq_id in concerned if seq_id in run.sequences]
            run.check(left[-1:], [number % LAYERS])
        else:
            run.check()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("page_size", "windows"), SHAPES)
def test_a_random_walk_agrees_with_the_model_in_every_format(name, page_size, windows):
    number = FORMATS.index(name) + SHAPES.index((page_size, windows))
    kv_dtype = KV_DTYPES[number % 3]
    run = CheckedCache(name, kv_dtype, page_size, windows * page_size, num_pages=30, num_slots=5)
    walk(run, 50, 7, seed=number)


def test_a_walk_of_thousands_of_operations_agrees_with_the_model():
    run = CheckedCache("mixed", "f16", 16, 32, num_pages=40, num_slots=4)
    walk(run, 2500, 60, seed=7)
