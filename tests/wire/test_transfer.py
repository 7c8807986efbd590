"""Sequences between caches: whatever the chunks, all of it or nothing."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from wire_caches import (
    append,
    assert_same_sequence,
    busy_cache,
    frozen,
    one_sequence,
    small_config,
    with_header,
)

from pagedtq import KeepFirstLast, PagedKVCache
from pagedtq.errors import (
    ArgumentError,
    OutOfPages,
    OutOfWindowSlots,
    StepError,
    UnknownSequence,
    WireChecksum,
    WireError,
    WireMismatch,
    WireTruncated,
)
from pagedtq.wire import export_pages, export_sequence, import_pages, import_sequence


def cut(data, size):
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("order", ["layer_major", "page_major"])
def test_a_sequence_arrives_as_it_left(order):
    config = small_config(num_layers=2, num_kv_heads=2, num_pages=60, num_window_slots=20)
    cache = busy_cache(config, debug=True)
    other = PagedKVCache(config.replace(pool_order=order), debug=True)
    append(other, other.open(), 20, seed=4)
    for seq in cache.tables.sequence_ids().tolist():
        twin = import_sequence(other, export_sequence(cache, seq))
        assert_same_sequence(cache, seq, other, twin)
        append(cache, seq, 17, seed=6)
        append(other, twin, 17, seed=6)
        assert_same_sequence(cache, seq, other, twin)


@pytest.mark.parametrize("size", [1, 7, 171, 173, 1 << 20])
def test_it_does_not_matter_how_the_bytes_are_cut(size):
    cache, seq = one_sequence()
    data = b"".join(export_sequence(cache, seq))
    other = PagedKVCache(small_config())
    twin = import_sequence(other, cut(data, size))
    assert_same_sequence(cache, seq, other, twin)


def test_chunks_can_be_kept_and_of_any_bytes_type():
    cache, seq = one_sequence(small_config(num_pages=300), 2000)
    chunks = list(export_sequence(cache, seq))
    assert b"".join(chunks) == b"".join(export_sequence(cache, seq))
    kinds = [bytes(chunks[0]), bytearray(chunks[1]), *chunks[2:], b"", memoryview(b"")]
    other = PagedKVCache(small_config(num_pages=300))
    assert_same_sequence(cache, seq, other, import_sequence(other, kinds))


def test_pages_arrive_in_pieces(monkeypatch):
    monkeypatch.setattr("pagedtq.wire.reading.PIECE_BYTES", 300)
    monkeypatch.setattr("pagedtq.wire.writing.PIECE_BYTES", 300)
    cache, seq = one_sequence(small_config(num_pages=200), 1000)
    chunks = list(export_sequence(cache, seq))
    assert len(chunks) > 30
    other = PagedKVCache(small_config(num_pages=200), debug=True)
    assert_same_sequence(cache, seq, other, import_sequence(other, chunks))
    # The fifth piece is broken, and so is a later one: the first of them is named.
    data = bytearray(b"".join(chunks))
    for index in (9, 40):
        data[len(chunks[0]) + index * 136] ^= 1
    before = frozen(other)
    with pytest.raises(WireChecksum, match="page 9 at byte"):
        import_sequence(other, [bytes(data)])
    assert frozen(other) == before


@pytest.mark.parametrize("debug", [False, True])
def test_a_transfer_that_stops_anywhere_changes_nothing(debug):
    cache, seq = one_sequence(tokens=40)
    data = b"".join(export_sequence(cache, seq))
    other = busy_cache(small_config(), debug=debug)
    before = frozen(other)

    def failing(size):
        yield data[:size]
        raise ConnectionError

    for size in range(0, len(data), 29):
        with pytest.raises(ConnectionError):
            import_sequence(other, failing(size))
        with pytest.raises(WireError):
            import_sequence(other, [data[:size]])
    assert frozen(other) == before
    other.check_integrity()
    assert_same_sequence(cache, seq, other, import_sequence(other, [data]))


def test_what_does_not_fit_is_refused_and_changes_nothing():
    cache, seq = one_sequence(small_config(num_pages=60), 300)
    data = b"".join(export_sequence(cache, seq))
    other = busy_cache(small_config(num_pages=24))
    before = frozen(other)
    with pytest.raises(OutOfPages, match="need 19 pages, 16 free of 23"):
        import_sequence(other, [data])
    assert frozen(other) == before
    full = PagedKVCache(small_config(num_pages=60, num_window_slots=1))
    append(full, full.open(), 1)
    before = frozen(full)
    with pytest.raises(OutOfWindowSlots):
        import_sequence(full, [data])
    assert frozen(full) == before


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seed": 4}, "config_digest at byte 16: the configurations differ in seed"),
        ({"kv_dtype": "f32"}, "differ in kv_dtype"),
        ({"first_kv_head": 1}, "differ in first_kv_head"),
        ({"sinks": 1}, "differ in sinks"),
        ({"num_layers": 2}, "differ in num_layers, keys, values"),
    ],
)
def test_a_cache_of_another_format_is_named(changes, problem):
    cache, seq = one_sequence()
    other = PagedKVCache(small_config(**changes))
    with pytest.raises(WireMismatch, match=problem):
        import_sequence(other, export_sequence(cache, seq))


def test_key_means_must_agree():
    means = np.ones((1, 1, 8), np.float32)
    cache, seq = one_sequence(key_means=means)
    data = b"".join(export_sequence(cache, seq))
    for other_means in (None, means + 1):
        other = PagedKVCache(small_config(), key_means=other_means)
        with pytest.raises(WireMismatch, match="codec_digest at byte 48: the key means differ"):
            import_sequence(other, [data])
    twin_cache = PagedKVCache(small_config(), key_means=means.copy())
    assert_same_sequence(cache, seq, twin_cache, import_sequence(twin_cache, [data]))


def test_capacity_and_pool_order_do_not_count():
    cache, seq = one_sequence()
    other = PagedKVCache(small_config(num_pages=5, num_window_slots=1, pool_order="page_major"))
    assert_same_sequence(cache, seq, other, import_sequence(other, export_sequence(cache, seq)))


def test_the_sender_must_not_change_meanwhile():
    cache, seq = one_sequence(tokens=40)
    chunks = export_sequence(cache, seq)
    next(chunks)
    append(cache, seq, 1)
    with pytest.raises(StepError, match="changed while it was being written out"):
        list(chunks)


def test_the_receiver_must_not_change_meanwhile():
    cache, seq = one_sequence(tokens=40)
    data = b"".join(export_sequence(cache, seq))
    other = PagedKVCache(small_config(), debug=True)
    mine = other.open()

    def meddling(at):
        yield data[:at]
        append(other, mine, 20, seed=2)
        yield data[at:]

    # While pages are on their way, while windows are, and behind everything.
    for at in (len(data) // 2, len(data) - 60, len(data)):
        with pytest.raises(StepError, match="changed while sequences were being read"):
            import_sequence(other, meddling(at))
        other.check_integrity()
        twin, twin_seq = one_sequence(tokens=0)
        for _ in range(other.length(mine) // 20):
            append(twin, twin_seq, 20, seed=2)
        assert_same_sequence(twin, twin_seq, other, mine)


def test_open_steps_and_unknown_sequences_are_refused():
    cache, seq = one_sequence()
    data = b"".join(export_sequence(cache, seq))
    with pytest.raises(UnknownSequence):
        export_sequence(cache, seq + 1)
    cache.begin_step(seq)
    with pytest.raises(StepError, match="extract must wait"):
        export_sequence(cache, seq)
    with pytest.raises(StepError, match="adopt must wait"):
        import_sequence(cache, [data])


def test_an_evicted_and_forked_sequence_keeps_its_boundary():
    cache, seq = one_sequence(small_config(num_pages=40), 200)
    cache.evict(seq, KeepFirstLast(20, 50))
    other = PagedKVCache(small_config(num_pages=40), debug=True)
    twin = import_sequence(other, export_sequence(cache, seq))
    ids = np.array([twin])
    reads = other.tables.reads(ids, True)
    assert (int(reads.keep[0]), int(reads.start[0])) == (20, 150)
    assert other.stats().pages_used == cache.stats().pages_used == 6
    assert_same_sequence(cache, seq, other, twin)


def test_bare_pages_arrive_as_slabs_in_the_order_asked_for():
    cache, _ = one_sequence(small_config(num_pages=60), 300)
    pages = np.array([5, 3, 4, 11, 12, 13, 2])
    other = PagedKVCache(small_config())
    slabs = import_pages(other, export_pages(cache, pages))
    np.testing.assert_array_equal(slabs, cache.backend.pages.gather(pages))
    data = b"".join(export_pages(cache, pages))
    np.testing.assert_array_equal(import_pages(other, cut(data, 100)), slabs)
    assert import_pages(other, export_pages(cache, pages[:0])).shape == (0, slabs.shape[1])


def test_bare_pages_that_are_only_promised_take_no_memory():
    cache, _ = one_sequence()
    data = b"".join(export_pages(cache, np.array([1, 2])))
    many = (1 << 31) - 1
    total = len(data) + (many - 2) * (cache.backend.layout.page_bytes + 8)
    promise = with_header(data, num_pages=many, num_filled=many, total_bytes=total)
    tracemalloc.start()
    try:
        with pytest.raises(WireTruncated, match="page 0 at byte"):
            import_pages(cache, [promise])
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_bare_pages_are_checked_as_sequences_are():
    cache, seq = one_sequence()
    data = b"".join(export_pages(cache, np.array([1, 2])))
    with pytest.raises(WireMismatch, match="expected sequence, got pages"):
        import_sequence(cache, [data])
    with pytest.raises(WireMismatch, match="expected pages, got sequence"):
        import_pages(cache, export_sequence(cache, seq))
    for at in range(0, len(data), 3):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        with pytest.raises(WireError):
            import_pages(cache, [bytes(changed)])
    for page in (0, 24, -1):
        with pytest.raises(ArgumentError, match="page ids must be in"):
            export_pages(cache, np.array([page]))
