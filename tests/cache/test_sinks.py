"""Sinks belong to the page of block 0, through forks, truncation and eviction."""

from __future__ import annotations

from tests.cache.small_caches import P, checked


def records(run, *seq_ids):
    return run.cache.tables.sink_records(list(seq_ids)).tolist()


def test_forks_share_the_sink_record_until_the_page_is_copied():
    run = checked(window=P)
    parent = run.open()
    run.append({parent: 2})
    child = run.fork(parent)
    one, two = records(run, parent, child)
    assert one == two >= 0
    # Both go on inside block 0, with different third and fourth sinks.
    run.append({parent: 5, child: 1})
    one, two = records(run, parent, child)
    assert one != two
    run.check()
    run.append({child: P, parent: 2 * P})
    assert [run.cache.state(s).num_sinks for s in (parent, child)] == [4, 4]
    run.check()


def test_forks_of_a_full_block_keep_sharing_sinks():
    run = checked(window=P)
    parent = run.open()
    run.append({parent: P + 2})
    child = run.fork(parent)
    run.append({parent: 2 * P, child: 3 * P})
    one, two = records(run, parent, child)
    assert one == two >= 0
    run.check()
    run.close([parent])
    run.check()


def test_sinks_grow_back_after_truncation():
    run = checked(window=P)
    seq_id = run.open()
    for length in (2 * P, 2, 0, 1):
        grown = max(0, length - run.cache.length(seq_id))
        run.append({seq_id: grown + 3 * P})
        run.truncate(seq_id, length)
        assert run.cache.state(seq_id).num_sinks == min(length, 4)
        run.check()
    run.append({seq_id: 1})
    run.append({seq_id: 9})
    assert run.cache.state(seq_id).num_sinks == 4
    run.check()


def test_evicting_block_0_drops_sinks_for_that_sequence_only():
    run = checked(window=P)
    parent = run.open()
    run.append({parent: 4 * P + 1})
    child = run.fork(parent)
    run.evict(parent, [0])
    assert run.cache.state(parent).num_sinks == 0
    assert run.cache.state(child).num_sinks == 4
    assert records(run, parent)[0] == -1 and records(run, child)[0] >= 0
    run.check()
    run.append({parent: P, child: P})
    assert run.cache.state(parent).num_sinks == 0
    run.check()


def test_a_sequence_that_lost_block_0_starts_again_from_nothing():
    run = checked(window=P)
    seq_id = run.open()
    run.append({seq_id: 3 * P})
    run.evict(seq_id, [0])
    run.truncate(seq_id, 0)
    run.append({seq_id: 6})
    assert run.cache.state(seq_id).num_sinks == 4
    run.check()


def test_more_sinks_than_the_first_chunks_bring():
    run = checked(window=2 * P, sinks=P)
    seq_id = run.open()
    for count in (1, 0, 3, P - 5, 1, 1, 2 * P):
        run.append({seq_id: count})
        run.check()
    assert run.cache.state(seq_id).num_sinks == P


def test_a_boundary_below_the_sinks_hides_the_rest_of_them():
    run = checked(window=P)
    seq_id = run.open()
    run.append({seq_id: 5 * P})
    run.keep_first_last(seq_id, 2, P)
    assert run.cache.load(0, seq_id)[2][:3].tolist() == [0, 1, 4 * P]
    run.check()
