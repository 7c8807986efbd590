"""Small tables with a host tier, and whole swaps that prove the invariants half-way."""

from __future__ import annotations

from pagedtq.paging import PageTables

SIZE = 4


def tables_of(num_pages=11, num_host_pages=8, window=0, num_slots=0, **options) -> PageTables:
    return PageTables(
        SIZE,
        num_pages,
        window,
        2 if window else 0,
        num_slots,
        num_host_pages=num_host_pages,
        **options,
    )


def filled(tables, num_tokens, token_ids=None):
    seq_id = tables.open(token_ids)
    known = int(tables.lengths([seq_id])[0])
    tables.commit(tables.reserve([seq_id], num_tokens - known))
    return seq_id


def swap_out(tables, *seq_ids):
    plan = tables.begin_swap_out(list(seq_ids))
    tables.check_integrity()
    freed = tables.commit_swap(plan)
    tables.check_integrity()
    return plan, freed


def swap_in(tables, *seq_ids):
    plan = tables.begin_swap_in(list(seq_ids))
    tables.check_integrity()
    assert tables.commit_swap(plan).size == 0
    tables.check_integrity()
    return plan
