"""A fault at every allocation of the block manager in turn: it can be repeated, nothing changed."""

from __future__ import annotations

import pytest

from pagedtq.serving import Blocks
from tests.paging.faults import Fault, Faults
from tests.serving.served import COMMON, SIZE, admit, manager_of, request_of
from tests.table_snapshot import logical


def state(manager, **options):
    holdings = {
        name: (manager.get_block_ids(name), manager.tables.num_published(holding.seq_id))
        for name, holding in manager._holdings.items()
    }
    events = None if manager._log is None else list(manager._log._events)
    tables = logical(manager.tables, **options)
    # A sequence that was opened and closed again leaves its count behind, for plans and exports.
    del tables["version"], tables["touched"]
    return tables, holdings, events


class World:
    """Requests that run beside each other, and one that was freed; the same every time."""

    def __init__(self) -> None:
        self.manager = manager = manager_of(60, enable_events=True)
        self.running = request_of("running", COMMON + [3] * 7)
        admit(manager, self.running)
        gone = request_of("gone", [*range(200, 200 + 4 * SIZE), 5])
        admit(manager, gone)
        manager.free(gone)
        # The next request needs more rows.
        manager.tables.open_many(len(manager.tables._free_rows))
        self.found, self.num_found = manager.get_computed_blocks(self.begun())

    def begun(self):
        return request_of("begun", [*range(200, 200 + 4 * SIZE), *[6] * (20 * SIZE)])

    def admit(self, **options):
        request, first = self.begun(), 2 * SIZE
        return self.manager.allocate_slots(request, first, self.num_found, self.found, **options)

    def decode(self, count, **options):
        self.running.append([4] * (count - (self.running.num_tokens - 55)))
        self.running.num_computed_tokens = 55
        return self.manager.allocate_slots(self.running, count, **options)


#: Calls that take pages.
OPERATIONS = {
    "a new request": lambda w: w.manager.allocate_slots(request_of("new", [9] * 40), 40),
    "a request on found blocks": lambda w: w.admit(),
    "with room for drafts": lambda w: w.admit(num_lookahead_tokens=3 * SIZE),
    "all of it must fit": lambda w: w.admit(full_sequence_must_fit=True),
    "tokens from elsewhere": lambda w: w.admit(num_external_computed_tokens=SIZE),
    "published later": lambda w: w.admit(delay_cache_blocks=True),
    "a page of a running request": lambda w: w.decode(12),
    "more than its row has room for": lambda w: w.decode(20 * SIZE),
    "a running request and drafts": lambda w: w.decode(1, num_lookahead_tokens=2 * SIZE),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_at_any_allocation_of_a_request_changes_nothing_and_it_can_be_repeated(
    name, monkeypatch
):
    operation, whole = OPERATIONS[name], World()
    expected = operation(whole)
    assert isinstance(expected, Blocks) and len(expected) > 0
    faults, number = Faults(monkeypatch), 0
    while True:
        number += 1
        faults.arm(None)
        world = World()
        before = state(world.manager)
        faults.arm(number)
        try:
            operation(world)
        except Fault:
            faults.arm(None)
            assert state(world.manager) == before
            world.manager.tables.check_integrity()
            assert operation(world) == expected
            assert state(world.manager, elsewhere=True) == state(whole.manager, elsewhere=True)
            continue
        break
    assert number > 1, "no allocation was made: the test proves nothing"
