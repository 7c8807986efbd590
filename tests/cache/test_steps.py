"""A step: reserve, store layer by layer, commit or abort; and what other sequences see of it."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq import PagedKVCache
from pagedtq.errors import ArgumentError, NonFiniteError, OutOfPages, OutOfWindowSlots, StepError
from tests.cache.bank import HEADS, LAYERS, differences, draw_tokens, make_config, snapshot
from tests.cache.model import CheckedCache
from tests.reference import relative_error, softmax_attention

P = 16
WINDOWS = [0, P, 2 * P]
FORMATS = ["k4v4", "prod4v4", "mixed"]
HISTORIES = [(0, 1), (5, 1), (5, P), (P, 1), (P - 1, 3), (2 * P + 3, P - 3), (2 * P + 3, 3 * P + 5)]


def build(name="k4v4", window=P, **fields):
    fields = {"num_pages": 40, "num_window_slots": 4, "page_size": P} | fields
    return PagedKVCache(make_config(name, window=window, **fields), num_threads=1, debug=True)


def tokens(count, seed=0):
    return draw_tokens(np.random.default_rng(seed), count, make_config("k4v4", num_pages=2))


def grow(kv_cache, seq_id, count, seed=0):
    kv_cache.append(seq_id, *tokens(count, seed))


def queries(count=1, seed=0):
    return np.random.default_rng(seed).standard_normal((count, 2 * HEADS, 16)).astype(np.float32)


def dense(kv_cache, seq_id):
    return [kv_cache.load(layer, seq_id) for layer in range(LAYERS)]


def same_tokens(left, right):
    return all(
        np.array_equal(a, b) for one, two in zip(left, right) for a, b in zip(one, two, strict=True)
    )


def checked(name="k4v4", window=P, **options):
    return CheckedCache(name, "f16", P, window, num_pages=40, **options)


class TestBeginStep:
    def test_members_have_their_new_lengths_at_once(self):
        kv_cache = build()
        one, two = kv_cache.open(), kv_cache.open()
        grow(kv_cache, one, 5)
        plan = kv_cache.begin_step([two, one], [3, 20])
        assert plan.num_tokens == 23
        assert (kv_cache.length(one), kv_cache.length(two)) == (25, 3)
        assert kv_cache.stats().logical_tokens == 28
        kv_cache.abort_step()
        assert (kv_cache.length(one), kv_cache.length(two)) == (5, 0)

    def test_one_number_serves_every_member(self):
        kv_cache = build()
        ids = [kv_cache.open() for _ in range(3)]
        plan = kv_cache.begin_step(ids)
        assert plan.num_new.tolist() == [1, 1, 1]
        kv_cache.abort_step()
        assert kv_cache.begin_step(ids, 4).num_tokens == 12

    def test_opening_a_sequence_inside_a_step_does_no_harm(self):
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
    def test_norms_of_fresh_pages_are_zero_whatever_lay_there(self, name, debug):
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

    def test_freed_pages_are_poisoned_in_debug_mode(self):
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

    def test_an_empty_step_needs_no_layer(self):
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
    def test_when_pages_run_out_half_way_through_the_batch_nothing_changes(self, window):
        kv_cache = build(window=window, num_pages=8)
        ids = [kv_cache.open() for _ in range(3)]
        grow(kv_cache, ids[1], 2 * P + 1)
        before = snapshot(kv_cache)
        with pytest.raises(OutOfPages, match="need 6 pages, 4 free of 7"):
            kv_cache.begin_step(ids, [2 * P, P, 3 * P])
        assert differences(before, snapshot(kv_cache)) == []
        kv_cache.begin_step(ids, [2 * P, 0, 2 * P])

    def test_when_window_slots_run_out_half_way_through_the_batch_nothing_changes(self):
        kv_cache = build(num_window_slots=2)
        ids = [kv_cache.open() for _ in range(3)]
        grow(kv_cache, ids[1], 3)
        before = snapshot(kv_cache)
        with pytest.raises(OutOfWindowSlots, match="need 2 window slots, 1 free of 2"):
            kv_cache.begin_step(ids, 1)
        assert differences(before, snapshot(kv_cache)) == []

    def test_copies_on_write_count_when_pages_run_out(self):
        kv_cache = build(window=0, num_pages=3)
        parent = kv_cache.open()
        grow(kv_cache, parent, 5)
        child = kv_cache.fork(parent)
        before = snapshot(kv_cache)
        with pytest.raises(OutOfPages, match="need 2 pages, 1 free of 2"):
            kv_cache.begin_step([parent, child], [1, P])
        assert differences(before, snapshot(kv_cache)) == []


class TestOpenStep:
    @pytest.mark.parametrize("window", WINDOWS)
    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize(("length", "count"), HISTORIES)
    def test_stored_layers_show_the_new_tokens_and_the_others_refuse(
        self, name, window, length, count
    ):
        run = checked(name, window)
        one, other = run.open(), run.open()
        run.append({one: length, other: 7})
        run.begin_step({one: count})
        for layer in (1, 0):
            for call in (
                lambda at=layer: run.cache.attend(at, queries(), one),
                lambda at=layer: run.cache.score(at, queries(), [one]),
                lambda at=layer: run.cache.load(at, one),
            ):
                with pytest.raises(StepError, match=f"layer {layer} is not stored yet"):
                    call()
            run.check()
            run.store(layer)
            run.check()
            keys, _, positions = run.cache.load(layer, one)
            assert len(keys) == length + count and positions[-1] == length + count - 1
        run.commit()
        run.check()

    def test_causal_queries_of_the_step_read_up_to_themselves(self):
        kv_cache = build(window=2 * P)
        seq_id = kv_cache.open()
        grow(kv_cache, seq_id, 20)
        keys, values = tokens(40, seed=1)
        kv_cache.begin_step(seq_id, 40)
        kv_cache.store(0, keys[0], values[0])
        asked = queries(40)
        out, lse = kv_cache.attend(0, asked, seq_id, [40])
        stored = kv_cache.load(0, seq_id)
        want, want_lse = softmax_attention(asked, *stored, np.arange(20, 60), 0.25)
        assert relative_error(out, want) <= 1e-5
        np.testing.assert_allclose(lse, want_lse, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("window", WINDOWS)
    def test_sequences_outside_the_step_are_readable_in_every_layer(self, window):
        kv_cache = build(window=window)
        member, other = kv_cache.open(), kv_cache.open()
        grow(kv_cache, member, 20)
        grow(kv_cache, other, 37, seed=1)
        child = kv_cache.fork(member)
        idle = kv_cache.open()
        before = [dense(kv_cache, seq_id) for seq_id in (other, child, idle)]
        asked = queries(3)
        answers = [kv_cache.attend(layer, asked, [other, child, idle]) for layer in range(LAYERS)]
        # A member that appends nothing is readable as well.
        kv_cache.begin_step([member, other], [P + 3, 0])
        for stored in range(LAYERS + 1):
            after = [dense(kv_cache, seq_id) for seq_id in (other, child, idle)]
            assert all(same_tokens(a, b) for a, b in zip(before, after, strict=True))
            for layer in range(LAYERS):
                found = kv_cache.attend(layer, asked, [other, child, idle])
                assert all(np.array_equal(a, b) for a, b in zip(answers[layer], found))
            if stored < LAYERS:
                keys, values = tokens(P + 3, seed=2)
                kv_cache.store(stored, keys[stored], values[stored])
        kv_cache.commit()

    def test_one_unreadable_member_refuses_the_whole_batch(self):
        kv_cache = build()
        ids = [kv_cache.open(), kv_cache.open()]
        grow(kv_cache, ids[0], 3)
        kv_cache.begin_step(ids[1], 1)
        with pytest.raises(StepError, match=f"sequence {ids[1]} is in the open step"):
            kv_cache.attend(0, queries(2), ids)

    def test_whatever_changes_a_sequence_waits_for_the_end_of_the_step(self):
        run = checked()
        one, other = run.open(), run.open()
        run.append({one: 40, other: 40})
        run.begin_step({one: 2})
        run.refuses_changes(one)
        run.refuses_changes(other)
        run.commit()
        run.check()


class TestStore:
    @pytest.mark.parametrize("window", WINDOWS)
    def test_the_order_of_layers_does_not_matter(self, window):
        pools = []
        for order in ((0, 1), (1, 0)):
            kv_cache = build(window=window)
            seq_id = kv_cache.open()
            for count in (5, P, 1, 3 * P + 5):
                keys, values = tokens(count, seed=count)
                kv_cache.begin_step(seq_id, count)
                for layer in order:
                    kv_cache.store(layer, keys[layer], values[layer])
                kv_cache.commit()
            pools.append(snapshot(kv_cache)["pool"])
        assert pools[0] == pools[1]

    @pytest.mark.parametrize("window", WINDOWS)
    def test_steps_and_appends_leave_the_same_state(self, window):
        found = []
        for stepwise in (False, True):
            kv_cache = build("mixed", window)
            ids = [kv_cache.open(), kv_cache.open()]
            for counts in ([5, 0], [P, 1], [1, 3 * P + 5]):
                keys, values = tokens(sum(counts), seed=sum(counts))
                if not stepwise:
                    kv_cache.append(ids, keys, values, counts)
                    continue
                kv_cache.begin_step(ids, counts)
                for layer in (1, 0):
                    kv_cache.store(layer, keys[layer], values[layer])
                kv_cache.commit()
            found.append((snapshot(kv_cache), [kv_cache.state(seq_id) for seq_id in ids]))
        changed = differences(found[0][0], found[1][0])
        assert set(changed) <= {"ids"} and found[0][1] == found[1][1]

    @pytest.mark.parametrize("window", WINDOWS)
    def test_a_failed_store_leaves_the_step_open_and_every_byte(self, window):
        run = checked(window=window)
        seq_id = run.open()
        run.append({seq_id: P - 1})
        run.begin_step({seq_id: 3})
        run.store(1)
        good = [run.bank.keys[0, run.step.tokens], run.bank.values[0, run.step.tokens]]
        poisoned = good[1].copy()
        poisoned[-1, -1, -1] = np.nan
        run.refuses(NonFiniteError, lambda: run.cache.store(0, good[0], poisoned))
        run.refuses(ArgumentError, lambda: run.cache.store(0, good[0][:2], good[1][:2]))
        run.refuses(StepError, lambda: run.cache.store(1, *good))
        run.refuses(StepError, run.cache.commit)
        run.commit()
        run.check()


class TestCommit:
    def test_layers_that_are_missing_are_named_and_the_step_stays_open(self):
        kv_cache = build()
        seq_id = kv_cache.open()
        kv_cache.begin_step(seq_id)
        before = snapshot(kv_cache)
        with pytest.raises(StepError, match=r"layers \[0, 1\] are not stored"):
            kv_cache.commit()
        assert differences(before, snapshot(kv_cache)) == []
        kv_cache.store(1, *(a[1] for a in tokens(1)))
        with pytest.raises(StepError, match=r"layers \[0\] are not stored"):
            kv_cache.commit()
        kv_cache.store(0, *(a[0] for a in tokens(1)))
        kv_cache.commit()
        with pytest.raises(StepError, match="needs an open step"):
            kv_cache.commit()


class TestAbort:
    @pytest.mark.parametrize("stored", [(), (0,), (1,), (1, 0)], ids=str)
    @pytest.mark.parametrize("window", WINDOWS)
    @pytest.mark.parametrize("name", FORMATS)
    def test_it_equals_appending_and_truncating(self, name, window, stored):
        """State, pool order, pages and everything after are those of append and truncate."""
        for length, count in HISTORIES:
            pair = [checked(name, window), checked(name, window)]
            for run in pair:
                seq_id, child = run.open(), run.open()
                run.append({seq_id: length, child: 2})
                child = run.fork(seq_id)
                if run is pair[0]:
                    run.begin_step({seq_id: count})
                    for layer in stored:
                        run.store(layer)
                    run.abort_step()
                else:
                    run.append({seq_id: count})
                    run.truncate(seq_id, length)
            pair[0].check()
            aborted, truncated = (snapshot(run.cache) for run in pair)
            # Which bytes lie above c may differ; who owns what may not.
            bytes_may_differ = {"pool", "ids", "version", "stored"}
            bytes_may_differ |= {key for key in aborted if key.startswith(("ring", "sinks"))}
            assert set(differences(aborted, truncated)) <= bytes_may_differ
            for run in pair:
                seq_id, _, child = run.sequences
                for more in (1, P + 1):
                    run.append({child: more, seq_id: more})
            pair[0].check()
            one, two = pair[0].cache, pair[1].cache
            for left, right in zip(pair[0].sequences, pair[1].sequences):
                assert one.state(left) == two.state(right)
                assert same_tokens(dense(one, left), dense(two, right))

    @pytest.mark.parametrize("window", [P, 2 * P])
    def test_no_layer_loses_a_token_when_the_ring_was_overwritten_in_some(self, window):
        # More new tokens than the ring has rows: the stored layer's ring holds none of the old.
        for stored in (0, 1):
            run = checked(window=window)
            seq_id = run.open()
            run.append({seq_id: 2 * P + 9})
            run.begin_step({seq_id: window + P})
            run.store(stored)
            run.abort_step()
            assert run.cache.state(seq_id).coded == 2 * P + 9
            run.check()
            run.append({seq_id: 1})
            run.check()

    def test_it_leaves_no_reservation_behind(self):
        kv_cache = build()
        seq_id = kv_cache.open()
        free = kv_cache.stats().pages_free
        kv_cache.begin_step(seq_id, 3 * P)
        kv_cache.abort_step()
        assert kv_cache.stats().pages_free == free
        with pytest.raises(StepError, match="needs an open step"):
            kv_cache.abort_step()
        with pytest.raises(StepError, match="needs an open step"):
            kv_cache.store(0, *(a[0] for a in tokens(1)))

    def test_the_boundary_of_an_eviction_survives(self):
        run = checked(window=P)
        seq_id = run.open()
        run.append({seq_id: 6 * P + 3})
        run.keep_first_last(seq_id, 5, 2 * P + 1)
        run.check()
        run.begin_step({seq_id: 2 * P})
        run.store(0)
        run.check()
        run.abort_step()
        run.check()


class TestForks:
    @pytest.mark.parametrize("window", WINDOWS)
    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("length", [3, P, P + 5, 3 * P])
    def test_parent_and_children_append_in_one_step(self, name, window, length):
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

    def test_the_last_owner_of_an_open_page_writes_in_place(self):
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

    def test_a_window_slot_is_shared_until_one_of_them_appends(self):
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

    def test_an_aborted_copy_on_write_leaves_both_readable(self):
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


class TestSinks:
    """Sinks belong to the page of block 0."""

    def records(self, run, *seq_ids):
        return run.cache.tables.sink_records(list(seq_ids)).tolist()

    def test_forks_share_the_record_until_the_page_is_copied(self):
        run = checked(window=P)
        parent = run.open()
        run.append({parent: 2})
        child = run.fork(parent)
        one, two = self.records(run, parent, child)
        assert one == two >= 0
        # Both go on inside block 0, with different third and fourth sinks.
        run.append({parent: 5, child: 1})
        one, two = self.records(run, parent, child)
        assert one != two
        run.check()
        run.append({child: P, parent: 2 * P})
        assert [run.cache.state(s).num_sinks for s in (parent, child)] == [4, 4]
        run.check()

    def test_forks_of_a_full_block_keep_sharing(self):
        run = checked(window=P)
        parent = run.open()
        run.append({parent: P + 2})
        child = run.fork(parent)
        run.append({parent: 2 * P, child: 3 * P})
        one, two = self.records(run, parent, child)
        assert one == two >= 0
        run.check()
        run.close([parent])
        run.check()

    def test_they_grow_back_after_truncation(self):
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

    def test_evicting_block_0_drops_them_for_that_sequence_only(self):
        run = checked(window=P)
        parent = run.open()
        run.append({parent: 4 * P + 1})
        child = run.fork(parent)
        run.evict(parent, [0])
        assert run.cache.state(parent).num_sinks == 0
        assert run.cache.state(child).num_sinks == 4
        assert self.records(run, parent)[0] == -1 and self.records(run, child)[0] >= 0
        run.check()
        run.append({parent: P, child: P})
        assert run.cache.state(parent).num_sinks == 0
        run.check()

    def test_a_sequence_that_lost_block_0_starts_again_from_nothing(self):
        run = checked(window=P)
        seq_id = run.open()
        run.append({seq_id: 3 * P})
        run.evict(seq_id, [0])
        run.truncate(seq_id, 0)
        run.append({seq_id: 6})
        assert run.cache.state(seq_id).num_sinks == 4
        run.check()

    def test_more_sinks_than_the_first_chunks_bring(self):
        run = checked(window=2 * P, sinks=P)
        seq_id = run.open()
        for count in (1, 0, 3, P - 5, 1, 1, 2 * P):
            run.append({seq_id: count})
            run.check()
        assert run.cache.state(seq_id).num_sinks == P

    def test_a_boundary_below_the_sinks_hides_the_rest_of_them(self):
        run = checked(window=P)
        seq_id = run.open()
        run.append({seq_id: 5 * P})
        run.keep_first_last(seq_id, 2, P)
        assert run.cache.load(0, seq_id)[2][:3].tolist() == [0, 1, 4 * P]
        run.check()


@pytest.mark.parametrize("window", WINDOWS)
def test_a_policy_may_run_between_any_two_tokens(window):
    run = checked(window=window)
    seq_id = run.open()
    for _ in range(60):
        run.append({seq_id: 3})
        run.keep_first_last(seq_id, 4, 2 * P + 5)
        run.check()
    assert run.cache.stats().pages_used <= 5
