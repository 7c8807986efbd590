"""Fences: what is freed while work in flight may read it is not taken before that work is done."""

from __future__ import annotations

import random
from concurrent.futures import Future

import numpy as np
import pytest

from pagedtq.errors import ArgumentError, ArgumentTypeError, IntegrityError, OutOfPages
from pagedtq.paging import PageTables, SharingOptions

SIZE = 4


def tables_of(num_pages=11, window=0, num_slots=0, **options) -> PageTables:
    return PageTables(SIZE, num_pages, window, 2 if window else 0, num_slots, **options)


def filled(tables, num_tokens, **opening):
    seq_id = tables.open(**opening)
    known = int(tables.lengths([seq_id])[0])
    tables.commit(tables.reserve([seq_id], num_tokens - known))
    return seq_id


class Signal:
    def __init__(self, done=False):
        self.done = done


def test_pages_freed_behind_a_fence_rejoin_in_release_order_when_it_passes():
    tables = tables_of()
    first, second = filled(tables, 12), filled(tables, 8)
    epoch = tables.fences.open()
    assert tables.close(second).tolist() == [5, 4]
    assert tables.close(first).tolist() == [3, 2, 1]
    assert tables.pool.free_ids().tolist() == [6, 7, 8, 9, 10]
    assert tables.pool.parked_ids().tolist() == [5, 4, 3, 2, 1]
    assert (tables.pool.num_free, tables.pool.num_used, tables.fences.num_parked) == (5, 0, 5)
    tables.check_integrity()
    assert tables.fences.close(epoch).tolist() == [5, 4, 3, 2, 1]
    assert tables.pool.free_ids().tolist() == [6, 7, 8, 9, 10, 5, 4, 3, 2, 1]
    assert (tables.pool.num_free, tables.fences.num_parked, tables.fences.num_open) == (10, 0, 0)
    tables.check_integrity()


def test_parked_pages_are_not_handed_out():
    tables = tables_of()
    first = filled(tables, 20)
    epoch = tables.fences.open()
    tables.close(first)
    other = tables.open()
    with pytest.raises(OutOfPages) as caught:
        tables.reserve([other], 6 * SIZE)
    assert (caught.value.need, caught.value.free, caught.value.total) == (6, 5, 10)
    plan = tables.reserve([other], 5 * SIZE)
    assert plan.new_pages.tolist() == [6, 7, 8, 9, 10]
    tables.commit(plan)
    tables.fences.close(epoch)
    assert tables.reserve([other], 1).new_pages.tolist() == [5]


def test_a_page_waits_for_every_fence_that_was_open_when_it_was_released():
    tables = tables_of()
    one, two, three = (filled(tables, SIZE) for _ in range(3))
    first = tables.fences.open()
    tables.close(one)
    second = tables.fences.open()
    tables.close(two)
    assert tables.fences.close(second).tolist() == []
    tables.close(three)
    assert tables.pool.parked_ids().tolist() == [1, 2, 3]
    assert tables.fences.close(first).tolist() == [1, 2, 3]


def test_a_page_does_not_wait_for_a_fence_that_was_opened_later():
    tables = tables_of()
    one, two = filled(tables, SIZE), filled(tables, SIZE)
    first = tables.fences.open()
    tables.close(one)
    second = tables.fences.open()
    tables.close(two)
    assert tables.fences.close(first).tolist() == [1]
    assert tables.pool.parked_ids().tolist() == [2]
    tables.check_integrity()
    assert tables.fences.close(second).tolist() == [2]


def test_what_is_released_without_a_fence_is_free_at_once():
    tables = tables_of()
    epoch = tables.fences.open()
    one = filled(tables, SIZE)
    assert tables.fences.close(epoch).size == 0
    tables.close(one)
    assert tables.pool.num_free == 10


def test_a_parked_page_that_holds_a_block_is_found_without_waiting():
    tables = tables_of(sharing=SharingOptions(leave_last=False))
    tokens = list(range(8))
    first = filled(tables, 8, token_ids=tokens)
    epoch = tables.fences.open()
    tables.close(first)
    assert tables.pool.parked_ids().tolist() == [2, 1]
    second = tables.open(tokens)
    assert tables.block_table([second]).tolist() == [[1, 2]]
    assert (tables.pool.num_free, tables.fences.num_parked) == (8, 0)
    tables.check_integrity()
    tables.truncate(second, 4)
    assert tables.pool.parked_ids().tolist() == [2]
    assert tables.fences.close(epoch).tolist() == [2]
    tables.check_integrity()


def test_found_pages_that_are_parked_cost_no_free_page():
    tables = tables_of(sharing=SharingOptions())
    first = filled(tables, 8, token_ids=range(8))
    tables.fences.open()
    assert tables.pool.num_leaving([1, 2]) == 0
    tables.close(first)
    assert tables.pool.num_leaving([1, 2]) == 0
    assert tables.pool.num_leaving([1, 2, 3, 3]) == 1


