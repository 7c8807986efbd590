"""Decoding on: what is worked out once for a batch must be what every step would have found."""

from __future__ import annotations

import random
from collections import Counter
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagedtq.errors import PagedTQError
from pagedtq.paging import PageTables, Retention, SharingOptions


class Told:
    """All that an observer of the prefix index is told, in order."""

    def __init__(self) -> None:
        self.events: list[object] = []

    def stored(self, keys, parent, tokens):
        self.events.append(("stored", *keys, parent, tokens.tolist()))

    def removed(self, key):
        self.events.append(("removed", key))

    def cleared(self):
        self.events.append("cleared")


class Side:
    """Tables under test, or the same that forget after every call what they learnt of a batch."""

    def __init__(self, page_size, runs, sharing, observed, retained):
        num_pages = 40 if page_size > 1 else 120
        self.tables = PageTables(
            page_size, num_pages, sharing=SharingOptions() if sharing else None, num_host_pages=30
        )
        self.runs, self.ids, self.told = runs, [], Told()
        if sharing and observed:
            self.tables.prefix.observer = self.told
        self.now = 0.0
        self.retention = Retention(self.tables, 0.3, lambda: self.now) if retained else None
        self.num_run_steps = 0

    def do(self, operation):
        """Return what an operation returns or how it is refused, without ids of sequences."""
        if not self.runs:
            self.tables._run, self.tables._decoded = None, (None, 0)
        try:
            return operation(self)
        except PagedTQError as error:
            return type(error).__name__

    def step(self, members, counts, tokens, end, drafts):
        tables = self.tables
        plan = tables.reserve([self.ids[at] for at in members], counts, tokens)
        self.num_run_steps += tables._run is not None
        seen = [
            plan.slot_mapping.tolist(),
            plan.new_pages.tolist(),
            plan.cow_src.tolist(),
            plan.cow_dst.tolist(),
            plan.filled_pages.tolist(),
            plan.num_new.tolist(),
            [field.tolist() for field in (*plan.old, *plan.new)],
            [self.ids.index(one) for one in plan.seq_ids.tolist()],
        ]
        if end == "abort":
            return [*seen, tables.abort(plan).tolist()]
        tables.commit(plan, plan.old.length + drafts if end == "drafts" else None)
        return seen

    def state(self):
        tables = self.tables
        rows = np.flatnonzero(tables._ids >= 0)
        pool, prefix = tables.pool, tables.prefix
        state = [
            rows.tolist(),
            tables._fields[:, rows].tolist(),
            tables._touched[:, rows].tolist(),
            tables._table[rows].tolist(),
            pool.ref_counts.tolist(),
            pool.free_ids().tolist(),
            pool.parked_ids().tolist(),
            [part.tolist() for part in tables._twins.pairs()],
            tables.version,
            self.told.events,
        ]
        if prefix is not None:
            state += [[prefix.key_of(page) for page in range(pool.num_pages)], prefix._first]
            state += [prefix.num_pages_held, prefix.num_forgotten]
            state += [{key: prefix.pages_of(key) for key in prefix._first}]
            state += [{row: chain.keys for row, chain in tables._chains.items()}]
            known = [
                tables._table[row, at // tables.page_size] * tables.page_size
                + at % tables.page_size
                for row in rows[tables._away[rows] < 2]
                for at in range(tables._known[row])
            ]
            state.append(tables._page_tokens.reshape(-1)[known].tolist())
        return state


PROMPTS = [[], [1, 2, 3], list(range(5)), list(range(8)), list(range(11)), [9] * 16, None]
CHANGES = ["step", "fork", "truncate", "evict", "hide", "forget", "swap out", "swap in"]
CHANGES += ["keep", "pass time"] * 2 + ["fence"]


def some_action(rng):
    """Return what to do next; mostly a batch decodes on."""
    what = rng.choices(["decode", "open", "close", "change"], [8, 3, 2, 2])[0]
    if what == "open":
        salt, extras = rng.choice([b"", b"", b"salt"]), rng.choice([None] * 3 + [{1: b"a"}])
        return what, rng.choice(PROMPTS), salt, rng.choice([extras, extras, {4: b"b"}])
    if what == "decode":
        # Often the batch of the last time, whatever was done to its members since.
        picks = range(rng.choice([1, 2, 3, 3])) if rng.random() < 0.6 else rng.sample(range(8), 3)
        kind = rng.choice(["new"] * 4 + ["alike"] * 8 + ["none"])
        end = rng.choice(["commit"] * 6 + ["abort", "drafts"])
        times = rng.randint(3, 13)
        return what, picks, times, kind, rng.random() < 0.5, end, rng.randrange(times)
    if what == "change":
        what = rng.choice(CHANGES)
    if what == "step":
        picks = [(rng.randrange(8), rng.randint(0, 6)) for _ in range(rng.randint(1, 4))]
        return what, picks, rng.choice(["commit", "abort", "drafts"]), rng.randint(0, 3)
    if what == "forget":
        return what, rng.randint(1, 39)
    return what, rng.randrange(8), rng.choice([0, 100]) if what == "keep" else rng.randrange(64)


def operations_of(action, num_open, clock):
    """Return what is done on both sides, as functions of a side."""
    what, *rest = action
    if what == "open":
        prompt, salt, extras = rest

        def opened(side):
            named = {} if prompt is None else {"salt": salt, "extra_keys": extras}
            side.ids.append(side.tables.open(prompt, **named))
            left = len(prompt or ()) - side.tables.length_of(side.ids[-1])
            return side.step([len(side.ids) - 1], left, None, "commit", 0) if left else []

        return [opened]
    if what in ("pass time", "fence"):
        return [passed if what == "pass time" else fenced]
    if what == "forget":
        return [lambda side: side.tables.forget_blocks([rest[0]])]
    if not num_open:
        return []
    if what == "decode":
        picks, times, kind, listed, end, place = rest
        members = sorted({pick % num_open for pick in picks})
        counts = [1] * len(members) if listed else 1
        common = {"members": members, "counts": counts, "drafts": 0}
        steps = []
        for time in range(times):
            clock[0] += 1
            tokens = [(clock[0] * 7 + at) % 5 if kind == "new" else 3 for at in members]
            tokens = None if kind == "none" else np.array(tokens, np.int32)
            # One of them may end otherwise.
            odd = end if time == place else "commit"
            steps.append(partial(Side.step, **common, tokens=tokens, end=odd))
        return steps
    if what == "step":
        chosen = {pick % num_open: count for pick, count in rest[0]}
        tokens = np.arange(sum(chosen.values())) % 4
        return [lambda side: side.step(list(chosen), [*chosen.values()], tokens, *rest[1:])]
    at = rest[0] % num_open
    return [lambda side: CHANGE[what](side, at, *rest[1:])]


def passed(side):
    side.now += 1.0


def fenced(side):
    fences = side.tables.fences
    return fences.close(next(iter(fences._open))).tolist() if fences.num_open else fences.open()


def closed(side, at):
    return side.tables.close(side.ids.pop(at)).tolist()


def forked(side, at):
    side.ids.append(side.tables.fork(side.ids[at]))


def truncated(side, at, to):
    length = side.tables.length_of(side.ids[at])
    return side.tables.truncate(side.ids[at], to % (length + 1)).tolist()


def evicted(side, at, block):
    full = side.tables.length_of(side.ids[at]) // side.tables.page_size
    return side.tables.evict(side.ids[at], [block % full] if full else []).tolist()


def hidden(side, at, start):
    length = side.tables.length_of(side.ids[at])
    side.tables.set_start(side.ids[at], 0, start % (length + 1))


def swapped(side, at, begin):
    plan = getattr(side.tables, begin)([side.ids[at]])
    return side.tables.commit_swap(plan).tolist()


def kept(side, at, priority):
    if side.retention is not None:
        side.retention.keep(side.ids[at], priority, seconds=2.0)


CHANGE = {
    "fork": lambda side, at, _: forked(side, at),
    "truncate": truncated,
    "evict": evicted,
    "hide": hidden,
    "close": lambda side, at, _: closed(side, at),
    "swap out": lambda side, at, _: swapped(side, at, "begin_swap_out"),
    "swap in": lambda side, at, _: swapped(side, at, "begin_swap_in"),
    "keep": kept,
}


@pytest.mark.parametrize(
    ("page_size", "sharing", "observed", "retained"),
    [
        (4, True, False, False),
        (4, True, True, True),
        (3, True, True, False),
        (1, True, False, False),
        (4, False, False, False),
    ],
)
def test_decoding_on_does_what_each_step_alone_would(page_size, sharing, observed, retained):
    totals = Counter()

    @settings(
        max_examples=25, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.integers(0, 1 << 32), st.integers(15, 45))
    def compare(seed, num_actions):
        rng, clock = random.Random(seed), [0]
        sides = [Side(page_size, runs, sharing, observed, retained) for runs in (True, False)]
        for _ in range(num_actions):
            for operation in operations_of(some_action(rng), len(sides[0].ids), clock):
                with_runs, without = (side.do(operation) for side in sides)
                assert with_runs == without
                assert sides[0].state() == sides[1].state()
            sides[0].tables.check_integrity()
        totals["run steps"] += sides[0].num_run_steps
        assert sides[1].num_run_steps == 0

    compare()
    assert totals["run steps"] > 200, "hardly any step was part of a run: the law proves little"


def decoding(page_size, steps, *, retained=None, num_pages=40):
    """Return tables whose two sequences have decoded so many steps, and their ids."""
    tables = PageTables(page_size, num_pages, sharing=SharingOptions())
    retention = None if retained is None else Retention(tables, 0.3, retained)
    ids = [tables.open([first]) for first in (7, 8)]
    for at in range(steps):
        decode(tables, ids, at)
    assert tables._run is not None
    return tables, ids, retention


def decode(tables, ids, at):
    plan = tables.reserve(ids, 1, [7, 8] if at == 0 else [100 + at, 200 + at])
    tables.commit(plan)
    return plan


def test_a_fork_within_a_run_makes_the_next_step_copy_the_open_page():
    tables, ids, _ = decoding(4, 6)
    child = tables.fork(ids[0])
    shared = int(tables.block_table(ids)[0, 1])
    plan = decode(tables, ids, 6)
    assert plan.cow_src.tolist() == [shared]
    assert tables.block_table([child])[0, 1] == shared != tables.block_table(ids)[0, 1]


def test_tokens_hidden_within_a_run_keep_its_blocks_from_being_published():
    tables, ids, _ = decoding(4, 6)
    tables.set_start(ids[0], 0, 3)
    for at in range(6, 12):
        decode(tables, ids, at)
    assert [tables.num_published(seq) for seq in ids] == [1, 3]


def test_priorities_end_within_a_run_as_they_would_without():
    now = [0.0]
    # One page of room: what is taken next is what is cached, by priority.
    tables, ids, retention = decoding(4, 6, retained=lambda: now[0], num_pages=8)
    kept = []
    for first, seconds in ((50, 5.0), (60, None)):
        seq = tables.open([first] * 4)
        tables.commit(tables.reserve([seq], 4))
        retention.keep(seq, 100 if seconds else 50, seconds=seconds)
        kept.append(int(tables.block_table([seq])[0, 0]))
        tables.close(seq)
    decode(tables, ids, 6)
    decode(tables, ids, 7)
    assert tables._run is not None
    assert tables.pool.num_free == 3
    now[0] = 6.0
    plan = decode(tables, ids, 8)
    assert tables._run is not None
    assert kept[0] in plan.new_pages.tolist()
    assert kept[1] not in plan.new_pages.tolist()
