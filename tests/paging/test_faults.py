"""A fault at every allocation in turn: the call fails, nothing has changed, and it works again."""

from __future__ import annotations

import pytest

from pagedtq.paging import PageTables, SharingOptions
from tests.paging.faults import Fault, Faults
from tests.table_snapshot import logical

SIZE = 4


class World:
    """Tables in which every kind of sharing is going on; the same every time it is made."""

    def __init__(self, window: int = SIZE, sharing: bool = True) -> None:
        self.tables = tables = PageTables(
            SIZE,
            80,
            window,
            2 if window else 0,
            9 if window else 0,
            SharingOptions() if sharing else None,
            num_host_pages=40,
        )
        tokens = list(range(30))
        self.parent = self.filled(tokens)
        self.child = tables.fork(self.parent)
        self.found = self.filled([*tokens[:12], 77, 78])
        self.short = self.filled([5, 6])
        self.twig = tables.fork(self.short)
        # One on the host whose blocks can be found in the free queue, among holes.
        self.away = self.filled([50 + at for at in range(14)])
        tables.commit_swap(tables.begin_swap_out([self.away]))
        tables.close(self.filled([90 + at for at in range(9)]))
        self.fence = tables.fences.open()
        tables.close(self.filled([200 + at for at in range(9)]))
        self.empty = tables.open()

    def filled(self, tokens: list[int]) -> int:
        seq_id = self.tables.open(tokens)
        rest = len(tokens) - self.tables.length_of(seq_id)
        self.tables.commit(self.tables.reserve([seq_id], rest))
        return seq_id


def other_image():
    tables = PageTables(SIZE, 60, SIZE, 2, 4)
    ids = [tables.open() for _ in range(20)]
    tables.commit(tables.reserve(ids[:2], [9, 70]))
    return tables.extract([*ids, tables.fork(ids[0])], True).image


def fill_rows(world: World) -> None:
    """Let the next sequence need more rows."""
    world.tables.open_many(len(world.tables._free_rows))


def begin(world: World) -> None:
    world.begun = world.tables.open([3] * 5)


def nothing(world: World) -> None:
    pass


#: What is done before, and the operation itself.
OPERATIONS = {
    "open": (fill_rows, lambda w: w.tables.open([1, 2, 3])),
    "open many": (nothing, lambda w: w.tables.open_many(40)),
    "open on a prefix": (fill_rows, lambda w: w.tables.open(list(range(30)))),
    "fork": (fill_rows, lambda w: w.tables.fork(w.parent)),
    "begin with tokens": (begin, lambda w: w.tables.reserve([w.begun, w.empty], [5, 60])),
    "copy on write": (nothing, lambda w: w.tables.reserve([w.child, w.parent], [1, 3])),
    "copy block 0": (nothing, lambda w: w.tables.reserve([w.twig, w.short], [1, 1])),
    "a mixed step": (
        nothing,
        lambda w: w.tables.reserve([w.twig, w.child, w.empty, w.found], [40, 1, 3, 2]),
    ),
    "lengthen": (nothing, lambda w: w.tables.lengthen(w.found, 60)),
    "swap out": (nothing, lambda w: w.tables.begin_swap_out([w.child, w.parent, w.twig])),
    "swap in": (nothing, lambda w: w.tables.begin_swap_in([w.away])),
    "adopt": (nothing, lambda w: w.tables.adopt(w.tables.plan_adoption(other_image(), True))),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_at_any_allocation_changes_nothing_and_the_call_can_be_repeated(name, monkeypatch):
    prepare, operation = OPERATIONS[name]
    whole = World()
    prepare(whole)
    operation(whole)
    faults, number = Faults(monkeypatch), 0
    while True:
        number += 1
        faults.arm(None)
        world = World()
        prepare(world)
        before = logical(world.tables)
        faults.arm(number)
        try:
            operation(world)
        except Fault:
            faults.arm(None)
            assert logical(world.tables) == before
            world.tables.check_integrity()
            operation(world)
            assert logical(world.tables, elsewhere=True) == logical(whole.tables, elsewhere=True)
            continue
        break
    assert number > 1, "no allocation was made: the test proves nothing"


@pytest.mark.parametrize(("window", "name"), [(0, "found"), (0, "empty"), (SIZE, "empty")])
def test_a_fault_in_a_request_by_request_call_changes_nothing(window, name, monkeypatch):
    faults, number = Faults(monkeypatch), 0
    while True:
        number += 1
        faults.arm(None)
        world = World(window, sharing=False)
        before = logical(world.tables)
        faults.arm(number)
        try:
            world.tables.lengthen(getattr(world, name), 90)
        except Fault:
            assert logical(world.tables) == before
            world.tables.check_integrity()
            continue
        break
    assert number > 2
