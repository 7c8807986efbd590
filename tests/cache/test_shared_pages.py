"""Prefix sharing with real bytes: what is found reads like what would have been computed."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq import KeepFirstLast, PagedKVCache, SharingOptions, preset

LAYERS, HEADS, DIM, SIZE = 2, 2, 32, 16
RNG = np.random.default_rng(5)
# A token's keys and values depend on the token and its position alone: so prefixes may be shared.
OF_TOKEN = RNG.standard_normal((2, 64, LAYERS, HEADS, DIM), np.float32)
OF_POSITION = RNG.standard_normal((2, 256, LAYERS, HEADS, DIM), np.float32)
PROMPT = RNG.integers(0, 64, 90).tolist()


def cache_of(window, sharing=True):
    config = preset(
        "k4v4",
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=DIM,
        num_pages=24,
        page_size=SIZE,
        window=window,
        sinks=4 if window else 0,
        num_window_slots=4,
    )
    return PagedKVCache(
        config, debug=True, num_threads=1, sharing=SharingOptions() if sharing else None
    )


def kv(tokens, start):
    """Keys and values ``[layers, n, heads, dim]`` of tokens from position ``start`` on."""
    at = np.arange(start, start + len(tokens))
    both = OF_TOKEN[:, tokens] + OF_POSITION[:, at]
    return np.moveaxis(both, 2, 1)


def complete(cache, seq_id, tokens):
    """Append the tokens that the sequence does not have yet, one part after the other."""
    start = cache.length(seq_id)
    for piece in (tokens[start : start + 7], tokens[start + 7 :]):
        if piece:
            keys, values = kv(piece, cache.length(seq_id))
            cache.append(seq_id, keys, values, token_ids=piece)


def filled(cache, tokens, **opening):
    seq_id = cache.open(tokens, **opening)
    complete(cache, seq_id, tokens)
    return seq_id


def attended(cache, seq_id):
    queries = np.random.default_rng(1).standard_normal((3, 2 * HEADS, DIM), np.float32)
    states = [cache.attend(layer, queries, seq_id, [3]) for layer in range(LAYERS)]
    return [part.tobytes() for state in states for part in state]


def page_bytes(cache, seq_id, blocks):
    return cache.backend.gather(cache.tables.block_table([seq_id])[0, :blocks]).tobytes()


@pytest.mark.parametrize("window", [0, SIZE, 2 * SIZE])
@pytest.mark.parametrize("alive", [True, False], ids=["owner alive", "owner closed"])
def test_a_sequence_that_found_its_prefix_attends_bit_for_bit_like_one_that_did_not(window, alive):
    cache, plain = cache_of(window), cache_of(window, sharing=False)
    first = filled(cache, PROMPT[:60])
    if not alive:
        cache.close(first)
    second = cache.open(PROMPT)
    assert cache.length(second) == 48
    complete(cache, second, PROMPT)
    expected = filled(plain, PROMPT)
    assert cache.state(second) == plain.state(expected)
    assert attended(cache, second) == attended(plain, expected)
    assert page_bytes(cache, second, 5) == page_bytes(plain, expected, 5)
    assert cache.stats().pages_used == 6 + alive * 1


def test_sinks_of_a_found_prefix_are_exact():
    cache = cache_of(SIZE)
    cache.close(filled(cache, PROMPT[:60]))
    second = cache.open(PROMPT)
    keys, values, positions = cache.load(1, second)
    assert positions.tolist() == list(range(48))
    exact = kv(PROMPT[:48], 0)[:, 1].astype(np.float16)  # kv_dtype
    assert np.array_equal(keys[:4], exact[0][:4])
    assert np.array_equal(values[:4], exact[1][:4])
    assert not np.array_equal(keys[4:], exact[0][4:])


def test_whoever_cuts_a_shared_page_and_writes_on_leaves_the_other_untouched():
    cache = cache_of(SIZE)
    first = filled(cache, PROMPT[:60])
    second = filled(cache, PROMPT)
    before = attended(cache, second)
    cache.truncate(first, 40)
    keys, values = kv([1] * 30, 40)
    cache.append(first, keys, values, token_ids=[1] * 30)
    assert attended(cache, second) == before
    other = [*PROMPT[:40], *[1] * 30, 5]
    assert cache.length(cache.open(other)) == 64


def test_what_depends_on_evicted_tokens_is_not_found():
    cache = cache_of(0)
    first = filled(cache, PROMPT[:64])
    cache.evict(first, KeepFirstLast(4, 20))
    complete(cache, first, PROMPT)
    # Block 4 is complete, but its positions saw less than the whole prefix.
    assert cache.length(first) == 90
    assert cache.length(cache.open(PROMPT)) == 64


def test_tenants_with_different_salts_never_share_a_page():
    cache = cache_of(0)
    rng, tables = np.random.default_rng(3), cache.tables
    owners: dict[int, bytes] = {}
    live: dict[int, bytes] = {}
    for _ in range(150):
        if live and (len(live) > 3 or rng.random() < 0.3):
            seq_id = list(live)[int(rng.integers(len(live)))]
            cache.close(seq_id)
            del live[seq_id]
            continue
        salt = [b"", b"a", b"b"][int(rng.integers(3))]
        tokens = PROMPT[: int(rng.integers(1, 80))]
        seq_id = cache.open(tokens, salt=salt)
        found = cache.length(seq_id) // SIZE
        pages = tables.block_table([seq_id])[0].tolist()
        assert all(owners[page] == salt for page in pages[:found])
        if -(-len(tokens) // SIZE) - found <= tables.pool.num_free:
            complete(cache, seq_id, tokens)
        live[seq_id] = salt
        for page in tables.block_table([seq_id])[0].tolist():
            owners[page] = salt
    by_page = [
        {s for i, s in live.items() if page in tables.block_table([i])[0]} for page in range(1, 24)
    ]
    assert all(len(salts) <= 1 for salts in by_page)


def test_the_cache_counts_what_can_be_found_and_forgets_it_when_reset():
    cache = cache_of(SIZE)
    seq_id = filled(cache, PROMPT[:60])
    assert not cache.reset_prefix_cache()
    cache.close(seq_id)
    assert cache.stats().pages_cached == 3
    assert cache.reset_prefix_cache()
    assert cache.stats().pages_cached == 0
    assert cache.length(cache.open(PROMPT)) == 0
