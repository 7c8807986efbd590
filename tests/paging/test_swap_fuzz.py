"""Long seeded runs with swaps and fences among every other operation; see `swap_model`."""

from __future__ import annotations

import random

import pytest
from sharing_model import SALTS, SharingCache
from swap_model import PlainSwapping, SharedSwapping, SwappingCache
from test_sharing_fuzz import some_prompt


def operate(cache: SwappingCache, rng: random.Random) -> None:
    size = cache.tables.page_size
    ids = cache.usable()
    chunk = rng.choice([0, 1, 1, 2, size, size + 1, 3 * size + 1])
    what = rng.random()
    if what < 0.30:
        swap(cache, rng)
        return
    if what < 0.36:
        if cache.fences and (len(cache.fences) > 2 or rng.random() < 0.6):
            cache.close_fence(rng.randrange(len(cache.fences)))
        else:
            cache.open_fence()
        return
    if not ids or (what < 0.5 and len(cache.model) < 8):
        if isinstance(cache, SharingCache):
            prompt = some_prompt(rng, size)
            seq_id = cache.open_with(prompt, rng.choice(SALTS))
            rest = len(prompt) - len(cache.model[seq_id].tokens)
            cache.append({seq_id: rest if rng.random() < 0.6 else chunk})
        else:
            cache.append({cache.open(): chunk})
        return
    seq_id = rng.choice(ids)
    if what < 0.7:
        members = rng.sample(ids, rng.randint(1, len(ids)))
        cache.append({i: rng.choice([chunk, 1]) for i in members}, rng.random() < 0.3)
    elif what < 0.77 and len(cache.model) < 9:
        cache.fork(seq_id)
    elif what < 0.84:
        cache.truncate(seq_id, rng.randint(0, len(cache.model[seq_id].tokens)))
    elif what < 0.88:
        blocks = cache.evictable(seq_id)
        cache.evict(seq_id, rng.sample(blocks, min(len(blocks), 2)))
    elif what < 0.91:
        cache.keep_first_last(seq_id, rng.randint(0, size), rng.randint(0, 3 * size))
    elif what < 0.98:
        closable = ids + cache.on_host()
        cache.close(rng.sample(closable, rng.randint(1, min(2, len(closable)))))
    elif isinstance(cache, SharingCache):
        cache.tables.forget_blocks([rng.randint(1, cache.tables.pool.num_pages - 1)])


def swap(cache: SwappingCache, rng: random.Random) -> None:
    """Begin a swap either way, or end one."""
    away = sorted(cache.swapped | cache.moving)
    if away and rng.random() < 0.1:
        cache.refuse_changes(rng.choice(away))
    if cache.swaps and (len(cache.swaps) > 2 or rng.random() < 0.5):
        cache.end_swap(rng.randrange(len(cache.swaps)), rng.random() < 0.8)
        return
    out = rng.random() < 0.45
    ids = cache.usable() if out else cache.on_host()
    if ids:
        members = rng.sample(ids, rng.randint(1, min(3, len(ids))))
        cache.begin_swap(out, members, rng.random() < 0.5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", [PlainSwapping, SharedSwapping])
@pytest.mark.parametrize(
    ("page_size", "window", "num_sinks"), [(4, 0, 0), (4, 4, 2), (4, 8, 4), (16, 16, 4)]
)
def test_every_position_reads_its_own_token_wherever_its_sequence_is(
    page_size, window, num_sinks, kind, seed
):
    rng = random.Random(seed)
    cache = kind(page_size, 28, window, num_sinks, 4 if window else 0, num_host_pages=32)
    for _ in range(350):
        operate(cache, rng)
        cache.check()
    assert cache.num_swapped_in > 5, "hardly anything was swapped: the run proves little"
    cache.drain()
    assert cache.tables.pool.num_used == 0
