"""Which cached pages are reused first: least recently freed, priorities with an end, pins."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    IntegrityError,
    OutOfEvictablePages,
    OutOfPages,
    PinLimit,
    StepError,
    SwappedError,
    UnknownSequence,
)
from pagedtq.paging import (
    ByPriority,
    EvictionPlan,
    EvictLowest,
    OldestFirst,
    PageTables,
    Retention,
    SharingOptions,
    evictable_blocks,
    eviction,
    plan_free,
)
from pagedtq.paging.free_queue import FreeQueue
from pagedtq.paging.retained_queue import DEFAULT_PRIORITY
from tests.table_snapshot import snapshot

SIZE = 16


class Clock:
    """Time that tests set."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def tables_of(num_pages=11, share=1.0, window=0):
    clock = Clock()
    tables = PageTables(SIZE, num_pages, window, 4 if window else 0, 4, SharingOptions())
    return tables, Retention(tables, share, clock), clock


def prompt(number, blocks, rest=0):
    return [number * 1000 + at for at in range(blocks * SIZE + rest)]


def admit(tables, tokens):
    """Open a sequence, compute what is not there; return it and its pages."""
    seq = tables.open(tokens)
    tables.commit(tables.reserve([seq], len(tokens) - tables.length_of(seq)))
    return seq, tables.block_table([seq])[0].tolist()


def free_order(tables):
    return tables.pool.free_ids().tolist()


# -- the default: least recently freed first ------------------------------------------------------


def test_pages_are_re_used_least_recently_freed_first_and_a_hit_makes_them_recent():
    """The literal ids of vLLM's prefix caching tests: 10 pages, sequences of 6 and 3 blocks."""
    tables = PageTables(SIZE, 11, sharing=SharingOptions())
    first, pages = admit(tables, prompt(1, 5, 7))
    second, others = admit(tables, prompt(2, 3))
    assert (pages, others) == ([1, 2, 3, 4, 5, 6], [7, 8, 9])
    tables.close(first)
    tables.close(second)
    assert free_order(tables) == [10, 6, 5, 4, 3, 2, 1, 9, 8, 7]
    third, found = admit(tables, [*prompt(1, 2), 5, 5, 5])
    assert found == [1, 2, 10]
    tables.close(third)
    # What was used last goes last; within a sequence its end goes first.
    assert free_order(tables) == [6, 5, 4, 3, 9, 8, 7, 10, 2, 1]


def test_without_priorities_a_retention_changes_no_order():
    """The same story with a retention attached in the middle of it."""
    tables = PageTables(SIZE, 11, sharing=SharingOptions())
    first, _ = admit(tables, prompt(1, 5, 7))
    second, _ = admit(tables, prompt(2, 3))
    tables.close(first)
    Retention(tables)
    tables.close(second)
    assert free_order(tables) == [10, 6, 5, 4, 3, 2, 1, 9, 8, 7]
    third, found = admit(tables, [*prompt(1, 2), 5, 5, 5])
    assert found == [1, 2, 10]
    tables.close(third)
    assert free_order(tables) == [6, 5, 4, 3, 9, 8, 7, 10, 2, 1]
    tables.check_integrity()


# -- priorities -----------------------------------------------------------------------------------


def test_lower_priorities_are_re_used_first_and_equal_ones_in_the_order_of_freeing():
    tables, retention, _ = tables_of()
    low, _ = admit(tables, prompt(1, 3))
    plain, _ = admit(tables, prompt(2, 2))
    high, _ = admit(tables, prompt(3, 3))
    assert retention.keep(low, 10, 0, 32) == 2
    assert retention.keep(high, 80, 0, 17) == 2
    for seq in (high, plain, low):
        tables.close(seq)
    # 10: pages 2, 1; 35: pages 9, 10 that were never used, 8, 5, 4, 3; 80: pages 7, 6.
    assert free_order(tables) == [2, 1, 9, 10, 8, 5, 4, 3, 7, 6]
    seq, pages = admit(tables, prompt(4, 9))
    assert pages == [2, 1, 9, 10, 8, 5, 4, 3, 7]
    tables.close(seq)
    # A page that was reused has lost its priority; page 6 still waits with its own.
    assert free_order(tables)[-1] == 6
    assert np.flatnonzero(retention.priorities != DEFAULT_PRIORITY).tolist() == [6]
    tables.check_integrity()


