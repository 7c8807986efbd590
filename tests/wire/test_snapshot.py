"""Whole caches in files: what is saved comes back, and equal caches give equal files."""

from __future__ import annotations

import numpy as np
import pytest
from wire_caches import append, assert_same_sequence, busy_cache, one_sequence, small_config

from pagedtq import Exact, KeepFirstLast, LayerOverride, PagedKVCache, TurboQuant, preset
from pagedtq.errors import (
    ArgumentError,
    OutOfPages,
    OutOfWindowSlots,
    StepError,
    WireMismatch,
)
from pagedtq.wire import export_sequence, inspect_file, load_cache, save_cache

EXACT_FIRST = (LayerOverride(layers=(0,), keys=Exact(), values=Exact()),)
PROD = TurboQuant(bits=3, estimator="prod")

CONFIGS = {
    "one layer": small_config(),
    "no window": small_config(window=0),
    "wide window": small_config(window=48, sinks=0),
    "exact boundary layer": small_config(num_layers=3, overrides=EXACT_FIRST),
    "all exact": small_config(num_layers=2, keys=Exact(), values=Exact(dtype="f32")),
    "prod, bf16, bounds": small_config(
        num_kv_heads=2, head_dim=32, keys=PROD, kv_dtype="bf16", key_bounds=True
    ),
    "page-major": small_config(num_layers=2, num_kv_heads=3, pool_order="page_major"),
    "f32, 3 bits": small_config(
        head_dim=16, keys=TurboQuant(bits=3), values=TurboQuant(bits=3), kv_dtype="f32"
    ),
}


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request):
    return request.param


def pairs(cache, other):
    ids, twins = cache.tables.sequence_ids().tolist(), other.tables.sequence_ids().tolist()
    assert len(ids) == len(twins) == 6
    return list(zip(ids, twins))


def test_a_loaded_cache_is_the_saved_one(config, tmp_path):
    cache = busy_cache(config, debug=True)
    save_cache(cache, tmp_path / "cache.ptq")
    loaded = load_cache(tmp_path / "cache.ptq", debug=True)
    loaded.check_integrity()
    assert loaded.config == config
    for seq, twin in pairs(cache, loaded):
        assert_same_sequence(cache, seq, loaded, twin)
    assert loaded.stats() == cache.stats()


def test_a_loaded_cache_goes_on_like_the_saved_one(config, tmp_path):
    cache = busy_cache(config, debug=True)
    save_cache(cache, tmp_path / "cache.ptq")
    loaded = load_cache(tmp_path / "cache.ptq", debug=True)
    for seed, (seq, twin) in enumerate(pairs(cache, loaded)):
        # Across the end of a block: seals from the ring, copies shared pages, grows sinks.
        append(cache, seq, 19, seed)
        append(loaded, twin, 19, seed)
    for seq, twin in pairs(cache, loaded):
        assert_same_sequence(cache, seq, loaded, twin)
    cache.close(cache.tables.sequence_ids())
    loaded.close(loaded.tables.sequence_ids())
    assert loaded.stats() == cache.stats()


