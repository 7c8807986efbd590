"""Host micro-benchmarks with pytest-benchmark: ``pytest benchmarks/micro_host.py``.

Small, steady pieces, to see what a change does to them; the claims are in the other modules.
``--benchmark-json FILE`` keeps the figures, with a receipt.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pagedtq import PagedKVCache, TurboQuant, preset
from pagedtq.backends.dtypes import round_to, widen
from pagedtq.codec import Rotation, TurboQuantCodec

HEADS, DIM, TOKENS = 8, 128, 256


@pytest.fixture
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((TOKENS, HEADS, DIM)).astype(np.float32)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_encode(benchmark: Any, vectors: np.ndarray, bits: int) -> None:
    codec = TurboQuantCodec(TurboQuant(bits=bits), DIM, HEADS)
    benchmark(codec.encode, vectors)


def test_rotate(benchmark: Any, vectors: np.ndarray) -> None:
    benchmark(Rotation(DIM, HEADS, 0, 0, "key").forward, vectors)


def test_round_to_float16(benchmark: Any, vectors: np.ndarray) -> None:
    benchmark(round_to, vectors, "f16")


def test_widen_float16(benchmark: Any, vectors: np.ndarray) -> None:
    benchmark(widen, vectors.astype(np.float16), "f16")


@pytest.mark.parametrize("name", ["k4v4", "k3v3", "k2v2", "exact"])
@pytest.mark.parametrize("tokens", [64, 1024])
def test_attend(benchmark: Any, name: str, tokens: int) -> None:
    cache, ids = _filled(name, 1, tokens)
    query = np.ones((1, 4 * HEADS, DIM), np.float32)
    benchmark(cache.attend, 0, query, ids)


@pytest.mark.parametrize("batch", [1, 32])
def test_decode_step(benchmark: Any, batch: int) -> None:
    cache, ids = _filled("k4v4", batch, 64)
    new = np.ones((batch, HEADS, DIM), np.float16)

    def step() -> None:
        cache.begin_step(ids)
        cache.store(0, new, new)
        cache.abort_step()

    benchmark(step)


def _filled(name: str, batch: int, tokens: int) -> tuple[PagedKVCache, np.ndarray]:
    config = preset(
        name,
        num_layers=1,
        num_kv_heads=HEADS,
        head_dim=DIM,
        num_pages=batch * (tokens // 64 + 2) + 1,
    )
    cache = PagedKVCache(config, num_threads=1)
    ids = np.array([cache.open() for _ in range(batch)])
    rng = np.random.default_rng(1)
    data = rng.standard_normal((2, 1, batch * tokens, HEADS, DIM)).astype(np.float16)
    cache.append(ids, data[0], data[1], np.full(batch, tokens))
    return cache, ids