def test_a_page_of_low_priority_comes_before_one_of_high_priority_freed_earlier():
    """TensorRT-LLM's PriorityTest: 80 is freed before 5, and 5 is taken first."""
    tables, retention, _ = tables_of(3)
    first, (page_high,) = admit(tables, prompt(1, 1))
    second, (page_low,) = admit(tables, prompt(2, 1))
    retention.keep(first, 80)
    retention.keep(second, 5)
    tables.close(first)
    tables.close(second)
    assert free_order(tables) == [page_low, page_high] == [2, 1]


def test_a_hit_keeps_the_priority():
    tables, retention, _ = tables_of()
    seq, _ = admit(tables, prompt(1, 2))
    retention.keep(seq, 90)
    tables.close(seq)
    again, pages = admit(tables, [*prompt(1, 2), 7])
    assert pages == [1, 2, 3]
    assert retention.priorities[[1, 2, 3]].tolist() == [90, 90, 35]
    tables.close(again)
    assert free_order(tables) == [4, 5, 6, 7, 8, 9, 10, 3, 2, 1]
    tables.check_integrity()


def test_a_priority_ends_when_its_time_is_over_counted_from_the_last_owner():
    """TensorRT-LLM's TimedBlockTest: still 80 at 0, the default at 2 of 1, and then it is last."""
    tables, retention, clock = tables_of()
    seq, _ = admit(tables, prompt(1, 2))
    retention.keep(seq, 80, seconds=1)
    clock.now = 100
    retention.refresh()
    tables.close(seq)
    retention.refresh()
    assert retention.priorities[[1, 2]].tolist() == [80, 80]
    clock.now = 100.999
    retention.refresh()
    assert retention.priorities[[1, 2]].tolist() == [80, 80]
    assert free_order(tables)[-2:] == [2, 1]
    other, pages = admit(tables, prompt(2, 1))
    assert pages == [3]
    clock.now = 101
    tables.close(other)
    assert free_order(tables)[-2:] == [2, 1]
    retention.refresh()
    assert retention.priorities[[1, 2]].tolist() == [35, 35]
    assert free_order(tables) == [4, 5, 6, 7, 8, 9, 10, 3, 2, 1]
    third, _ = admit(tables, prompt(3, 1))
    tables.close(third)
    assert free_order(tables)[-3:] == [2, 1, 4]
    tables.check_integrity()


def test_steps_let_priorities_end_in_batches_and_one_by_one():
    for one_by_one in (False, True):
        tables, retention, clock = tables_of(4)
        seq, _ = admit(tables, prompt(1, 2))
        retention.keep(seq, 0, seconds=5)
        tables.close(seq)
        assert free_order(tables) == [2, 1, 3]
        clock.now = 6
        if one_by_one:
            assert tables.lengthen(tables.open(), 1) == [3]
        else:
            assert tables.reserve(tables.open_many(1), 1).new_pages.tolist() == [3]


def test_a_page_found_again_in_time_starts_its_time_anew():
    tables, retention, clock = tables_of()
    seq, _ = admit(tables, prompt(1, 1))
    retention.keep(seq, 80, seconds=10)
    tables.close(seq)
    clock.now = 9
    again, _ = admit(tables, [*prompt(1, 1), 1])
    clock.now = 30
    tables.close(again)
    clock.now = 39
    retention.refresh()
    assert retention.priorities[1] == 80
    clock.now = 40
    retention.refresh()
    assert retention.priorities[1] == 35


def test_an_evicted_block_is_given_no_priority():
    tables, retention, _ = tables_of()
    seq, _ = admit(tables, prompt(1, 3))
    tables.evict(seq, [1])
    assert retention.keep(seq, 80) == 2
    assert retention.priorities[:5].tolist() == [DEFAULT_PRIORITY, 80, DEFAULT_PRIORITY, 80, 35]


def test_blocks_of_live_sequences_go_by_priority():
    tables, retention, _ = tables_of(30)
    seq, _ = admit(tables, prompt(1, 6))
    retention.keep(seq, 0, 40, 64)
    retention.keep(seq, 100, 0, 16)
    plan = EvictLowest(ByPriority(retention), max_pages=2).plan(tables, seq)
    assert plan.blocks.tolist() == [1, 2, 3, 4]
    assert EvictLowest(ByPriority(retention), max_pages=4).plan(tables, seq).blocks.tolist() == [
        2,
        3,
    ]
    eviction.apply(tables, plan)
    tables.check_integrity()


