"""Swapped sequences come back to the byte, in every format, while others go on."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pagedtq import CacheConfig, KeepFirstLast, PagedKVCache, Polar, SharingOptions, preset
from pagedtq.errors import ConfigError, OutOfHostPages, StepError, SwappedError
from tests.cache.bank import FORMATS, LAYERS, differences, draw_tokens, make_config, snapshot

SIZE = 16


def polar_config(**fields) -> CacheConfig:
    shape = {"num_layers": LAYERS, "num_kv_heads": 2, "head_dim": 16}
    return CacheConfig(keys=Polar(bits=5), values=Polar(bits=4), **(shape | fields))


def cache_of(name="k4v4", window=SIZE, sharing=None, **fields) -> PagedKVCache:
    fields = {
        "num_pages": 30,
        "page_size": SIZE,
        "window": window,
        "num_window_slots": 5,
        "num_host_pages": 20,
    } | fields
    config = polar_config(**fields) if name == "polar" else make_config(name, **fields)
    return PagedKVCache(config, num_threads=1, debug=True, sharing=sharing)


def filled(cache, count, seed=1, token_ids=None):
    seq_id = cache.open(token_ids)
    keys, values = draw_tokens(np.random.default_rng(seed), count, cache.config)
    at = cache.length(seq_id)
    cache.append(seq_id, keys[:, at:], values[:, at:])
    return seq_id


def bytes_of(cache, seq_id) -> dict[str, bytes]:
    """Every byte of a sequence: its pages whole, its ring rows, its sinks, its state."""
    tables = cache.tables
    length, coded, ring, sinks = cache.state(seq_id)
    pages = tables.block_table([seq_id])[0]
    state = {
        "state": bytes([length, coded, ring, sinks]),
        "evicted": (pages == 0).tobytes(),
        "pages": cache.backend.gather(pages[pages > 0]).tobytes(),
    }
    slot, record = tables.window_slots([seq_id])[0], tables.sink_records([seq_id])[0]
    for layer in range(cache.config.num_layers):
        if cache.config.has_overlay(layer):
            window = cache.backend.window(layer)
            rows = np.arange(ring, length) % cache.config.window_tokens
            state[f"ring {layer}"] = window.take_rows(True, slot, rows).tobytes()
            state[f"sinks {layer}"] = window.take_rows(False, record, np.arange(sinks)).tobytes()
    return state


@pytest.mark.parametrize("name", [*FORMATS, "polar"])
@pytest.mark.parametrize("window", [0, SIZE, 2 * SIZE])
@pytest.mark.parametrize("order", ["layer_major", "page_major"])
def test_a_sequence_comes_back_to_the_byte_in_every_format(name, window, order):
    cache = cache_of(name, window, pool_order=order, key_bounds=name not in ("exact", "polar"))
    # Full and open blocks, one that is all ring, an evicted block, a cut inside a page.
    ids = [filled(cache, count, seed=count) for count in (70, 32, 5)]
    if window < 2 * SIZE:
        cache.evict(ids[0], [1])
    cache.truncate(ids[0], 68)
    before = [bytes_of(cache, seq_id) for seq_id in ids]
    used = cache.stats().pages_used
    cache.swap_out(ids)
    assert cache.stats().pages_used == 0
    other = filled(cache, 300, seed=9)
    assert cache.is_swapped(ids).all()
    cache.close(other)
    cache.swap_in(ids)
    assert [bytes_of(cache, seq_id) for seq_id in ids] == before
    assert cache.stats().pages_used == used
    assert cache.stats().host_pages_used == 0


def test_a_sequence_goes_on_after_a_swap_as_if_there_had_been_none():
    plain, swapped = cache_of("mixed"), cache_of("mixed")
    for cache in (plain, swapped):
        seq_id = filled(cache, 37, seed=3)
        if cache is swapped:
            cache.swap_out(seq_id)
            filled(cache, 40, seed=4)
            cache.swap_in(seq_id)
        keys, values = draw_tokens(np.random.default_rng(5), 40, cache.config)
        cache.append(seq_id, keys, values)
        cache.truncate(seq_id, 50)
        cache.append(seq_id, keys, values)
        cache.evict(seq_id, KeepFirstLast(4, 40))
    ids = [int(cache.tables.sequence_ids()[0]) for cache in (plain, swapped)]
    queries = np.random.default_rng(1).standard_normal((3, 4, 16)).astype(np.float32)
    for layer in range(LAYERS):
        one, two = (
            cache.attend(layer, queries, seq_id, [3])
            for cache, seq_id in zip((plain, swapped), ids)
        )
        assert np.array_equal(one[0], two[0])
        assert np.array_equal(one[1], two[1])


def test_others_step_while_the_bytes_are_on_their_way():
    cache = cache_of("k4v4")
    leaving, other = filled(cache, 70), filled(cache, 20, seed=2)
    before = bytes_of(cache, leaving)
    keys, values = draw_tokens(np.random.default_rng(6), 30, cache.config)
    plan = cache.begin_swap_out(leaving)
    assert bytes_of(cache, leaving) == before
    thread = threading.Thread(target=cache.copy_swap, args=(plan,))
    cache.begin_step(other, 30)
    thread.start()
    for layer in range(LAYERS):
        cache.store(layer, keys[layer], values[layer])
    thread.join()
    with pytest.raises(StepError, match="step is open"):
        cache.commit_swap(plan)
    cache.commit()
    cache.commit_swap(plan)
    plan = cache.begin_swap_in(leaving)
    cache.append(other, keys, values)
    cache.copy_swap(plan)
    cache.append(other, keys, values)
    cache.commit_swap(plan)
    assert bytes_of(cache, leaving) == before


def test_a_swap_is_not_committed_before_its_bytes_are_copied():
    cache = cache_of()
    plan = cache.begin_swap_out(filled(cache, 20))
    with pytest.raises(StepError, match="not copied"):
        cache.commit_swap(plan)
    cache.abort_swap(plan)
    with pytest.raises(StepError, match="not under way"):
        cache.copy_swap(plan)


def test_a_copy_that_fails_leaves_the_cache_as_it_was(monkeypatch):
    cache = cache_of()
    seq_id = filled(cache, 40)
    before = snapshot(cache)

    def no_memory(shape):
        raise MemoryError

    monkeypatch.setattr(cache.backend, "host_memory", no_memory)
    with pytest.raises(MemoryError):
        cache.swap_out(seq_id)
    changed = set(differences(before, snapshot(cache)))
    # What was taken on the host is free again, at the other end of its queue.
    assert changed <= {"free host pages", "free rings", "version"}
    monkeypatch.undo()
    cache.swap_out(seq_id)
    cache.swap_in(seq_id)


def test_the_host_tier_is_allocated_by_the_first_swap_and_counted():
    cache = cache_of()
    seq_id = filled(cache, 40)
    assert cache.memory_report().host_bytes == 0
    cache.swap_out(seq_id)
    report, page_bytes = cache.memory_report(), cache.backend.layout.page_bytes
    ring = LAYERS * 2 * 2 * SIZE * 16 * 2
    sinks = LAYERS * 2 * 2 * 4 * 16 * 2
    assert report.host_bytes == 20 * page_bytes + ring + sinks
    assert report.host_used_bytes == 3 * page_bytes + ring + sinks
    stats = cache.stats()
    assert (stats.num_swapped, stats.host_pages, stats.host_pages_used) == (1, 20, 3)
    cache.close(seq_id)
    assert cache.memory_report().host_used_bytes == 0
    assert cache.stats().num_sequences == 0


def test_shared_pages_are_not_copied_back_while_somebody_has_them():
    cache = cache_of("k3v3", sharing=SharingOptions())
    tokens = list(range(70))
    first = filled(cache, 70, token_ids=tokens)
    second = filled(cache, 70, token_ids=tokens)
    before = bytes_of(cache, second)
    cache.swap_out(second)
    plan = cache.begin_swap_in(second)
    assert (plan.num_reused, plan.pages.size) == (4, 1)
    cache.abort_swap(plan)
    cache.close(first)
    cache.swap_in(second)
    assert bytes_of(cache, second) == before
    third = cache.open(tokens)
    assert cache.length(third) == 64


def test_a_swapped_sequence_is_refused_with_its_remedy():
    cache = cache_of()
    seq_id = filled(cache, 20)
    cache.swap_out(seq_id)
    queries = np.zeros((1, 4, 16), np.float32)
    for call in (
        lambda: cache.attend(0, queries, seq_id),
        lambda: cache.score(0, queries, seq_id),
        lambda: cache.load(0, seq_id),
        lambda: cache.begin_step(seq_id),
        lambda: cache.fork(seq_id),
    ):
        with pytest.raises(SwappedError, match="swap it in"):
            call()
    assert cache.length(seq_id) == 20


def test_a_cache_without_a_host_tier_says_what_to_raise():
    cache = cache_of(num_host_pages=0)
    with pytest.raises(OutOfHostPages, match="num_host_pages"):
        cache.swap_out(filled(cache, 20))


@pytest.mark.parametrize("value", [-1, 1 << 31, True, 1.5])
def test_a_wrong_number_of_host_pages_is_refused(value):
    with pytest.raises(ConfigError, match="num_host_pages"):
        preset("k4v4", num_layers=1, num_kv_heads=1, head_dim=16, num_pages=4, num_host_pages=value)
