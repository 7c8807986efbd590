"""Really store and attend the first requests of a workload, and measure.

The keys of a head follow a mean-reverting random walk, so that neighbours resemble each other, and
a query points along the latest key: attention with recency. Values are white noise. All layers get
the same arrays (their codes differ, the work is the same); the first one is compared with exact
attention in float64 over the original keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends import BackendFactory, BackendName
from ..cache import PagedKVCache
from ..errors import ArgumentError
from ..models import ModelShape
from ..sizing import Format
from .report import ExecutionReport
from .workload import Workload

#: Similarity of neighbouring keys; and a query's scale: at head_dim 128 and a thousand tokens,
#: about a third of the attention goes to the last page.
_RECENCY = 0.9
_QUERY_SCALE = 0.5

Array = npt.NDArray[Any]


class _Request:
    """One sequence with its tokens' keys and values, ``float16[n, num_kv_heads, head_dim]``."""

    def __init__(
        self, seq_id: int, prompt: int, output: int, shape: ModelShape, rng: np.random.Generator
    ) -> None:
        self.seq_id, self.prompt, self.output = seq_id, prompt, output
        size = (prompt + output, shape.num_kv_heads, shape.head_dim)
        noise = rng.standard_normal(size, dtype=np.float32)
        # Stationary: every key has unit variance per channel.
        noise[1:] *= np.float32((1 - _RECENCY**2) ** 0.5)
        for t in range(1, len(noise)):
            noise[t] += np.float32(_RECENCY) * noise[t - 1]
        self.keys = noise.astype(np.float16)
        self.values = rng.standard_normal(size, dtype=np.float32).astype(np.float16)
        self.length = 0

    def query(self, shape: ModelShape, rng: np.random.Generator) -> Array:
        """Return the latest token's query, ``float32[num_q_heads, head_dim]``."""
        latest = self.keys[self.length - 1].astype(np.float32)
        latest = np.repeat(latest, shape.num_q_heads // shape.num_kv_heads, axis=0)
        noise = rng.standard_normal(latest.shape, dtype=np.float32)
        return np.float32(_QUERY_SCALE) * (latest + noise)


def execute_format(
    workload: Workload,
    storage: Format,
    model: ModelShape,
    *,
    page_size: int = 64,
    backend: BackendName | BackendFactory = "auto",
    num_requests: int = 4,
    max_steps: int = 16,
    chunk_tokens: int = 2048,
    seed: int = 0,
    progress: Callable[[int], object] | None = None,
) -> ExecutionReport | None:
    """Store and attend the first requests of a workload for real.

    Parameters
    ----------
    workload : Workload
        Where the lengths come from.
    storage : Format
        What is stored; a format that pagedtq has no codec for (``fp8``) is not executed.
    model : ModelShape
        Layers and heads.
    page_size : int
        Tokens in a page.
    backend : {"auto", "host", "cuda"} or callable
        Of ``PagedKVCache``.
    num_requests : int
        Sequences, all decoding together.
    max_steps : int
        Output tokens per sequence at most.
    chunk_tokens : int
        Prompt tokens stored at a time.
    seed : int
        Of keys, values and queries.
    progress : callable, optional
        Called with the number of steps done.

    Returns
    -------
    ExecutionReport or None
        None if the format cannot be executed.
    """
    for name, count in (("num_requests", num_requests), ("max_steps", max_steps)):
        if count < 1:
            raise ArgumentError(f"{name} must be at least 1, got {count}")
    if storage.byte_share != 1:
        return None
    chosen = workload.first(num_requests)
    prompts = chosen.prompt_tokens.tolist()
    outputs = np.minimum(chosen.output_tokens, max_steps).tolist()
    pages = sum(-(-(p + o) // page_size) for p, o in zip(prompts, outputs))
    config = storage.config(
        model, page_size, num_pages=pages + 1, num_window_slots=len(prompts), seed=seed
    )
    cache = PagedKVCache(config, backend=backend)
    rng = np.random.Generator(np.random.PCG64(seed))
    requests = [
        _Request(cache.open(), prompt, output, model, rng)
        for prompt, output in zip(prompts, outputs)
    ]
    store_seconds = _store_prompts(cache, requests, chunk_tokens)
    stored = sum(prompts)
    decoded = attended = 0
    decode_seconds = attend_seconds = 0.0
    errors: list[Array] = []
    for step in range(max(outputs)):
        active = [request for request in requests if step < request.output]
        keys, values = (
            np.stack([getattr(request, name)[request.length] for request in active])
            for name in ("keys", "values")
        )
        for request in active:
            request.length += 1
        queries = np.stack([request.query(model, rng) for request in active])
        ids = [request.seq_id for request in active]
        start = time.perf_counter()
        cache.begin_step(ids, 1)
        for layer in range(model.num_layers):
            cache.store(layer, keys, values)
            before = time.perf_counter()
            out = cache.backend.to_host(cache.attend(layer, queries, ids)[0])
            attend_seconds += time.perf_counter() - before
            if layer == 0:
                first = out
        cache.commit()
        decode_seconds += time.perf_counter() - start
        decoded += len(active)
        attended += sum(request.length for request in active)
        errors += [_errors(*pair) for pair in zip(active, queries, first)]
        if progress is not None:
            progress(step + 1)
    every = np.concatenate(errors)
    return ExecutionReport(
        backend=cache.backend.name,
        tokens_stored=stored,
        tokens_attended=attended,
        store_tokens_per_second=stored / store_seconds,
        attend_tokens_per_second=attended / attend_seconds,
        decode_tokens_per_second=decoded / decode_seconds,
        max_relative_error=float(every.max()),
        mean_relative_error=float(every.mean()),
    )


def _store_prompts(cache: PagedKVCache, requests: list[_Request], chunk_tokens: int) -> float:
    seconds = 0.0
    for request in requests:
        for begin in range(0, request.prompt, chunk_tokens):
            end = min(begin + chunk_tokens, request.prompt)
            keys, values = request.keys[begin:end], request.values[begin:end]
            start = time.perf_counter()
            cache.begin_step(request.seq_id, end - begin)
            for layer in range(cache.config.num_layers):
                cache.store(layer, keys, values)
            cache.commit()
            seconds += time.perf_counter() - start
        request.length = request.prompt
    return seconds


def _errors(request: _Request, queries: Array, out: Array) -> Array:
    """Return the relative error of each query head, ``float64[num_q_heads]``."""
    keys, values = (
        array[: request.length].astype(np.float64) for array in (request.keys, request.values)
    )
    heads, dim = keys.shape[1:]
    grouped = queries.astype(np.float64).reshape(heads, -1, dim)
    logits = np.einsum("hgd,thd->hgt", grouped, keys) / dim**0.5
    weights = np.exp(logits - logits.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    exact = np.einsum("hgt,thd->hgd", weights, values).reshape(out.shape)
    errors: Array = np.linalg.norm(out - exact, axis=1) / np.linalg.norm(exact, axis=1)
    return errors