# -- pins -----------------------------------------------------------------------------------------


def test_a_pinned_prefix_outlives_everything_that_passes_through_the_pool():
    tables, retention, _ = tables_of()
    seq, _ = admit(tables, prompt(1, 2, 5))
    assert retention.pin(seq, 0, 32).tolist() == [1, 2]
    tables.close(seq)
    assert tables.pool.num_free == 8
    for number in range(2, 9):
        other, pages = admit(tables, prompt(number, 8))
        assert not {1, 2} & set(pages)
        tables.close(other)
        tables.check_integrity()
    again, pages = admit(tables, prompt(1, 2, 5))
    assert pages[:2] == [1, 2]
    tables.close(again)
    assert retention.unpin([1, 2]).tolist() == [1, 2]
    assert free_order(tables)[-2:] == [1, 2]
    assert tables.num_cached_pages >= 2
    tables.check_integrity()


def test_a_cached_page_without_an_owner_can_be_pinned():
    tables, retention, _ = tables_of()
    seq, _ = admit(tables, prompt(1, 3))
    keys = tables.keys_of(seq)
    tables.close(seq)
    pages = tables.prefix.longest(keys)
    assert retention.pin_pages([*pages, pages[0]]).tolist() == pages
    assert retention.pin_pages(pages).size == 0
    assert tables.pool.ref_counts[pages].tolist() == [1, 1, 1]
    tables.check_integrity()
    assert not tables.reset_prefix_cache()
    assert retention.unpin(pages).tolist() == pages
    assert tables.reset_prefix_cache()


def test_more_pins_than_the_share_allows_are_refused_with_the_numbers():
    tables, retention, _ = tables_of(share=0.35)
    assert retention.max_pinned == 3
    seq, _ = admit(tables, prompt(1, 5))
    retention.pin(seq, 0, 32)
    before = snapshot(tables)
    with pytest.raises(PinLimit, match="need 2 pins, 1 free of 3; unpin pages") as caught:
        retention.pin(seq, 0, 64)
    assert (caught.value.need, caught.value.free, caught.value.total) == (2, 1, 3)
    assert snapshot(tables) == before
    # What is pinned already counts once.
    assert retention.pin(seq, 16, 48).tolist() == [3]


def test_pinned_pages_are_never_evicted_and_an_owner_that_lets_go_keeps_them_found():
    tables, retention, _ = tables_of(30)
    seq, pages = admit(tables, prompt(1, 5))
    retention.pin(seq, 0, 32)
    assert evictable_blocks(tables, [seq]).blocks.tolist() == [2, 3, 4]
    plan = EvictLowest(ByPriority(retention), max_pages=0).plan(tables, seq)
    assert plan.blocks.tolist() == [2, 3, 4]
    # Asked for by name, the sequence lets go of its block; the page stays.
    assert tables.evict(seq, [0]).size == 0
    assert tables.pool.ref_counts[pages[0]] == 1
    tables.check_integrity()
    tables.close(seq)
    _, found = admit(tables, [*prompt(1, 2), 3])
    assert found[:2] == pages[:2]
    tables.check_integrity()


def test_writing_on_behind_a_cut_inside_a_pinned_block_copies_it():
    tables, retention, _ = tables_of(30)
    seq, pages = admit(tables, prompt(1, 2))
    retention.pin(seq)
    tables.truncate(seq, 20)
    plan = tables.reserve([seq], 1, [9])
    assert plan.cow_src.tolist() == [pages[1]]
    tables.commit(plan)
    assert tables.prefix.held[pages].all()
    tables.check_integrity()


def test_sinks_stay_with_a_pinned_page():
    tables, retention, _ = tables_of(40, window=SIZE)
    seq, pages = admit(tables, prompt(1, 3))
    record = tables.windows.sink_record[pages[0]]
    retention.pin(seq, 0, 16)
    tables.close(seq)
    tables.check_integrity()
    for number in range(2, 9):
        admit(tables, prompt(number, 1, 2))[0]
        tables.check_integrity()
        tables.close(tables.sequence_ids())
    again = tables.open([*prompt(1, 1), 1])
    assert tables.state(again).num_sinks == 4
    assert tables.sink_records([again]).tolist() == [record]
    tables.close([again])
    retention.unpin(pages[:1])
    tables.check_integrity()


