"""What others' tests expect of a host tier: vLLM V0's swaps, and V1's offloading manager."""

from __future__ import annotations

import pytest

from pagedtq.errors import OutOfHostPages, OutOfPages
from pagedtq.paging import PageTables, SharingOptions
from tests.table_snapshot import logical

SIZE, NUM_PAGES = 4, 16


def tables_of(num_host_pages=40, **options) -> PageTables:
    return PageTables(SIZE, NUM_PAGES + 1, num_host_pages=num_host_pages, **options)


def filled(tables, num_blocks, token_ids=None):
    seq_id = tables.open(token_ids)
    known = tables.length_of(seq_id)
    tables.commit(tables.reserve([seq_id], num_blocks * SIZE - known))
    return seq_id


def swap_out(tables, *seq_ids):
    plan = tables.begin_swap_out(list(seq_ids))
    tables.commit_swap(plan)
    return plan


def refused(call, error):
    """Return need, free and total of what does not fit; nothing has changed."""
    with pytest.raises(error) as caught:
        call()
    return caught.value.need, caught.value.free, caught.value.total


def test_sequences_come_back_now_later_or_never():
    """Never: more than the whole pool. The error tells which it is, by need and total."""
    tables = tables_of()
    away = []
    for _ in range(3):
        away.append(filled(tables, 8))
        swap_out(tables, away[-1])
    before = logical(tables)
    need, free, total = refused(lambda: tables.begin_swap_in(away), OutOfPages)
    assert (need, free, total) == (24, 16, NUM_PAGES) and need > total
    assert logical(tables) == before
    other = filled(tables, 10)
    need, free, total = refused(lambda: tables.begin_swap_in(away[:1]), OutOfPages)
    assert (need, free, total) == (8, 6, NUM_PAGES) and need <= total
    tables.close(other)
    tables.commit_swap(tables.begin_swap_in(away[:2]))
    assert tables.pool.num_free == 0
    assert refused(lambda: tables.begin_swap_in(away[2:]), OutOfPages) == (8, 0, NUM_PAGES)
    tables.close(away[:2])
    tables.commit_swap(tables.begin_swap_in(away[2:]))
    tables.check_integrity()


@pytest.mark.parametrize(
    ("lookahead", "fits"), [(0, True), (8 * SIZE, True), (8 * SIZE + 1, False)]
)
def test_room_for_drafts_is_asked_for_behind_the_swap(lookahead, fits):
    """V0 says never to a swap whose lookahead slots do not fit; here the step behind it does."""
    tables = tables_of()
    seq_id = filled(tables, 8)
    swap_out(tables, seq_id)
    tables.commit_swap(tables.begin_swap_in([seq_id]))
    if fits:
        tables.commit(tables.reserve([seq_id], lookahead))
        assert tables.pool.num_free == 8 - lookahead // SIZE
    else:
        # Nine pages behind the eight that came back: more than the pool has beside them, for good.
        assert refused(lambda: tables.reserve([seq_id], lookahead), OutOfPages) == (9, 8, NUM_PAGES)


def test_a_copy_that_is_under_way_is_nobodys_block_yet():
    """Offloading: a lookup of what is not ready finds nothing."""
    tables = tables_of()
    parent = filled(tables, 3)
    child = tables.fork(parent)
    first = tables.begin_swap_out([parent])
    second = tables.begin_swap_out([child])
    # The pages of the first may never be written; the second brings its own.
    assert (first.pages.tolist(), second.pages.tolist()) == ([1, 2, 3], [1, 2, 3])
    assert not set(first.host_pages.tolist()) & set(second.host_pages.tolist())
    tables.abort_swap(first)
    tables.commit_swap(second)
    tables.check_integrity()
    assert tables.host.num_used == 3


def test_what_is_stored_is_not_stored_again_and_stays_when_a_later_store_fails():
    """Offloading: stored keys are filtered; a store that fails removes what it alone brought."""
    tables = tables_of(sharing=SharingOptions(leave_last=False))
    tokens = list(range(16))
    first = filled(tables, 4, tokens)
    child = tables.fork(first)
    tables.commit(tables.reserve([child], 2 * SIZE, range(50, 58)))
    stored = swap_out(tables, first)
    assert stored.host_pages.tolist() == [1, 2, 3, 4]
    more = tables.begin_swap_out([child])
    assert (more.pages.tolist(), more.num_reused) == ([5, 6], 4)
    assert tables.host.ref_counts[1:7].tolist() == [2, 2, 2, 2, 1, 1]
    tables.abort_swap(more)
    assert tables.host.ref_counts[1:7].tolist() == [1, 1, 1, 1, 0, 0]
    tables.check_integrity()
    tables.close(child)
    # Others took all pages: what was stored comes from the host.
    tables.close(filled(tables, NUM_PAGES))
    back = tables.begin_swap_in([first])
    assert (back.host_pages.tolist(), back.num_reused) == ([1, 2, 3, 4], 0)
    tables.commit_swap(back)
    assert tables.host.num_used == 0


def test_nothing_on_the_host_gives_way_for_a_store():
    """Offloading: with only blocks in use to evict, a store is refused and changes nothing."""
    tables = tables_of(num_host_pages=9)
    kept, late = filled(tables, 6), filled(tables, 4)
    swap_out(tables, kept)
    before = logical(tables)
    assert refused(lambda: tables.begin_swap_out([late]), OutOfHostPages) == (4, 3, 9)
    assert logical(tables) == before
    # Only its owner gives room.
    tables.close(kept)
    assert swap_out(tables, late).host_pages.tolist() == [7, 8, 9, 6]


def test_a_block_that_a_load_reads_is_not_given_away_before_it_ends():
    """Offloading: blocks in use by a load are pinned."""
    tables = tables_of(num_host_pages=4)
    seq_id, other = filled(tables, 4), filled(tables, 1)
    swap_out(tables, seq_id)
    plan = tables.begin_swap_in([seq_id])
    assert refused(lambda: tables.begin_swap_out([other]), OutOfHostPages) == (1, 0, 4)
    tables.commit_swap(plan)
    assert tables.begin_swap_out([other]).host_pages.size == 1
