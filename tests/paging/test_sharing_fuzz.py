"""Long seeded runs over every operation with prefix sharing on; see `sharing_model`."""

from __future__ import annotations

import random

import pytest
from sharing_model import SALTS, SharingCache

NUM_PAGES = 28


def some_prompt(rng: random.Random, size: int) -> list[int]:
    """Prompts begin alike more often than not."""
    length = rng.choice([5 * size, 3 * size + 1, 2 * size, 1, 0])
    prompt = [at % 3 for at in range(length)]
    strange = rng.choice([length, length, length, 0, size, 2 * size - 1])
    if strange < length:
        prompt[strange] = 9
    return prompt


def operate(cache: SharingCache, rng: random.Random) -> None:
    size = cache.tables.page_size
    ids = list(cache.model)
    chunk = rng.choice([0, 1, 1, 2, size, size + 1, 3 * size + 1])
    what = rng.random()
    if not ids or (what < 0.25 and len(ids) < 6):
        if rng.random() < 0.1:
            cache.append({cache.open_with(None): chunk})
            return
        prompt = some_prompt(rng, size)
        seq_id = cache.open_with(prompt, rng.choice(SALTS))
        rest = len(prompt) - len(cache.model[seq_id].tokens)
        cache.append({seq_id: rest if rng.random() < 0.6 else chunk})
        return
    seq_id = rng.choice(ids)
    if what < 0.5:
        members = rng.sample(ids, rng.randint(1, len(ids)))
        cache.append({i: rng.choice([chunk, 1]) for i in members}, rng.random() < 0.3)
    elif what < 0.58 and len(ids) < 7:
        cache.fork(seq_id)
    elif what < 0.68:
        cache.truncate(seq_id, rng.randint(0, len(cache.model[seq_id].tokens)))
    elif what < 0.74:
        blocks = cache.evictable(seq_id)
        cache.evict(seq_id, rng.sample(blocks, min(len(blocks), 2)))
    elif what < 0.78:
        cache.keep_first_last(seq_id, rng.randint(0, size), rng.randint(0, 3 * size))
    elif what < 0.97:
        cache.close(rng.sample(ids, rng.randint(1, min(3, len(ids)))))
    else:
        cache.tables.forget_blocks([rng.randint(1, NUM_PAGES - 1)])


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("page_size", "window", "num_sinks"), [(4, 0, 0), (4, 4, 2), (4, 8, 4), (16, 16, 4)]
)
def test_long_runs_share_only_what_was_computed_in_the_same_context(
    page_size, window, num_sinks, seed
):
    rng = random.Random(seed)
    cache = SharingCache(
        page_size, NUM_PAGES, window, num_sinks, 3 if window else 0, verify_tokens=seed % 2 == 1
    )
    for _ in range(150):
        operate(cache, rng)
        cache.check()
    assert cache.hits > 10 * page_size, "hardly anything was shared: the run proves little"
    cache.close(list(cache.model))
    cache.check()
    assert cache.tables.pool.num_used == 0
    assert cache.tables.reset_prefix_cache()
    cache.check()
    assert cache.tables.windows.num_records_used == 0