def test_forgetting_blocks_takes_their_pins_and_priorities():
    tables, retention, _ = tables_of()
    seq, pages = admit(tables, prompt(1, 3))
    retention.pin(seq, 0, 32)
    retention.keep(seq, 90)
    tables.forget_blocks(pages)
    assert retention.num_pinned == 0
    assert (retention.priorities[pages] == 35).all()
    tables.check_integrity()
    tables.close(seq)
    other, pages = admit(tables, prompt(2, 2))
    retention.keep(other, 90)
    tables.close(other)
    assert tables.reset_prefix_cache()
    assert (retention.priorities == 35).all()
    tables.check_integrity()


def test_an_adoption_sees_the_order_that_priorities_make():
    tables, retention, _ = tables_of()
    source = PageTables(SIZE, 11, sharing=SharingOptions())
    given = source.open_many(1)
    source.commit(source.reserve(given, 40))
    seq, _ = admit(tables, prompt(1, 3))
    retention.keep(seq, 0, 16, 32)
    tables.close(seq)
    plan = tables.plan_adoption(source.extract(given, True).image, True)
    assert plan.pages.tolist() == [2, 4, 5]
    adopted = tables.adopt(plan)
    assert tables.block_table(adopted)[0].tolist() == [2, 4, 5]
    tables.check_integrity()


def test_integrity_finds_a_pin_too_many_and_a_band_that_lies():
    tables, retention, _ = tables_of()
    seq, _ = admit(tables, prompt(1, 3))
    retention._pinned[1] = True
    with pytest.raises(IntegrityError, match="page 1 counts 1 owners, but 2 hold it"):
        tables.check_integrity()
    retention._pinned[1] = False
    retention.keep(seq, 3, seconds=4)
    tables.close(seq)
    retention._queue.priority[2] = 7
    with pytest.raises(IntegrityError, match="band 3"):
        tables.check_integrity()


def test_a_page_to_pin_that_is_out_of_range_is_named():
    tables, retention, _ = tables_of()
    for verb in (retention.pin_pages, retention.unpin):
        for pages, worst in (([1, 99, 0], 99), ([0], 0), ([3, -2], -2)):
            with pytest.raises(ArgumentError, match=rf"pages must be in \[1, 10\], got {worst}$"):
                verb(pages)
    tables.check_integrity()


# -- refusals -------------------------------------------------------------------------------------

