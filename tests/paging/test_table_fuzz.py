"""Random operations against the token model: seeded, many and cheap."""

from __future__ import annotations

import random

import pytest
from token_model import TokenCache

from pagedtq.errors import OutOfPages
from pagedtq.paging import PageTables

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
    for seed in range(2):
        rng = random.Random(seed)
        cache = TokenCache(page_size, 40, window, sinks, 6 if window else 0)
        for _ in range(250):
            one_step(cache, rng)
            cache.check()
        cache.close(list(cache.model))
        cache.check()
        assert cache.tables.pool.num_used == cache.tables.windows.num_used == 0
        assert cache.tables.windows.num_records_used == 0


def test_every_token_survives_the_forks_of_one_step():
    for window, sinks in ((0, 0), (4, 2), (8, 4)):
        for num_tokens in (1, 3, 4, 5, 9):
            cache = TokenCache(4, 60, window, sinks, 8 if window else 0)
            parent = cache.open()
            cache.append({parent: num_tokens})
            forks = [cache.fork(parent) for _ in range(3)]
            cache.append({forks[1]: 1, parent: 6, forks[0]: 0, forks[2]: 4})
            cache.check()
            cache.truncate(forks[2], num_tokens // 2)
            cache.append({forks[0]: 2, forks[2]: 9}, abort=True)
            cache.check()
            cache.append({forks[0]: 2, forks[2]: 9})
            cache.check()


def test_a_hundred_thousand_cheap_operations_keep_the_books():
    """Page counts against arithmetic alone; the invariants now and then."""
    rng = random.Random(7)
    size, window = 8, 16
    tables = PageTables(size, 400, window, 4, 40)
    lengths: dict[int, int] = {}
    shares = 0
    for step in range(100_000):
        kind = rng.random()
        seq_id = rng.choice(list(lengths)) if lengths else 0
        if not lengths or (kind < 0.05 and len(lengths) < 20):
            lengths[tables.open()] = 0
        elif kind < 0.75:
            n = rng.choice((1, 1, 1, 1, 7, 8, 9, 29, 0))
            length, free = lengths[seq_id], tables.pool.num_free
            pages = tables.block_table([seq_id])
            shared = length % size and tables.pool.ref_counts[pages[0, -1]] > 1
            need = -(-(length + n) // size) - -(-length // size) + bool(n and shared)
            if need > free:
                with pytest.raises(OutOfPages) as caught:
                    tables.reserve([seq_id], n)
                assert (caught.value.need, caught.value.free) == (need, free)
                tables.close(seq_id)
                del lengths[seq_id]
                continue
            plan = tables.reserve([seq_id], n)
            assert free - tables.pool.num_free == need
            if rng.random() < 0.1:
                tables.abort(plan)
            else:
                tables.commit(plan)
                lengths[seq_id] += n
        elif kind < 0.82 and len(lengths) < 20:
            lengths[tables.fork(seq_id)] = lengths[seq_id]
            shares += 1
        elif kind < 0.92:
            lengths[seq_id] = rng.randint(max(0, lengths[seq_id] - 40), lengths[seq_id])
            tables.truncate(seq_id, lengths[seq_id])
        elif kind < 0.95:
            tables.close(seq_id)
            del lengths[seq_id]
        else:
            assert tables.lengths(list(lengths)).tolist() == list(lengths.values())
        if step % 1000 == 0:
            tables.check_integrity()
    assert shares > 1000
    tables.close(list(lengths))
    tables.check_integrity()
    assert tables.pool.num_used == tables.windows.num_used == 0
