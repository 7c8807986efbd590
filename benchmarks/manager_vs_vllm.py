"""The block manager beside vLLM's own, in one process, one after the other.

Needs vLLM's scheduler core (vllm 0.33; its manager imports on a machine without a GPU). Both do the
same step: one token for every running request, as vLLM is meant to be called, one request after the
other, the new token's append (which hashes a block that fills) included. Ratios are of medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib import metadata

import numpy as np

from benchmarks.manager import PAGE, POOL, PROMPT, VOCABULARY, admit, append, lengths_of
from benchmarks.report import arguments, publish
from pagedtq.paging import BlockHasher, PagePool, PageTables, SharingOptions
from pagedtq.serving import BlockManager, ServedRequest

try:
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request
except ImportError as error:
    raise SystemExit(f"vLLM's scheduler core is needed: {error}") from error


class Peer:
    """vLLM's manager with running requests."""

    def __init__(self, prompts: Sequence[np.ndarray], caching: bool) -> None:
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(PAGE, sha256) if caching else None
        spec = FullAttentionSpec(PAGE, num_kv_heads=8, head_size=128, dtype=torch.float16)
        config = KVCacheConfig(POOL, [], [KVCacheGroupSpec(["layer"], spec)])
        self.manager = KVCacheManager(
            config,
            max_model_len=1 << 17,
            scheduler_block_size=PAGE,
            hash_block_size=PAGE,
            enable_caching=caching,
        )
        self.requests = [self.request(str(i), prompt) for i, prompt in enumerate(prompts)]
        for request in self.requests:
            self.admit(request)

    def request(self, name: str, prompt: np.ndarray) -> Request:
        """Make a request; this hashes its blocks."""
        return Request(
            name, prompt.tolist(), SamplingParams(max_tokens=10_000), None, block_hasher=self.hasher
        )

    def admit(self, request: Request) -> None:
        """Look a request up and allocate all its tokens."""
        found, num_found = self.manager.get_computed_blocks(request)[:2]
        taken = self.manager.allocate_slots(
            request, request.num_tokens - num_found, num_found, found
        )
        assert taken is not None
        request.num_computed_tokens = request.num_tokens

    def step(self, tokens: list[int]) -> None:
        """Append a token to every request."""
        allocate = self.manager.allocate_slots
        for request, token in zip(self.requests, tokens, strict=True):
            request.append_output_token_ids(token)
            allocate(request, 1)
            request.num_computed_tokens += 1


class Ours:
    """Our façade with the same requests."""

    def __init__(self, prompts: Sequence[np.ndarray], caching: bool) -> None:
        self.manager, hasher = BlockManager(POOL, PAGE, enable_caching=caching), BlockHasher(PAGE)
        self.requests = [ServedRequest(str(i), p, hasher) for i, p in enumerate(prompts)]
        for request in self.requests:
            admit(self.manager, request)

    def step(self, tokens: list[int]) -> None:
        """Append a token to every request."""
        allocate = self.manager.allocate_slots
        for request, token in zip(self.requests, tokens, strict=True):
            request.append_token(token)
            allocate(request, 1)
            request.num_computed_tokens += 1


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("manager_vs_vllm", __doc__, argv)
    rng = np.random.default_rng(options.seed)
    rounds = 12 if options.quick else 48
    rows = []
    for num_seqs in (64, 1024):
        for caching in (False, True):
            rows += step_rows(num_seqs, caching, rounds, rng)
    rows.append(admission_row(rounds, rng))
    for count in (10, 1000):
        rows += page_rows(count, rounds, rng)
    publish(
        "manager_vs_vllm",
        rows,
        notes=(
            f"vllm {metadata.version('vllm')}; {rounds} rounds, pages of {PAGE} tokens",
            "microseconds, median of the rounds: process CPU time (get and free: wall clock)",
        ),
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def step_rows(
    num_seqs: int, caching: bool, rounds: int, rng: np.random.Generator
) -> list[dict[str, object]]:
    prompts = [rng.integers(0, VOCABULARY, n) for n in lengths_of(num_seqs, POOL, rng)]
    peer, facade = Peer(prompts, caching), Ours(prompts, caching)
    tables = PageTables(PAGE, POOL, sharing=SharingOptions() if caching else None)
    seq_ids = np.array([tables.open(prompt) for prompt in prompts])
    tables.commit(tables.reserve(seq_ids, [len(prompt) for prompt in prompts]))
    calls = []
    for _ in range(rounds):
        tokens = rng.integers(0, VOCABULARY, num_seqs).astype(np.int32)
        listed = tokens.tolist()
        batched = partial(append, tables, seq_ids, 1, tokens)
        calls.append((partial(peer.step, listed), batched, partial(facade.step, listed)))
    theirs, batch, one = timed(calls)
    name = f"step, {num_seqs} requests, caching {'on' if caching else 'off'}"
    return [line(f"{name}: batched", theirs, batch), line(f"{name}: façade", theirs, one)]


def admission_row(rounds: int, rng: np.random.Generator) -> dict[str, object]:
    peer, manager, hasher = Peer([], True), BlockManager(POOL, PAGE), BlockHasher(PAGE)
    calls = []
    for i in range(rounds):
        prompt = rng.integers(0, VOCABULARY, PROMPT).astype(np.int32)
        calls.append(
            (
                lambda i=i, p=prompt: peer.admit(peer.request(str(i), p)),
                lambda i=i, p=prompt: admit(manager, ServedRequest(str(i), p, hasher)),
            )
        )
    return line(f"admission of {PROMPT} new tokens, hashing included", *timed(calls))


def page_rows(count: int, rounds: int, rng: np.random.Generator) -> list[dict[str, object]]:
    theirs, ours = BlockPool(100_000, True, PAGE), PagePool(100_000)
    order = rng.permutation(99_999)
    blocks = theirs.get_new_blocks(99_999)
    theirs.free_blocks([blocks[i] for i in order])
    ours.release(ours.acquire(99_999)[order])
    seconds = np.empty((4, rounds))
    for i in range(rounds):
        times = [time.perf_counter()]
        taken = theirs.get_new_blocks(count)
        times.append(time.perf_counter())
        theirs.free_blocks(taken)
        times.append(time.perf_counter())
        pages = ours.acquire(count)
        times.append(time.perf_counter())
        ours.release(pages)
        times.append(time.perf_counter())
        seconds[:, i] = np.diff(times)
    return [
        line(f"get {count} of 100 000 pages", seconds[0], seconds[2]),
        line(f"free {count} of 100 000 pages", seconds[1], seconds[3]),
    ]


def timed(rounds: Sequence[tuple[Callable[[], object], ...]]) -> np.ndarray:
    """Return the seconds of each call, ``[calls of a round, rounds]``; the peer's come first."""
    seconds = np.empty((len(rounds[0]), len(rounds)))
    for j in range(len(seconds)):
        for i, calls in enumerate(rounds):
            start = time.process_time()
            calls[j]()
            seconds[j, i] = time.process_time() - start
    return seconds


def line(name: str, theirs: np.ndarray, ours: np.ndarray) -> dict[str, object]:
    return {
        "what": name,
        "vllm us": float(np.median(theirs)) * 1e6,
        "pagedtq us": float(np.median(ours)) * 1e6,
        "times faster": float(np.median(theirs) / np.median(ours)),
        "by minima": float(theirs.min() / ours.min()),
    }


if __name__ == "__main__":
    main()