BAD = {
    "an unknown sequence": (lambda r, s: r.keep(5, 50), UnknownSequence),
    "an unknown sequence to pin": (lambda r, s: r.pin(5), UnknownSequence),
    "a sequence of text": (lambda r, s: r.keep("a", 50), ArgumentTypeError),
    "a priority above 100": (lambda r, s: r.keep(s, 101), ArgumentError),
    "a priority below 0": (lambda r, s: r.keep(s, -1), ArgumentError),
    "half a priority": (lambda r, s: r.keep(s, 0.5), ArgumentTypeError),
    "True priority": (lambda r, s: r.keep(s, True), ArgumentTypeError),
    "a range beyond the end": (lambda r, s: r.keep(s, 50, 0, 101), ArgumentError),
    "a range that ends before it starts": (lambda r, s: r.keep(s, 50, 9, 8), ArgumentError),
    "a negative start": (lambda r, s: r.keep(s, 50, -1), ArgumentError),
    "negative seconds": (lambda r, s: r.keep(s, 50, seconds=-1), ArgumentError),
    "NaN seconds": (lambda r, s: r.keep(s, 50, seconds=float("nan")), ArgumentError),
    "seconds of text": (lambda r, s: r.keep(s, 50, seconds="1"), ArgumentTypeError),
    "a block that is not published": (lambda r, s: r.pin(s, 0, 100), ArgumentError),
    "the null page": (lambda r, s: r.pin_pages([0]), ArgumentError),
    "a page beyond the pool": (lambda r, s: r.pin_pages([99]), ArgumentError),
    "a page that holds nothing": (lambda r, s: r.pin_pages([9]), ArgumentError),
    "half a page": (lambda r, s: r.pin_pages([0.5]), ArgumentTypeError),
    "unpinning the null page": (lambda r, s: r.unpin([0]), ArgumentError),
    "a second retention": (lambda r, s: Retention(r._tables), ArgumentError),
    "foreign tables": (
        lambda r, s: ByPriority(r).score(PageTables(SIZE, 5), []),
        ArgumentError,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_has_its_error_and_changes_nothing(name):
    call, error = BAD[name]
    tables, retention, _ = tables_of()
    seq, _ = admit(tables, prompt(1, 6, 4))
    before = snapshot(tables)
    with pytest.raises(error) as caught:
        call(retention, seq)
    assert type(caught.value) is error
    assert snapshot(tables) == before


@pytest.mark.parametrize(
    ("share", "error"),
    [
        (-0.1, ArgumentError),
        (1.1, ArgumentError),
        ("1", ArgumentTypeError),
        (True, ArgumentTypeError),
    ],
)
def test_a_share_is_a_part_of_one(share, error):
    tables = PageTables(SIZE, 11, sharing=SharingOptions())
    with pytest.raises(error):
        Retention(tables, share)
    assert tables.retention is None


def test_tables_that_share_nothing_have_nothing_to_retain():
    with pytest.raises(ArgumentError, match="needs sharing"):
        Retention(PageTables(SIZE, 11))


def test_an_evicted_block_cannot_be_pinned_and_its_number_is_named():
    tables, retention, _ = tables_of()
    seq, _ = admit(tables, prompt(1, 4))
    tables.evict(seq, [2])
    with pytest.raises(ArgumentError, match="block 2 cannot be found"):
        retention.pin(seq, 20, 64)
    assert retention.pin(seq, 0, 20).tolist() == [1, 2]


def test_a_queue_of_other_ids_is_refused():
    tables, _, _ = tables_of(5)
    with pytest.raises(ArgumentError, match="must hold the 4 free pages"):
        tables.pool.use_queue(FreeQueue(1, 3))
    with pytest.raises(OutOfPages):
        tables.pool.acquire(5)


# -- fences and swaps -----------------------------------------------------------------------------


def test_priorities_and_evictions_wait_for_fences():
    tables, retention, _ = tables_of()
    seq, _ = admit(tables, prompt(1, 4))
    retention.keep(seq, 10, 0, 32)
    fence = tables.fences.open()
    freed = eviction.apply(
        tables, EvictLowest(ByPriority(retention), max_pages=2).plan(tables, seq)
    )
    assert freed.tolist() == [2, 1]
    assert free_order(tables) == [5, 6, 7, 8, 9, 10]
    tables.check_integrity()
    tables.fences.close(fence)
    assert free_order(tables) == [2, 1, 5, 6, 7, 8, 9, 10]
    tables.check_integrity()


def test_sequences_on_the_host_or_on_the_way_give_no_pages():
    tables = PageTables(SIZE, 30, sharing=SharingOptions(), num_host_pages=20)
    (a, b, c) = ids = tables.open_many(3).tolist()
    tables.commit(tables.reserve(ids, 48))
    tables.commit_swap(tables.begin_swap_out([a]))
    swap = tables.begin_swap_out([b])
    plans = plan_free(tables, 3, OldestFirst())
    assert [plan.seq_id for plan in plans] == [c]
    with pytest.raises(OutOfEvictablePages, match="found 3"):
        plan_free(tables, 4, OldestFirst())
    with pytest.raises(SwappedError):
        plan_free(tables, 1, OldestFirst(), [a])
    assert evictable_blocks(tables, [b, c]).members.tolist() == [1, 1, 1]
    with pytest.raises(StepError, match="it is being swapped"):
        eviction.apply_all(tables, [*plans, EvictionPlan(b, np.array([0]), 0, 0)])
    tables.abort_swap(swap)
    eviction.apply_all(tables, plans)
    tables.check_integrity()


def test_a_reset_takes_the_priorities_of_pages_that_wait_for_a_fence_too():
    tables, retention, clock = tables_of()
    seq, pages = admit(tables, prompt(1, 4))
    retention.keep(seq, 90, 0, 32)
    retention.keep(seq, 10, 32, 48, seconds=5.0)
    fence = tables.fences.open()
    tables.close(seq)
    assert tables.pool.parked_ids().tolist() == pages[::-1]
    assert tables.reset_prefix_cache()
    assert set(retention.priorities.tolist()) == {DEFAULT_PRIORITY}
    tables.check_integrity()
    clock.now = 6.0
    retention.refresh()
    tables.fences.close(fence)
    # In the order of release, as if nobody had ever wanted one of them more.
    assert free_order(tables) == [5, 6, 7, 8, 9, 10, 4, 3, 2, 1]
    tables.check_integrity()
