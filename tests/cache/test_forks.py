"""Forks append in steps of their own or together, and share until they do."""

from __future__ import annotations

import pytest

from tests.cache.bank import LAYERS
from tests.cache.small_caches import FORMATS, WINDOWS, P, build, checked, grow, tokens


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("length", [3, P, P + 5, 3 * P])
def test_parent_and_children_append_in_one_step(name, window, length):
    run = checked(name, window)
    parent = run.open()
    run.append({parent: length})
    children = [run.fork(parent), run.fork(parent)]
    run.check()
    run.begin_step({children[0]: 2, parent: P + 1, children[1]: 1})
    run.store(1)
    run.check()
    run.commit()
    run.check()
    run.append({parent: P, children[1]: P})
    run.check()
    run.close([parent])
    run.append({children[0]: 3 * P + 5})
    run.check()


def test_the_last_owner_of_an_open_page_writes_in_place():
    kv_cache = build(window=0)
    parent = kv_cache.open()
    grow(kv_cache, parent, 5)
    child = kv_cache.fork(parent)
    page = int(kv_cache.tables.block_table([parent])[0, 0])
    plan = kv_cache.begin_step([parent, child], 1)
    assert plan.cow_src.tolist() == [page] and plan.cow_dst.tolist() != [page]
    assert kv_cache.tables.block_table([child])[0, 0] == page
    for layer in range(LAYERS):
        kv_cache.store(layer, *(a[layer] for a in tokens(2)))
    kv_cache.commit()
    assert kv_cache.stats().pages_used == 2


def test_a_window_slot_is_shared_until_one_of_them_appends():
    run = checked(window=P)
    parent = run.open()
    run.append({parent: P + 5})
    child = run.fork(parent)
    slots = run.cache.tables.window_slots([parent, child])
    assert slots[0] == slots[1] and run.cache.stats().window_slots_used == 1
    run.append({child: 1})
    slots = run.cache.tables.window_slots([parent, child])
    assert slots[0] != slots[1] and run.cache.stats().window_slots_used == 2
    run.check()
    run.append({parent: 1})
    assert run.cache.stats().window_slots_used == 2
    run.check()
    run.close([parent])
    assert run.cache.stats().window_slots_used == 1
    run.check()


def test_an_aborted_copy_on_write_leaves_both_readable():
    for window in WINDOWS:
        run = checked(window=window)
        parent = run.open()
        run.append({parent: P + 5})
        child = run.fork(parent)
        run.begin_step({parent: 2, child: 3 * P})
        run.store(0)
        run.abort_step()
        run.check()
        run.append({child: P, parent: 1})
        run.check()
