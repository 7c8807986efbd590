"""Every public verb of the control plane, each parameter once with what it is not made for.

A wrong type must end in an error of pagedtq, before anything has changed. What a parameter may
also be is listed with it: such values are left out here, and tested where their meaning is.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from pagedtq.errors import PagedTQError
from pagedtq.paging import (
    BlockHasher,
    ByPriority,
    EvictionPlan,
    EvictLowest,
    KeepFirstLast,
    OldestFirst,
    PagePool,
    PageTables,
    PrefixIndex,
    RandomOrder,
    Retention,
    SharingOptions,
    TableExport,
    WindowPool,
    evictable_blocks,
    eviction,
    plan_free,
    sealed_blocks,
)
from tests.table_snapshot import snapshot
from tests.wrong_values import FLOAT, HUGE, INT, NONE, WRONG, cases

NUMBERS = INT, FLOAT, HUGE


def world():
    """Sequences with tokens, with keys of their own, and on the host; priorities, pins, a fence."""
    tables = PageTables(4, 30, sharing=SharingOptions(), num_host_pages=8)
    retention = Retention(tables, 0.5, lambda: 0.0)
    a, away = tables.open(range(10)), tables.open([7] * 8)
    named = tables.open(block_keys=[b"a", b"b"])
    tables.commit(tables.reserve([a, away, named], [10, 8, 8]))
    tables.commit_swap(tables.begin_swap_out([away]))
    retention.keep(a, 50, 0, 4)
    retention.pin(a, 0, 4)
    export = TableExport(tables)
    export.update([a])
    epoch = tables.fences.open()
    chain = tables.prepare(range(4))
    return SimpleNamespace(
        tables=tables,
        pool=tables.pool,
        retention=retention,
        fences=tables.fences,
        export=export,
        a=a,
        named=named,
        away=away,
        epoch=epoch,
        chain=chain,
        free=29,
    )


#: Verb and parameter: the call, and which of the values above are right for it.
VERBS = {
    "open token_ids": (lambda w, v: w.tables.open(v), (NONE,)),
    "open salt": (lambda w, v: w.tables.open([1], salt=v), ()),
    "open extra_keys": (lambda w, v: w.tables.open([1], extra_keys=v), (NONE,)),
    "open an extra key": (lambda w, v: w.tables.open([1], extra_keys={0: v}), ()),
    "open the block of an extra key": (
        lambda w, v: w.tables.open([1], extra_keys={_hashable(v): b"x"}),
        (INT, HUGE),
    ),
    "open block_keys": (lambda w, v: w.tables.open(block_keys=v), (NONE,)),
    "open_many count": (lambda w, v: w.tables.open_many(v), (INT,)),
    "open_on block_keys": (lambda w, v: w.tables.open_on(v, [1]), ()),
    "open_on pages": (lambda w, v: w.tables.open_on([b"a"], v), ()),
    "open_on num_tokens": (lambda w, v: w.tables.open_on([], [], v), (NONE, INT, HUGE)),
    "close seq_ids": (lambda w, v: w.tables.close(v), ()),
    "fork seq_id": (lambda w, v: w.tables.fork(v), ()),
    "truncate seq_id": (lambda w, v: w.tables.truncate(v, 1), ()),
    "truncate length": (lambda w, v: w.tables.truncate(w.a, v), (INT,)),
    "evict seq_id": (lambda w, v: w.tables.evict(v, [0]), ()),
    "evict blocks": (lambda w, v: w.tables.evict(w.a, v), ()),
    "evict boundary": (lambda w, v: w.tables.evict(w.a, [1], v), (NONE,)),
    "evict keep": (lambda w, v: w.tables.evict(w.a, [1], (v, 8)), (INT,)),
    "evict start": (lambda w, v: w.tables.evict(w.a, [1], (0, v)), (INT,)),
    "check_evict blocks": (lambda w, v: w.tables.check_evict(w.a, v, (0, 0)), ()),
    "check_evict boundary": (lambda w, v: w.tables.check_evict(w.a, [0], v), ()),
    "set_start seq_id": (lambda w, v: w.tables.set_start(v, 0, 0), ()),
    "set_start keep": (lambda w, v: w.tables.set_start(w.a, v, 8), (INT,)),
    "set_start start": (lambda w, v: w.tables.set_start(w.a, 0, v), (INT,)),
    "reserve seq_ids": (lambda w, v: w.tables.reserve(v, 1), ()),
    "reserve num_new_tokens": (lambda w, v: w.tables.reserve([w.a], v), (INT,)),
    "reserve a count": (lambda w, v: w.tables.reserve([w.a], [v]), (INT,)),
    "reserve token_ids": (lambda w, v: w.tables.reserve([w.a], 1, v), (NONE,)),
    "pages_needed seq_ids": (lambda w, v: w.tables.pages_needed(v, 1), ()),
    "pages_needed num_new_tokens": (lambda w, v: w.tables.pages_needed([w.a], v), (INT,)),
    "commit plan": (lambda w, v: w.tables.commit(v), ()),
    "abort plan": (lambda w, v: w.tables.abort(v), ()),
    "prepare token_ids": (lambda w, v: w.tables.prepare(v), (NONE,)),
    "prepare block_keys": (lambda w, v: w.tables.prepare(block_keys=v), (NONE,)),
    "prepare num_tokens": (
        lambda w, v: w.tables.prepare(block_keys=[b"a"], num_tokens=v),
        (NONE, INT, HUGE),
    ),
    "lengthened chain": (lambda w, v: w.tables.lengthened(v, [1]), ()),
    "lengthened token_ids": (lambda w, v: w.tables.lengthened(w.chain, v), ()),
    "find_pages chain": (lambda w, v: w.tables.find_pages(v), ()),
    "num_shared_tokens token_ids": (lambda w, v: w.tables.num_shared_tokens(v), ()),
    "num_shared_tokens salt": (lambda w, v: w.tables.num_shared_tokens([1], salt=v), ()),
    "extend_keys seq_id": (lambda w, v: w.tables.extend_keys(v, [b"c"]), ()),
    "extend_keys block_keys": (lambda w, v: w.tables.extend_keys(w.named, v), ()),
    "keys_of seq_id": (lambda w, v: w.tables.keys_of(v), ()),
    "forget_blocks pages": (lambda w, v: w.tables.forget_blocks(v), ()),
    "lengthen seq_id": (lambda w, v: w.tables.lengthen(v, 11), ()),
    "lengthen length": (lambda w, v: w.tables.lengthen(w.a, v), (INT,)),
    "lengthen keep_free": (lambda w, v: w.tables.lengthen(w.a, 16, v), (INT, HUGE)),
    "length_of seq_id": (lambda w, v: w.tables.length_of(v), ()),
    "num_published seq_id": (lambda w, v: w.tables.num_published(v), ()),
    "publish_keys seq_id": (lambda w, v: w.tables.publish_keys(v, [b"c"]), ()),
    "publish_keys block_keys": (lambda w, v: w.tables.publish_keys(w.named, v), ()),
    "publish_keys token_ids": (
        lambda w, v: w.tables.publish_keys(_longer(w), [b"c"], v),
        (NONE,),
    ),
    "extract seq_ids": (lambda w, v: w.tables.extract(v, False), ()),
    "plan_adoption image": (lambda w, v: w.tables.plan_adoption(v, False), ()),
    "adopt plan": (lambda w, v: w.tables.adopt(v), ()),
    "begin_swap_out seq_ids": (lambda w, v: w.tables.begin_swap_out(v), ()),
    "begin_swap_in seq_ids": (lambda w, v: w.tables.begin_swap_in(v), ()),
    "commit_swap plan": (lambda w, v: w.tables.commit_swap(v), ()),
    "abort_swap plan": (lambda w, v: w.tables.abort_swap(v), ()),
    "is_swapped seq_ids": (lambda w, v: w.tables.is_swapped(v), ()),
    "checked_id seq_id": (lambda w, v: w.tables.checked_id(v), ()),
    "check_distinct seq_ids": (lambda w, v: w.tables.check_distinct(v), ()),
    "lengths seq_ids": (lambda w, v: w.tables.lengths(v), ()),
    "state seq_id": (lambda w, v: w.tables.state(v), ()),
    "block_table seq_ids": (lambda w, v: w.tables.block_table(v), ()),
    "reads seq_ids": (lambda w, v: w.tables.reads(v, True), ()),
    "window_slots seq_ids": (lambda w, v: w.tables.window_slots(v), ()),
    "sink_records seq_ids": (lambda w, v: w.tables.sink_records(v), ()),
    "resident_lengths seq_ids": (lambda w, v: w.tables.resident_lengths(v), ()),
    "csr seq_ids": (lambda w, v: w.tables.csr(v), ()),
    "slots_of seq_id": (lambda w, v: w.tables.slots_of(v, [0]), ()),
    "slots_of positions": (lambda w, v: w.tables.slots_of(w.a, v), ()),
    "pool acquire count": (lambda w, v: w.pool.acquire(v), (INT,)),
    "pool peek count": (lambda w, v: w.pool.peek(v), (INT,)),
    "pool retain ids": (lambda w, v: w.pool.retain(v), ()),
    "pool release ids": (lambda w, v: w.pool.release(v), ()),
    "pool touch pages": (lambda w, v: w.pool.touch(v), ()),
    "pool untouch pages": (lambda w, v: w.pool.untouch(v), ()),
    "pool num_leaving pages": (lambda w, v: w.pool.num_leaving(v), ()),
    "pool use_queue queue": (lambda w, v: w.pool.use_queue(v), ()),
    "windows acquire_records pages": (lambda w, v: w.tables.windows.acquire_records(v), ()),
    "windows release_records pages": (lambda w, v: w.tables.windows.release_records(v), ()),
    "host release ids": (lambda w, v: w.tables.host.release(v), ()),
    "keep seq_id": (lambda w, v: w.retention.keep(v, 40), ()),
    "keep priority": (lambda w, v: w.retention.keep(w.a, v), (INT,)),
    "keep start": (lambda w, v: w.retention.keep(w.a, 40, v), (INT,)),
    "keep stop": (lambda w, v: w.retention.keep(w.a, 40, 0, v), (NONE, INT)),
    "keep seconds": (lambda w, v: w.retention.keep(w.a, 40, seconds=v), (NONE, INT, FLOAT)),
    "pin seq_id": (lambda w, v: w.retention.pin(v), ()),
    "pin start": (lambda w, v: w.retention.pin(w.a, v, 8), (INT,)),
    "pin stop": (lambda w, v: w.retention.pin(w.a, 4, v), (NONE, INT)),
    "pin_pages pages": (lambda w, v: w.retention.pin_pages(v), ()),
    "unpin pages": (lambda w, v: w.retention.unpin(v), ()),
    "fences open event": (lambda w, v: w.fences.open(v), (NONE,)),
    "fences close epoch": (lambda w, v: w.fences.close(v), ()),
    "publish keys": (lambda w, v: w.tables.prefix.publish(v, [w.free]), ()),
    "publish a key": (lambda w, v: w.tables.prefix.publish([v], [w.free]), ()),
    "publish pages": (lambda w, v: w.tables.prefix.publish([b"x"], v), ()),
    "publish a page": (lambda w, v: w.tables.prefix.publish([b"x"], [v]), (INT,)),
    "publish parent": (lambda w, v: w.tables.prefix.publish([b"x"], [w.free], v), (NONE,)),
    "publish tokens": (
        lambda w, v: w.tables.prefix.publish([b"x"], [w.free], None, v),
        (NONE,),
    ),
    "export update seq_ids": (lambda w, v: w.export.update(v), ()),
    "apply plan": (lambda w, v: eviction.apply(w.tables, v), ()),
    "apply_all plans": (lambda w, v: eviction.apply_all(w.tables, v), ()),
    "apply_all a plan": (lambda w, v: eviction.apply_all(w.tables, [v]), ()),
    "apply a plan's blocks": (
        lambda w, v: eviction.apply(w.tables, EvictionPlan(w.a, v, 0, 0)),
        (),
    ),
    "sealed_blocks seq_ids": (lambda w, v: sealed_blocks(w.tables, v), ()),
    "sealed_blocks last_tokens": (
        lambda w, v: sealed_blocks(w.tables, [w.a], 0, v),
        (INT, HUGE),
    ),
    "evictable_blocks first_tokens": (
        lambda w, v: evictable_blocks(w.tables, [w.a], v),
        (INT, HUGE),
    ),
    "plan_free num_pages": (lambda w, v: plan_free(w.tables, v, OldestFirst()), ()),
    "plan_free ranking": (lambda w, v: plan_free(w.tables, 1, v), ()),
    "plan_free seq_ids": (lambda w, v: plan_free(w.tables, 1, OldestFirst(), v), (NONE,)),
    "keep first and last seq_id": (lambda w, v: KeepFirstLast(1, 1).plan(w.tables, v), ()),
    "evict lowest seq_id": (
        lambda w, v: EvictLowest(OldestFirst(), max_tokens=1).plan(w.tables, v),
        (),
    ),
    "evict lowest seq_ids": (
        lambda w, v: EvictLowest(OldestFirst(), max_tokens=1).plan_many(w.tables, v),
        (),
    ),
}

#: Constructors and functions without tables of their own.
MAKERS = {
    "PageTables page_size": (lambda v: PageTables(v, 30), (INT,)),
    "PageTables num_pages": (lambda v: PageTables(4, v), (INT,)),
    "PageTables window_tokens": (lambda v: PageTables(5, 30, v, 1, 2), (INT,)),
    "PageTables num_sinks": (lambda v: PageTables(5, 30, 5, v, 2), (INT,)),
    "PageTables num_window_slots": (lambda v: PageTables(5, 30, 5, 1, v), (INT,)),
    "PageTables sharing": (lambda v: PageTables(4, 30, sharing=v), (NONE,)),
    "PageTables num_host_pages": (lambda v: PageTables(4, 30, num_host_pages=v), (INT,)),
    "SharingOptions algorithm": (
        lambda v: PageTables(4, 30, sharing=SharingOptions(algorithm=v)),
        (),
    ),
    "SharingOptions leave_last": (lambda v: SharingOptions(leave_last=v), ()),
    "SharingOptions verify_tokens": (lambda v: SharingOptions(verify_tokens=v), ()),
    "PagePool num_pages": (lambda v: PagePool(v), (INT,)),
    "WindowPool num_slots": (lambda v: WindowPool(v, 8), (INT,)),
    "WindowPool num_pages": (lambda v: WindowPool(2, v), (INT,)),
    "PrefixIndex num_pages": (lambda v: PrefixIndex(v), (INT,)),
    "BlockHasher page_size": (lambda v: BlockHasher(v), (INT,)),
    "BlockHasher algorithm": (lambda v: BlockHasher(4, v), ()),
    "Retention tables": (lambda v: Retention(v), ()),
    "Retention max_pinned_share": (lambda v: Retention(_shared(), v), ()),
    "Retention clock": (lambda v: Retention(_shared(), clock=v), ()),
    "TableExport tables": (lambda v: TableExport(v), ()),
    "TableExport max_sequences": (lambda v: TableExport(_shared(), v), (INT,)),
    "TableExport max_blocks": (lambda v: TableExport(_shared(), 8, v), (INT,)),
    "KeepFirstLast first_tokens": (lambda v: KeepFirstLast(v, 1), (INT, HUGE)),
    "KeepFirstLast last_tokens": (lambda v: KeepFirstLast(1, v), (INT, HUGE)),
    "EvictLowest ranking": (lambda v: EvictLowest(v, max_tokens=1), ()),
    "EvictLowest max_tokens": (lambda v: EvictLowest(OldestFirst(), v), (INT, HUGE)),
    "EvictLowest max_pages": (lambda v: EvictLowest(OldestFirst(), None, v), (INT, HUGE)),
    "EvictLowest first_tokens": (lambda v: EvictLowest(OldestFirst(), 1, None, v), (INT, HUGE)),
    "EvictLowest last_tokens": (lambda v: EvictLowest(OldestFirst(), 1, None, 0, v), (INT, HUGE)),
    "ByPriority retention": (lambda v: ByPriority(v), ()),
    "RandomOrder seed": (lambda v: RandomOrder(v), (INT,)),
}


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def _shared():
    return PageTables(4, 30, sharing=SharingOptions())


def _longer(w):
    """The sequence that names its own blocks, with a third one; where that is no part of a test."""
    w.tables.lengthen(w.named, 12)
    w.before = snapshot(w.tables)
    return w.named


@pytest.mark.parametrize(
    ("verb", "wrong"),
    cases(VERBS),
)
def test_a_verb_refuses_what_its_parameter_is_not_made_for(verb, wrong):
    w = world()
    w.before = snapshot(w.tables)
    copy = w.export.block_table.copy()
    with pytest.raises(PagedTQError) as caught:
        VERBS[verb][0](w, WRONG[wrong])
    assert str(caught.value)
    assert w.before == snapshot(w.tables)
    assert np.array_equal(copy, w.export.block_table)
    w.tables.check_integrity()


@pytest.mark.parametrize(
    ("maker", "wrong"),
    cases(MAKERS),
)
def test_nothing_is_made_of_what_its_parameter_is_not_made_for(maker, wrong):
    with pytest.raises(PagedTQError) as caught:
        MAKERS[maker][0](WRONG[wrong])
    assert str(caught.value)
