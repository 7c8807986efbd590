"""Giving a step up equals appending its tokens and cutting them off."""

from __future__ import annotations

import pytest

from pagedtq.errors import StepError
from tests.cache.bank import differences, snapshot
from tests.cache.small_caches import (
    FORMATS,
    HISTORIES,
    WINDOWS,
    P,
    build,
    checked,
    dense,
    same_tokens,
    tokens,
)


@pytest.mark.parametrize("stored", [(), (0,), (1,), (1, 0)], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("name", FORMATS)
def test_an_aborted_step_equals_appending_and_truncating(name, window, stored):
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
def test_an_abort_loses_no_token_when_the_ring_was_overwritten_in_some(window):
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


def test_an_aborted_step_leaves_no_reservation_behind():
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


def test_the_boundary_of_an_eviction_survives_an_abort():
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
