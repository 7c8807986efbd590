"""An open step: stored layer by layer, committed; and what other sequences see of it."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import ArgumentError, NonFiniteError, StepError
from tests.cache.bank import LAYERS, differences, snapshot
from tests.cache.small_caches import (
    FORMATS,
    HISTORIES,
    WINDOWS,
    P,
    build,
    checked,
    dense,
    grow,
    queries,
    same_tokens,
    tokens,
)
from tests.reference import relative_error, softmax_attention


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


@pytest.mark.parametrize("window", WINDOWS)
def test_a_policy_may_run_between_any_two_tokens(window):
    run = checked(window=window)
    seq_id = run.open()
    for _ in range(60):
        run.append({seq_id: 3})
        run.keep_first_last(seq_id, 4, 2 * P + 5)
        run.check()
    assert run.cache.stats().pages_used <= 5
