"""Threads that share a cache: refused calls can be repeated, and every sequence stays its own."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from pagedtq import PagedKVCache
from pagedtq.errors import CapacityError, ConcurrentCallError, StepError
from tests.cache.bank import draw_tokens, make_config


def test_threads_that_repeat_what_was_refused_write_what_one_thread_writes():
    config = make_config("k4v4", num_pages=60, page_size=16, window=16, num_window_slots=8)
    shared, alone = (PagedKVCache(config, num_threads=1) for _ in range(2))
    chunks = [draw_tokens(np.random.default_rng(seed), 30, config) for seed in range(3)]
    ids, refused, failed = {}, [], []

    def insist(call):
        for _ in range(100_000):
            try:
                return call()
            except (ConcurrentCallError, StepError) as error:
                refused.append(error)
        raise AssertionError("refused for ever")

    def write(seed):
        try:
            keys, values = chunks[seed]
            ids[seed] = insist(shared.open)
            for at in range(0, 30, 3):
                part = keys[:, at : at + 3], values[:, at : at + 3]
                insist(lambda part=part: shared.append(ids[seed], *part))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    shared.check_integrity()
    for seed, (keys, values) in enumerate(chunks):
        seq_id = alone.open()
        alone.append(seq_id, keys, values)
        for layer in range(config.num_layers):
            for mine, theirs in zip(alone.load(layer, seq_id), shared.load(layer, ids[seed])):
                np.testing.assert_array_equal(mine, theirs)
    with pytest.raises(CapacityError):
        shared.append(ids[0], *draw_tokens(np.random.default_rng(9), 1000, config))
