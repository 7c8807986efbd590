"""Random operations against the token model: seeded, many and cheap."""

from __future__ import annotations

import random

import pytest
from token_model import TokenCache

SHAPES = [(4, 0, 0), (4, 4, 2), (4, 8, 4), (8, 8, 3), (2, 6, 1), (1, 2, 1), (3, 3, 0), (16, 16, 4)]


def one_step(cache: TokenCache, rng: random.Random) -> None:
    size, window = cache.tables.page_size, cache.tables.window_tokens
    operation = rng.choice("oaaaaaabftteekc")
    ids = list(cache.model)
    if operation == "o" and len(ids) < 5:
        cache.open()
    if not ids:
        return
    seq_id = rng.choice(ids)
    length = len(cache.model[seq_id].tokens)
    if operation in "ab":
        members = rng.sample(ids, rng.randint(1, len(ids)))
        chunks = [0, 1, 1, 1, size - 1, size, size + 1, 3 * size + 5]
        counts = {member: rng.choice(chunks) for member in members}
        if not cache.append(counts, abort=operation == "b"):
            cache.close([rng.choice(ids)])
    elif operation == "f" and len(ids) < 7:
        cache.fork(seq_id)
    elif operation == "t":
        low = 0 if rng.random() < 0.4 else max(0, length - window - 2 * size)
        cache.truncate(seq_id, rng.randint(low, length))
    elif operation == "e":
        blocks = cache.evictable(seq_id)
        cache.evict(seq_id, rng.sample(blocks, rng.randint(0, min(2, len(blocks)))))
    elif operation == "k":
        cache.keep_first_last(seq_id, rng.randint(0, 2 * size), rng.randint(0, 4 * size))
    elif operation == "c" and rng.random() < 0.4:
        cache.close(rng.sample(ids, rng.randint(1, min(2, len(ids)))))


@pytest.mark.parametrize(("page_size", "window", "sinks"), SHAPES)
def test_every_position_reads_its_own_token_after_random_operations(page_size, window, sinks):
    for seed in range(4):
        rng = random.Random(seed)
        cache = TokenCache(page_size, 40, window, sinks, 6 if window else 0)
        for _ in range(300):
            one_step(cache, rng)
            cache.check()
        cache.close(list(cache.model))
        cache.check()
        assert cache.tables.pool.num_used == cache.tables.windows.num_used == 0
        assert cache.tables.windows.num_records_used == 0
