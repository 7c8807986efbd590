"""Codes and norms of a token are the same bytes, however the token came into its page."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from pagedtq import KeepFirstLast, PagedKVCache
from pagedtq.config import PRESETS
from tests.cache.bank import (
    FORMATS,
    HEADS,
    KV_DTYPES,
    LAYERS,
    TokenBank,
    as_bf16_bits,
    draw_tokens,
    from_bf16_bits,
    make_config,
    resident_bytes,
    snapshot,
    token_bytes,
    token_planes,
)

P = 16
SHAPES = [(16, 0), (16, 16), (16, 32), (64, 0), (64, 64), (64, 128)]
LENGTH = 3 * 64 + 21


def chunkings(page_size: int, length: int = LENGTH) -> dict[str, list[int]]:
    sizes = {"1": 1, "P-1": page_size - 1, "P": page_size, "P+1": page_size + 1}
    sizes |= {"3P+5": 3 * page_size + 5, "at once": length}
    cuts = {}
    for name, size in sizes.items():
        whole, rest = divmod(length, size)
        cuts[name] = [size] * whole + [rest] * (rest > 0)
    cuts["mixed"] = [0, 1, page_size, 2, page_size - 1, 0, length - 2 * page_size - 2]
    return cuts


def build(name="k4v4", page_size=P, window=0, *, num_threads=1, means=None, **fields):
    fields = {"num_pages": 80, "num_window_slots": 8, "page_size": page_size} | fields
    config = make_config(name, window=window, **fields)
    return PagedKVCache(config, num_threads=num_threads, key_means=means, debug=True)


@cache
def tokens(count=LENGTH, seed=3):
    """Keys and values whose every element is a bfloat16 and a float16 number alike."""
    keys, values = draw_tokens(np.random.default_rng(seed), count, make_config("k4v4", num_pages=2))
    return tuple(from_bf16_bits(as_bf16_bits(np.round(a * 64) / 64)) for a in (keys, values))


def feed(kv_cache, seq_id, keys, values, sizes, **options):
    at = 0
    for size in sizes:
        kv_cache.append(seq_id, keys[:, at : at + size], values[:, at : at + size], **options)
        at += size
    assert at == keys.shape[1]


def reference(name, page_size, window, length=LENGTH):
    """The bytes after one append of everything to a fresh cache."""
    kv_cache = build(name, page_size, window)
    seq_id = kv_cache.open()
    kv_cache.append(seq_id, *(a[:, :length] for a in tokens()))
    return resident_bytes(kv_cache, seq_id)


def common(left, right):
    """Both cut to their common number of tokens, plane by plane: rows of a plane are equal."""
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for plane, data in one.items():
            size = min(len(data), len(other[plane]))
            assert size
            yield plane, data[:size], other[plane][:size]


def assert_same(left, right):
    for plane, one, other in common(left, right):
        assert one == other, f"{plane} differs"


@pytest.mark.parametrize(("page_size", "window"), SHAPES)
@pytest.mark.parametrize("name", [*PRESETS, "mixed"])
def test_chunking_does_not_change_a_byte(name, page_size, window):
    length = 3 * page_size + 21
    keys, values = (a[:, :length] for a in tokens())
    expected = reference(name, page_size, window, length)
    for sizes in chunkings(page_size, length).values():
        kv_cache = build(name, page_size, window)
        seq_id = kv_cache.open()
        feed(kv_cache, seq_id, keys, values, sizes)
        assert resident_bytes(kv_cache, seq_id) == expected


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("pool_order", ["layer_major", "page_major"])
def test_pages_hold_what_each_token_becomes_when_it_is_encoded_alone(name, kv_dtype, pool_order):
    means = np.random.default_rng(9).standard_normal((LAYERS, HEADS, 16)).astype(np.float32) * 20
    config = make_config(
        name,
        kv_dtype=kv_dtype,
        num_pages=20,
        page_size=P,
        pool_order=pool_order,
        seed=12345,
        first_kv_head=6,
    )
    bank = TokenBank(config, 3 * P + 5, means=means)
    kv_cache = PagedKVCache(config, key_means=means, debug=True)
    seq_id = kv_cache.open()
    feed(kv_cache, seq_id, bank.keys, bank.values, [P + 1, 1, 2 * P + 3])
    for layer in range(LAYERS):
        coded = 3 * P if config.has_overlay(layer) else 3 * P + 5
        slots = kv_cache.tables.slots_of(seq_id, np.arange(coded))
        assert set(token_planes(kv_cache, layer)) == set(bank.expected[layer])
        for plane, rows in bank.expected[layer].items():
            got = token_bytes(kv_cache, layer, plane, slots)
            np.testing.assert_array_equal(got, rows[:coded], err_msg=plane)


def test_the_pool_order_does_not_change_a_slab():
    slabs = []
    for order in ("layer_major", "page_major"):
        kv_cache = build("k3v3", window=P, pool_order=order)
        seq_id = kv_cache.open()
        feed(kv_cache, seq_id, *tokens(), [50, 1, LENGTH - 51])
        slabs.append(kv_cache.backend.gather(kv_cache.tables.block_table([seq_id])[0]))
    assert (slabs[0] == slabs[1]).all()


@pytest.mark.parametrize("window", [0, P, 2 * P])
@pytest.mark.parametrize("name", FORMATS)
class TestHistory:
    """What happened around a token does not show in its bytes."""

    def test_batch_composition(self, name, window):
        expected = reference(name, P, window)
        keys, values = tokens()
        others = tokens(seed=4)
        kv_cache = build(name, window=window)
        ids = [kv_cache.open() for _ in range(3)]
        at, rng = 0, np.random.default_rng(0)
        while at < LENGTH:
            counts = {seq_id: int(rng.integers(0, 9)) for seq_id in rng.permutation(ids).tolist()}
            n = counts[ids[0]] = min(int(rng.integers(1, 40)), LENGTH - at)
            batch = []
            for own, noise in zip((keys, values), others):
                parts = [
                    own[:, at : at + n] if seq_id == ids[0] else noise[:, :count]
                    for seq_id, count in counts.items()
                ]
                batch.append(np.concatenate(parts, axis=1))
            kv_cache.append(list(counts), *batch, list(counts.values()))
            at += n
        assert resident_bytes(kv_cache, ids[0]) == expected

    def test_slots(self, name, window):
        expected = reference(name, P, window)
        kv_cache = build(name, window=window, num_pages=66)
        # Fragment the pool: what is free is scattered, and the queue runs backwards.
        small = [kv_cache.open() for _ in range(7)]
        for _ in range(9):
            for seq_id in small:
                kv_cache.append(seq_id, *(a[:, :P] for a in tokens()))
        kv_cache.close(small[::2])
        seq_id = kv_cache.open()
        feed(kv_cache, seq_id, *tokens(), [40, 1, LENGTH - 41])
        pages = kv_cache.tables.block_table([seq_id])[0]
        assert (np.diff(pages) != 1).any()
        assert resident_bytes(kv_cache, seq_id) == expected

    def test_fork(self, name, window):
        expected = reference(name, P, window)
        keys, values = tokens()
        kv_cache = build(name, window=window)
        parent = kv_cache.open()
        cut = 2 * P + 5
        kv_cache.append(parent, keys[:, :cut], values[:, :cut])
        child = kv_cache.fork(parent)
        # Parent and child go on differently and at once; a grandchild later goes on as the child.
        noise = tokens(seed=8)
        counts = [P + 1, 7]
        kv_cache.append(
            [parent, child],
            np.concatenate([noise[0][:, : P + 1], keys[:, cut : cut + 7]], axis=1),
            np.concatenate([noise[1][:, : P + 1], values[:, cut : cut + 7]], axis=1),
            counts,
        )
        grandchild = kv_cache.fork(child)
        kv_cache.append(grandchild, keys[:, cut + 7 :], values[:, cut + 7 :])
        kv_cache.append(child, keys[:, cut + 7 :], values[:, cut + 7 :])
        assert resident_bytes(kv_cache, child) == expected
        assert resident_bytes(kv_cache, grandchild) == expected
        assert_prefix(kv_cache, parent, expected, cut)

    def test_truncation_and_regrowth(self, name, window):
        expected = reference(name, P, window)
        keys, values = tokens()
        noise = tokens(seed=8)
        kv_cache = build(name, window=window)
        seq_id = kv_cache.open()
        for cut, wrong in ((P + 3, 3 * P), (2 * P, 1), (2 * P + 9, P - 1), (5 * P + 1, 2)):
            at = kv_cache.length(seq_id)
            kv_cache.append(seq_id, keys[:, at:cut], values[:, at:cut])
            kv_cache.append(seq_id, *(a[:, :wrong] for a in noise))
            kv_cache.truncate(seq_id, cut)
        kv_cache.append(seq_id, keys[:, cut:], values[:, cut:])
        assert_same(resident_bytes(kv_cache, seq_id), expected)

    def test_eviction_before(self, name, window):
        keys, values = tokens()
        kv_cache = build(name, window=window)
        whole = kv_cache.open()
        kv_cache.append(whole, keys, values)
        seq_id = kv_cache.open()
        for at in range(0, LENGTH, 29):
            kv_cache.append(seq_id, keys[:, at : at + 29], values[:, at : at + 29])
            kv_cache.evict(seq_id, KeepFirstLast(5, 3 * P))
        table = kv_cache.tables.block_table([seq_id])[0]
        assert (table == 0).any() and table[0] != 0
        for layer in range(LAYERS):
            for plane in token_planes(kv_cache, layer):
                positions = np.arange(kv_cache.state(whole).coded)
                slots = kv_cache.tables.slots_of(seq_id, positions)
                left = slots >= 0
                np.testing.assert_array_equal(
                    token_bytes(kv_cache, layer, plane, slots[left]),
                    token_bytes(
                        kv_cache, layer, plane, kv_cache.tables.slots_of(whole, positions[left])
                    ),
                )

    @pytest.mark.parametrize("stored", [0, 1, 2])
    def test_an_abort_before(self, name, window, stored):
        expected = reference(name, P, window)
        keys, values = tokens()
        noise = tokens(seed=8)
        kv_cache = build(name, window=window)
        seq_id = kv_cache.open()
        at = 0
        for cut, wrong in ((5, 3), (P + 3, P), (2 * P, 3 * P + 5), (6 * P + 1, P - 1)):
            kv_cache.append(seq_id, keys[:, at:cut], values[:, at:cut])
            kv_cache.begin_step(seq_id, wrong)
            for layer in range(LAYERS)[::-1][:stored]:
                kv_cache.store(layer, *(a[layer, :wrong] for a in noise))
            kv_cache.abort_step()
            at = cut
        kv_cache.append(seq_id, keys[:, at:], values[:, at:])
        assert_same(resident_bytes(kv_cache, seq_id), expected)


@pytest.mark.parametrize("window", [0, P, 2 * P])
@pytest.mark.parametrize("name", ["k4v4", "k3v3", "mixed"])
def test_key_bounds_of_full_pages_enclose_the_coded_keys_whatever_the_history(name, window):
    keys, values = tokens()
    found = []
    for sizes in (*(chunkings(P)[size] for size in ("P-1", "3P+5", "at once")), None):
        kv_cache = build(name, window=window, key_bounds=True)
        seq_id = kv_cache.open()
        if sizes is None:
            kv_cache.append(seq_id, *(a[:, : 4 * P] for a in tokens(seed=8)))
            kv_cache.truncate(seq_id, 0)
            kv_cache.append(seq_id, keys[:, : P + 3], values[:, : P + 3])
            kv_cache.append(seq_id, *(a[:, : 2 * P] for a in tokens(seed=8)))
            kv_cache.truncate(seq_id, P + 3)
            seq_id = kv_cache.fork(seq_id)
            kv_cache.append(seq_id, keys[:, P + 3 :], values[:, P + 3 :])
        else:
            feed(kv_cache, seq_id, keys, values, sizes)
        layer = LAYERS - 1
        layout = kv_cache.backend.layout
        pages = kv_cache.tables.block_table([seq_id])[0][: LENGTH // P]
        bounds = layout.plane_view(kv_cache.backend.pool, layer, "key_bounds")[pages]
        found.append(bounds.copy())
    assert all((bounds == found[0]).all() for bounds in found)
    if window == 0:
        decoded = kv_cache.load(layer, seq_id)[0]
        rotation = kv_cache.backend.layers[layer].codecs[0].rotation
        coded = rotation.forward(decoded)[: LENGTH // P * P].reshape(-1, P, HEADS, 16)
        slack = 1e-5 * np.abs(coded).max()
        assert (found[0][:, :, 0] <= coded.min(axis=1) + slack).all()
        assert (found[0][:, :, 1] >= coded.max(axis=1) - slack).all()
        # Rounded outwards to float16, and no further.
        np.testing.assert_allclose(found[0][:, :, 0], coded.min(axis=1), rtol=2e-3, atol=slack)
        np.testing.assert_allclose(found[0][:, :, 1], coded.max(axis=1), rtol=2e-3, atol=slack)


def assert_prefix(kv_cache, seq_id, expected, cut):
    """The coded part of the first ``cut`` tokens holds the expected bytes."""
    state = kv_cache.state(seq_id)
    for layer in range(LAYERS):
        coded = min(cut, state.coded if kv_cache.config.has_overlay(layer) else state.length)
        slots = kv_cache.tables.slots_of(seq_id, np.arange(coded))
        for plane in token_planes(kv_cache, layer):
            got = token_bytes(kv_cache, layer, plane, slots).tobytes()
            assert got == expected[layer][plane][: len(got)]


@pytest.mark.parametrize("window", [0, P, 2 * P])
@pytest.mark.parametrize("name", FORMATS)
def test_the_type_of_the_input_does_not_change_a_byte(name, window):
    keys, values = tokens()
    found = []
    for kind in ("f32", "f16", "bf16"):
        convert = {
            "f32": lambda a: a,
            "f16": lambda a: a.astype(np.float16),
            "bf16": as_bf16_bits,
        }[kind]
        kv_cache = build(name, window=window)
        seq_id = kv_cache.open()
        feed(kv_cache, seq_id, convert(keys), convert(values), [33, LENGTH - 33], dtype=kind)
        # Pages and windows alike.
        state = snapshot(kv_cache)
        found.append({k: v for k, v in state.items() if k == "pool" or "ring" in k or "sinks" in k})
    assert found[0] == found[1]
    assert found[0] == found[2]


def test_negative_zeros_are_the_same_zeros_in_every_input_type():
    zero = np.full((LAYERS, 3, HEADS, 16), -0.0, np.float32)
    found = []
    for data in (zero, zero.astype(np.float16)):
        kv_cache = build("exact", kv_dtype="f16")
        seq_id = kv_cache.open()
        kv_cache.append(seq_id, data, data)
        found.append(kv_cache.backend.pool.tobytes())
    assert found[0] == found[1]


def test_strided_and_reversed_inputs_are_read_as_they_look():
    keys, values = tokens()
    expected = reference("k4v4", P, P)
    twice = np.repeat(keys, 2, axis=1)[:, ::2]
    backwards = np.ascontiguousarray(values[:, ::-1, :, ::-1])[:, ::-1, :, ::-1]
    assert not twice.flags.c_contiguous and not backwards.flags.c_contiguous
    kv_cache = build("k4v4", window=P)
    seq_id = kv_cache.open()
    feed(kv_cache, seq_id, twice, backwards, [10, LENGTH - 10])
    assert resident_bytes(kv_cache, seq_id) == expected
    for order in ("F", "C"):
        kv_cache = build("k4v4", window=P)
        seq_id = kv_cache.open()
        kv_cache.append(seq_id, np.array(keys, order=order), np.array(values, order=order))
        assert resident_bytes(kv_cache, seq_id) == expected


@pytest.mark.parametrize("name", ["k4v4", "k3v3", "prod4v4", "exact"])
def test_threads_do_not_change_a_byte(name):
    # Enough vectors for many pieces, and a start inside a pair of tokens.
    count = 3 * 2048 + 7
    keys, values = draw_tokens(np.random.default_rng(1), count, make_config(name, num_pages=2))
    pools = []
    for num_threads, sizes in ((1, [1, count - 1]), (2, [1, count - 1]), (2, [count])):
        kv_cache = build(name, 64, 64, num_threads=num_threads, num_pages=110)
        seq_id = kv_cache.open()
        feed(kv_cache, seq_id, keys, values, sizes)
        pools.append(kv_cache.backend.pool.tobytes())
        assert num_threads == 1 or kv_cache.backend.workers._pool is not None
    assert pools[0] == pools[1] == pools[2]


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("name", FORMATS)
def test_store_with_an_explicit_slot_mapping_writes_the_same_bytes(name, num_threads):
    keys, values = tokens()
    expected = reference(name, P, 0)
    kv_cache = build(name, window=0, num_threads=num_threads)
    owner = kv_cache.open()
    kv_cache.begin_step(owner, LENGTH)
    rng = np.random.default_rng(2)
    slots = rng.permutation(kv_cache.tables.slots_of(owner, np.arange(LENGTH)))
    for layer in range(LAYERS):
        # In three calls, the middle one with tokens that are skipped.
        for begin, end, skipped in ((0, 60, 0), (60, 90, 5), (90, LENGTH, 0)):
            mapping = np.r_[slots[begin:end], np.full(skipped, -1)]
            part = [np.r_[a[layer, begin:end], a[layer, :skipped]] for a in (keys, values)]
            order = rng.permutation(len(mapping))
            kv_cache.backend.store(layer, part[0][order], part[1][order], mapping[order])
        for plane in token_planes(kv_cache, layer):
            got = token_bytes(kv_cache, layer, plane, slots)
            assert got.tobytes() == expected[layer][plane]
