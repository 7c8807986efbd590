"""Swaps of sequences whose blocks their caller names."""

from __future__ import annotations

from pagedtq.paging import PageTables, SharingOptions

SIZE = 4


def test_two_blocks_of_one_name_come_back_as_two_pages():
    tables = PageTables(SIZE, 5, sharing=SharingOptions(), num_host_pages=8)
    seq_id = tables.open(block_keys=[b"a", b"a"])
    tables.commit(tables.reserve([seq_id], 8))
    tables.commit_swap(tables.begin_swap_out([seq_id]))
    # All pages are used for something else, so that nothing of it is left on the device.
    passing = tables.open()
    tables.commit(tables.reserve([passing], 16))
    tables.close(passing)
    assert tables.prefix.num_pages_held == 0
    other = tables.open_on([], [])
    (page,) = tables.lengthen(other, SIZE)
    tables.publish_keys(other, [b"a"])
    plan = tables.begin_swap_in([seq_id])
    assert (plan.num_reused, plan.pages.size) == (1, 1)
    tables.commit_swap(plan)
    first, second = tables.block_table([seq_id])[0].tolist()
    assert first == page != second
    assert tables.pool.ref_counts[[first, second]].tolist() == [2, 1]
    tables.check_integrity()