def test_saving_a_loaded_cache_gives_the_same_file(config, tmp_path):
    save_cache(busy_cache(config), tmp_path / "one")
    save_cache(load_cache(tmp_path / "one", debug=True), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_what_former_owners_left_in_a_page_is_not_saved(config):
    fresh, seq = one_sequence(config, 21)
    used = PagedKVCache(config)
    old = used.open()
    append(used, old, used.tables.pool.num_free * config.page_size, seed=9)
    used.close(old)
    twin = used.open()
    append(used, twin, 21)
    assert b"".join(export_sequence(used, twin)) == b"".join(export_sequence(fresh, seq))


def test_forks_share_pages_in_the_file_too(tmp_path):
    cache, seq = one_sequence(tokens=64)
    save_cache(cache, tmp_path / "alone")
    for _ in range(3):
        cache.fork(seq)
    save_cache(cache, tmp_path / "forked")
    grown = (tmp_path / "forked").stat().st_size - (tmp_path / "alone").stat().st_size
    # Three states and page tables of four blocks, padded to 64, and no page.
    assert grown <= 3 * (56 + 16) + 63
    assert inspect_file(tmp_path / "forked").pages_shared == 4
    loaded = load_cache(tmp_path / "forked", debug=True)
    assert (loaded.stats().pages_used, loaded.stats().pages_shared) == (4, 4)
    first, second = loaded.tables.sequence_ids()[:2].tolist()
    before = loaded.load(0, first)
    append(loaded, second, 1)
    for mine, old in zip(loaded.load(0, first), before):
        np.testing.assert_array_equal(mine, old)


def test_a_block_that_is_only_in_the_ring_takes_no_page_in_the_file(tmp_path):
    cache, _ = one_sequence(tokens=15)
    save_cache(cache, tmp_path / "cache.ptq")
    report = inspect_file(tmp_path / "cache.ptq")
    assert (report.num_pages, report.num_filled, report.num_rings) == (1, 0, 1)
    loaded = load_cache(tmp_path / "cache.ptq", debug=True)
    seq = int(loaded.tables.sequence_ids()[0])
    # The page came without bytes: its norms must be those of a new page.
    slots = np.arange(16, 32)
    keys, values = loaded.backend.load(0, slots)
    assert not keys.any() and not values.any()
    append(loaded, seq, 20)


def test_an_empty_cache_can_be_saved(tmp_path):
    save_cache(PagedKVCache(small_config()), tmp_path / "cache.ptq")
    assert load_cache(tmp_path / "cache.ptq").stats().num_sequences == 0


def test_key_means_travel_with_the_cache(tmp_path):
    means = np.random.default_rng(0).standard_normal((1, 1, 8)).astype(np.float32)
    cache, seq = one_sequence(key_means=means)
    save_cache(cache, tmp_path / "cache.ptq")
    loaded = load_cache(tmp_path / "cache.ptq")
    np.testing.assert_array_equal(loaded.backend.key_means, means)
    assert_same_sequence(cache, seq, loaded, int(loaded.tables.sequence_ids()[0]))


@pytest.mark.parametrize("order", ["layer_major", "page_major"])
def test_a_cache_opens_in_another_pool_order_and_size(tmp_path, order):
    config = small_config(num_layers=2, num_kv_heads=2)
    cache = busy_cache(config)
    save_cache(cache, tmp_path / "cache.ptq")
    other = config.replace(pool_order=order, num_pages=60, num_window_slots=9)
    loaded = load_cache(tmp_path / "cache.ptq", config=other, accumulate="float64", debug=True)
    assert loaded.config == other
    for seq, twin in pairs(cache, loaded):
        np.testing.assert_array_equal(
            cache.load(1, seq)[0].astype(np.float16), loaded.load(1, twin)[0].astype(np.float16)
        )


def test_pieces_of_a_large_cache_are_read_by_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr("pagedtq.wire.reading.PIECE_BYTES", 300)
    monkeypatch.setattr("pagedtq.wire.writing.PIECE_BYTES", 300)
    config = small_config(num_pages=80)
    cache, seq = one_sequence(config, 1000)
    save_cache(cache, tmp_path / "cache.ptq")
    loaded = load_cache(tmp_path / "cache.ptq")
    assert_same_sequence(cache, seq, loaded, int(loaded.tables.sequence_ids()[0]))


@pytest.mark.parametrize("piece", [1, 300, 1000])
def test_a_file_is_the_same_however_its_pieces_are_cut(tmp_path, monkeypatch, piece):
    cache = busy_cache(small_config(num_pages=100))
    # More pieces than there are buffers for them, made on several threads.
    append(cache, cache.open(), 900)
    save_cache(cache, tmp_path / "whole")
    monkeypatch.setattr("pagedtq.wire.writing.PIECE_BYTES", piece)
    save_cache(cache, tmp_path / "cut")
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize(
    ("changes", "error", "problem"),
    [
        ({"num_pages": 4}, OutOfPages, "need 7 pages, 3 free"),
        ({"num_window_slots": 1}, OutOfWindowSlots, "need 3 window slots, 1 free"),
        ({"seed": 4}, WireMismatch, "differ in seed"),
        ({"window": 32, "sinks": 1}, WireMismatch, "differ in window, sinks"),
        ({"keys": Exact()}, WireMismatch, "differ in keys"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, changes, error, problem):
    cache = busy_cache(small_config())
    save_cache(cache, tmp_path / "cache.ptq")
    with pytest.raises(error, match=problem):
        load_cache(tmp_path / "cache.ptq", config=small_config(**changes))


def test_a_saved_cache_beyond_this_machines_memory_needs_a_configuration(tmp_path, monkeypatch):
    cache, seq = one_sequence()
    save_cache(cache, tmp_path / "cache.ptq")
    monkeypatch.setattr("os.sysconf", lambda name: 50)
    with pytest.raises(ArgumentError, match="pass a config with fewer pages than 24"):
        load_cache(tmp_path / "cache.ptq")
    loaded = load_cache(tmp_path / "cache.ptq", config=small_config(num_pages=3))
    assert_same_sequence(cache, seq, loaded, int(loaded.tables.sequence_ids()[0]))


def test_an_open_step_must_end_before_a_save(tmp_path):
    cache, seq = one_sequence()
    cache.begin_step(seq)
    with pytest.raises(StepError, match="extract must wait"):
        save_cache(cache, tmp_path / "cache.ptq")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_an_operating_system_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_cache(tmp_path / "absent")
    with pytest.raises(FileNotFoundError):
        save_cache(PagedKVCache(small_config()), tmp_path / "absent" / "cache.ptq")


def test_sequences_evicted_before_and_after_a_save_read_the_same(tmp_path):
    config = preset(
        "k4v4", num_layers=1, num_kv_heads=1, head_dim=16, num_pages=20, page_size=16, sinks=4
    )
    cache, seq = one_sequence(config, 150)
    save_cache(cache, tmp_path / "cache.ptq")
    loaded = load_cache(tmp_path / "cache.ptq", debug=True)
    twin = int(loaded.tables.sequence_ids()[0])
    cache.evict(seq, KeepFirstLast(20, 40))
    loaded.evict(twin, KeepFirstLast(20, 40))
    assert_same_sequence(cache, seq, loaded, twin)
    save_cache(loaded, tmp_path / "again")
    again = load_cache(tmp_path / "again")
    assert_same_sequence(cache, seq, again, int(again.tables.sequence_ids()[0]))
