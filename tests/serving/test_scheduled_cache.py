"""The scheduler drives a real cache: bytes of all layers are stored and read back."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq import PagedKVCache, SharingOptions, preset
from pagedtq.errors import StepError
from pagedtq.serving import PreemptionCosts, Scheduler, SchedulerOptions
from tests.serving.paged_engine import PagedEngine
from tests.serving.test_scheduler import assert_drained, request_of

LAYERS, HEADS, DIM = 2, 2, 32


def cache_of(num_pages, window):
    config = preset(
        "exact" if not window else "k8v8",
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        num_pages=num_pages,
        page_size=16,
        window=window,
        num_window_slots=4,
        num_host_pages=30,
    )
    return PagedKVCache(config, sharing=SharingOptions(), debug=True, num_threads=1)


def vectors_of(tokens, layer):
    """Return keys (or values) that name their token: one channel stands out."""
    keys = np.full((len(tokens), HEADS, DIM), 0.1 * (layer + 1), np.float32)
    keys[np.arange(len(tokens)), :, np.asarray(tokens) % DIM] = 8.0
    return keys


@pytest.mark.parametrize("preemption", ["recompute", "swap", "auto"])
@pytest.mark.parametrize("window", [0, 16])
def test_what_is_loaded_are_the_tokens_of_the_request_after_forks_and_preemptions(
    window, preemption, monkeypatch
):
    cache = cache_of(12, window)
    costs = PreemptionCosts(out_rate=1e9, in_rate=1e9, prefill_rate=10)
    options = SchedulerOptions(watermark=0.0, step_tokens=40, preemption=preemption)
    scheduler = Scheduler(cache, options, costs=costs)
    requests = [
        request_of("a", list(range(30)), 20),
        request_of("b", list(range(20)) + [31] * 9, 20, num_samples=2),
        request_of("c", [5] * 40, 24),
    ]
    engine = PagedEngine(scheduler)
    copy_swap = cache.copy_swap
    monkeypatch.setattr(cache, "copy_swap", lambda plan: (engine.copy_swap(plan), copy_swap(plan)))
    for request in requests:
        scheduler.add(request)
    rng, lost, finished, steps = np.random.default_rng(0), [], {}, 0
    while scheduler.has_work:
        step = scheduler.schedule()
        lost += step.preempted
        for layer in range(LAYERS):
            stored = vectors_of(step.token_ids, layer)
            cache.store(layer, stored, stored)
        engine.compute(step)
        for seq_id in step.plan.seq_ids.tolist():
            keys = np.asarray(cache.load(1, seq_id)[0], np.float32)
            assert (keys[:, 0].argmax(axis=1) == engine.read(seq_id) % DIM).all()
        output = scheduler.update(rng.integers(0, DIM, step.sample_members.size))
        finished |= {done.request_id: done for done in output.finished}
        steps += 1
    assert lost
    assert bool(scheduler.stats.swapped) == (preemption != "recompute")
    assert {n: len(done.completions) for n, done in finished.items()} == {"a": 1, "b": 2, "c": 1}
    assert finished["b"].num_found_tokens in (0, 16)
    assert_drained(scheduler)


def test_a_step_whose_layers_are_not_all_stored_does_not_end():
    cache = cache_of(12, 0)
    scheduler = Scheduler(cache)
    scheduler.add(request_of("a", 20, 3))
    step = scheduler.schedule()
    cache.store(0, *[vectors_of(step.token_ids, 0)] * 2)
    with pytest.raises(StepError, match="not stored"):
        scheduler.update([1])
    scheduler.abort_step()
    cache.check_integrity()
    step = scheduler.schedule()
    for layer in range(LAYERS):
        cache.store(layer, *[vectors_of(step.token_ids, layer)] * 2)
    scheduler.update([1])
    assert scheduler.lengths.tolist() == [20]