def test_window_slots_and_sink_records_wait_as_well():
    tables = tables_of(window=SIZE, num_slots=2)
    one, two = filled(tables, 6), filled(tables, 6)
    epoch = tables.fences.open()
    tables.close([one, two])
    assert (tables.windows.num_free, tables.windows.num_parked) == (0, 2)
    assert tables.windows._records.num_parked == 2
    tables.check_integrity()
    tables.fences.close(epoch)
    assert (tables.windows.num_free, tables.windows._records.num_free) == (2, 2)
    tables.check_integrity()


def test_a_sequence_begun_anew_behind_a_fence_has_no_sinks_if_no_record_is_left():
    tables = tables_of(window=SIZE, num_slots=1)
    one = filled(tables, 6)
    epoch = tables.fences.open()
    tables.truncate(one, 0)
    tables.commit(tables.reserve([one], 6))
    assert tables.state(one) == (6, 4, 2, 0)
    tables.check_integrity()
    tables.fences.close(epoch)
    tables.check_integrity()


def test_events_close_their_fences_when_polled():
    tables, early, late = tables_of(), Signal(), Signal()
    one, two = filled(tables, SIZE), filled(tables, SIZE)
    tables.fences.open(early)
    tables.close(one)
    tables.fences.open(late)
    tables.close(two)
    assert tables.fences.poll().tolist() == []
    late.done = True
    assert tables.fences.poll().tolist() == []
    assert tables.fences.num_open == 1
    early.done = True
    assert tables.fences.poll().tolist() == [1, 2]
    assert tables.fences.poll().tolist() == []


def test_a_fence_without_an_event_waits_for_its_close():
    tables = tables_of()
    epoch = tables.fences.open()
    tables.fences.poll()
    assert tables.fences.num_open == 1
    tables.fences.close(epoch)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda fences: fences.close(2), ArgumentError),
        (lambda fences: fences.close(0), ArgumentError),
        (lambda fences: fences.close(True), ArgumentTypeError),
        (lambda fences: fences.close(1.0), ArgumentTypeError),
        (lambda fences: fences.open(object()), ArgumentError),
        # A method would always count as true.
        (lambda fences: fences.open(Future()), ArgumentError),
        (lambda fences: fences.open(Signal(None)), ArgumentError),
        (lambda fences: fences.open(Signal(1)), ArgumentError),
    ],
)
def test_a_wrong_epoch_or_event_is_refused_and_changes_nothing(call, error):
    tables = tables_of()
    epoch = tables.fences.open()
    with pytest.raises(error):
        call(tables.fences)
    assert (tables.fences.num_open, tables.fences.close(epoch).size) == (1, 0)
    with pytest.raises(ArgumentError, match="open are none"):
        tables.fences.close(epoch)


def test_integrity_finds_a_wrong_count_of_parked_pages():
    tables = tables_of()
    one = filled(tables, SIZE)
    tables.fences.open()
    tables.close(one)
    tables.check_integrity()
    tables.pool._queue._parked = 0
    with pytest.raises(IntegrityError, match="parked"):
        tables.check_integrity()


@pytest.mark.parametrize("seed", range(4))
def test_random_releases_behind_random_fences_agree_with_a_list_of_lists(seed):
    """The model: a free list, and parked pages with the set of fences each of them waits for."""
    rng = random.Random(seed)
    tables = tables_of(40)
    pool, fences = tables.pool, tables.fences
    free, owned = list(range(1, 40)), []
    parked: list[tuple[int, set[int]]] = []
    waiting: set[int] = set()
    for _ in range(3000):
        kind = rng.random()
        if kind < 0.3:
            count = rng.randint(0, len(free))
            assert pool.acquire(count).tolist() == free[:count]
            owned += free[:count]
            del free[:count]
        elif kind < 0.7:
            rng.shuffle(owned)
            count = rng.randint(0, len(owned))
            pool.release(np.array(owned[:count], np.int32))
            # Later fences include the earlier ones that are still open.
            fresh = owned[:count]
            del owned[:count]
            if waiting:
                parked += [(page, set(waiting)) for page in fresh]
            else:
                free += fresh
        elif kind < 0.8 and parked:
            page, _ = parked.pop(rng.randrange(len(parked)))
            pool.touch([page])
            owned.append(page)
        elif kind < 0.9 and len(waiting) < 4:
            waiting.add(fences.open())
        elif waiting:
            epoch = rng.choice(sorted(waiting))
            waiting.discard(epoch)
            back = fences.close(epoch).tolist()
            for _, waits in parked:
                waits.discard(epoch)
            # Pages rejoin in release order: a page never overtakes one released before it.
            rejoined = [page for page, waits in parked if not waits]
            assert back == rejoined
            parked = [(page, waits) for page, waits in parked if waits]
            free += rejoined
        assert pool.free_ids().tolist() == free
        assert pool.parked_ids().tolist() == [page for page, _ in parked]
        assert (pool.num_free, pool.num_used) == (len(free), len(owned))
        pool.check_integrity()
