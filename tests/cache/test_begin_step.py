"""Beginning a step: what is reserved, what fresh pages hold, and what is refused."""

from __future__ import annotations

import pytest

from pagedtq import PagedKVCache
from pagedtq.errors import OutOfPages, OutOfWindowSlots
from tests.cache.bank import LAYERS, differences, make_config, snapshot
from tests.cache.small_caches import WINDOWS, P, build, checked, grow


def test_members_have_their_new_lengths_at_once():
    kv_cache = build()
    one, two = kv_cache.open(), kv_cache.open()
    grow(kv_cache, one, 5)
    plan = kv_cache.begin_step([two, one], [3, 20])
    assert plan.num_tokens == 23
    assert (kv_cache.length(one), kv_cache.length(two)) == (25, 3)
    assert kv_cache.stats().logical_tokens == 28
    kv_cache.abort_step()
    assert (kv_cache.length(one), kv_cache.length(two)) == (5, 0)


def test_one_number_serves_every_member():
    kv_cache = build()
    ids = [kv_cache.open() for _ in range(3)]
    plan = kv_cache.begin_step(ids)
    assert plan.num_new.tolist() == [1, 1, 1]
    kv_cache.abort_step()
    assert kv_cache.begin_step(ids, 4).num_tokens == 12


def test_opening_a_sequence_inside_a_step_does_no_harm():
    run = checked()
    run.append({run.open(): 20})
    first = next(iter(run.sequences))
    run.begin_step({first: 5})
    # Enough of them that the tables must grow.
    new = [run.open() for _ in range(40)]
    run.store(1)
    run.check([first, *new[:2]])
    run.commit()
    run.append({new[0]: 7, first: 1})
    run.check([first, *new[:2]])


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("name", ["k3v3", "prod4v4"])
def test_norms_of_fresh_pages_are_zero_whatever_lay_there(name, debug):
    config = make_config(name, window=0, num_pages=8, page_size=P, key_bounds=True)
    kv_cache = PagedKVCache(config, num_threads=1, debug=debug)
    kv_cache.backend.pool[:] = 0x5A
    seq_id = kv_cache.open()
    grow(kv_cache, seq_id, P + 3)
    layout, pages = kv_cache.backend.layout, kv_cache.tables.block_table([seq_id])[0]
    for layer in range(LAYERS):
        for plane in layout.extents[layer].planes:
            found = layout.plane_view(kv_cache.backend.pool, layer, plane)[pages[1]]
            unwritten = found[:, 2:] if found.shape[1] < P else found[:, 4:]
            if plane.endswith("_norms") or plane == "key_bounds":
                assert not (found if plane == "key_bounds" else unwritten).view("u2").any()
            else:
                assert (unwritten.view("u1") == (0xFF if debug else 0x5A)).all()


def test_freed_pages_are_poisoned_in_debug_mode():
    kv_cache = build(window=P)
    seq_id = kv_cache.open()
    grow(kv_cache, seq_id, 4 * P)
    pages = kv_cache.tables.block_table([seq_id])[0]
    kv_cache.evict(seq_id, [1])
    kv_cache.truncate(seq_id, 3 * P)
    assert (kv_cache.backend.pages.gather(pages[[1, 3]]) == 0xFF).all()
    assert not (kv_cache.backend.pages.gather(pages[[0, 2]]) == 0xFF).all()
    kv_cache.close(seq_id)
    assert (kv_cache.backend.pages.gather(pages) == 0xFF).all()


def test_an_empty_step_needs_no_layer():
    kv_cache = build()
    kv_cache.begin_step([], [])
    kv_cache.commit()
    seq_id = kv_cache.open()
    kv_cache.begin_step(seq_id, 0)
    kv_cache.commit()
    kv_cache.begin_step(seq_id, 0)
    kv_cache.abort_step()
    assert kv_cache.stats().pages_used == kv_cache.stats().window_slots_used == 0


@pytest.mark.parametrize("window", WINDOWS)
def test_when_pages_run_out_half_way_through_the_batch_nothing_changes(window):
    kv_cache = build(window=window, num_pages=8)
    ids = [kv_cache.open() for _ in range(3)]
    grow(kv_cache, ids[1], 2 * P + 1)
    before = snapshot(kv_cache)
    with pytest.raises(OutOfPages, match="need 6 pages, 4 free of 7"):
        kv_cache.begin_step(ids, [2 * P, P, 3 * P])
    assert differences(before, snapshot(kv_cache)) == []
    kv_cache.begin_step(ids, [2 * P, 0, 2 * P])


def test_when_window_slots_run_out_half_way_through_the_batch_nothing_changes():
    kv_cache = build(num_window_slots=2)
    ids = [kv_cache.open() for _ in range(3)]
    grow(kv_cache, ids[1], 3)
    before = snapshot(kv_cache)
    with pytest.raises(OutOfWindowSlots, match="need 2 window slots, 1 free of 2"):
        kv_cache.begin_step(ids, 1)
    assert differences(before, snapshot(kv_cache)) == []


def test_copies_on_write_count_when_pages_run_out():
    kv_cache = build(window=0, num_pages=3)
    parent = kv_cache.open()
    grow(kv_cache, parent, 5)
    child = kv_cache.fork(parent)
    before = snapshot(kv_cache)
    with pytest.raises(OutOfPages, match="need 2 pages, 1 free of 2"):
        kv_cache.begin_step([parent, child], [1, P])
    assert differences(before, snapshot(kv_cache)) == []
