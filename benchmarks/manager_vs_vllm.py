"""The block manager beside vLLM's own, in one process, one after the other.

Needs vLLM's scheduler core (vllm 0.33; its manager imports on a machine without a GPU). Both do the
same step: one token for every running request, as vLLM is meant to be called, one request after the
other, the new token's append (which hashes a block that fills) included. Ratios are of the totals
of all rounds. The sides take turns of 64 rounds, in which every row fills and takes several pages;
the worst turn is given beside the total.
The batched calls know a batch that decodes on: where one request leaves and another one joins
between any two steps (not timed), they do not.
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

#: Rounds that each side does in a row.
TURN = 4 * PAGE


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
        self.num_requests = len(self.requests)
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

    def replace(self, at: int, prompt: np.ndarray) -> None:
        """Let a request leave and another one join."""
        self.manager.free(self.requests[at])
        self.num_requests += 1
        self.requests[at] = self.request(str(self.num_requests), prompt)
        self.admit(self.requests[at])

    def step(self, tokens: list[int]) -> None:
        """Append a token to every request."""
        allocate = self.manager.allocate_slots
        for request, token in zip(self.requests, tokens, strict=True):
            request.append_output_token_ids(token)
            allocate(request, 1)
            request.num_computed_tokens += 1


class Batch:
    """Our batched calls with the same requests."""

    def __init__(self, prompts: Sequence[np.ndarray], caching: bool) -> None:
        self.tables = PageTables(PAGE, POOL, sharing=SharingOptions() if caching else None)
        self.seq_ids = np.array([self.admit(prompt) for prompt in prompts])

    def admit(self, prompt: np.ndarray) -> int:
        """Open a sequence with all its tokens."""
        seq_id = self.tables.open(prompt)
        append(self.tables, np.array([seq_id]), len(prompt) - self.tables.length_of(seq_id))
        return seq_id

    def step(self, tokens: np.ndarray) -> None:
        """Append a token to every sequence."""
        append(self.tables, self.seq_ids, 1, tokens)

    def replace(self, at: int, prompt: np.ndarray) -> None:
        """Let a sequence leave and another one join."""
        self.tables.close(int(self.seq_ids[at]))
        self.seq_ids[at] = self.admit(prompt)


class Facade:
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
    turns = 1 if options.quick else 4
    rows = []
    for num_seqs in (64, 1024):
        for caching in (False, True):
            rows += step_rows(num_seqs, caching, turns, rng)
        rows.append(changing_row(num_seqs, turns, rng))
    rows.append(in_phase_row(1024, turns, rng))
    rows.append(admission_row(4 * turns, rng))
    for count in (10, 1000):
        rows += page_rows(count, rng)
    publish(
        "manager_vs_vllm",
        rows,
        notes=(
            f"vllm {metadata.version('vllm')}; {turns} turns of {TURN} rounds (admission: "
            f"{4 * turns} turns; get and free: turns of {PAGE}, until each page was taken once), "
            f"pages of {PAGE} tokens",
            "microseconds of process CPU time per round, mean of all; worst turn: the least ratio "
            "of any; worst step: the slowest of all rounds instead of the mean",
        ),
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def step_rows(
    num_seqs: int, caching: bool, turns: int, rng: np.random.Generator
) -> list[dict[str, object]]:
    prompts = [rng.integers(0, VOCABULARY, n) for n in lengths_of(num_seqs, POOL, rng)]
    peer, batch, facade = (kind(prompts, caching) for kind in (Peer, Batch, Facade))
    calls = []
    for _ in range(turns * TURN):
        tokens = rng.integers(0, VOCABULARY, num_seqs).astype(np.int32)
        listed = tokens.tolist()
        calls.append(
            (partial(peer.step, listed), partial(batch.step, tokens), partial(facade.step, listed))
        )
    theirs, ours, one = by_turn(calls)
    name = f"step, {num_seqs} requests, caching {'on' if caching else 'off'}"
    return [line(f"{name}: batched", theirs, ours), line(f"{name}: façade", theirs, one)]


def changing_row(num_seqs: int, turns: int, rng: np.random.Generator) -> dict[str, object]:
    """Time steps between which one request leaves and another one joins."""
    prompts = [rng.integers(0, VOCABULARY, n) for n in lengths_of(num_seqs, POOL, rng)]
    peer, batch = Peer(prompts, True), Batch(prompts, True)
    seconds = np.empty((2, turns, TURN))
    for turn, i in np.ndindex(turns, TURN):
        at, prompt = int(rng.integers(num_seqs)), rng.integers(0, VOCABULARY, PROMPT)
        tokens = rng.integers(0, VOCABULARY, num_seqs).astype(np.int32)
        peer.replace(at, prompt)
        seconds[0, turn, i] = seconds_of(partial(peer.step, tokens.tolist()))
        batch.replace(at, prompt)
        seconds[1, turn, i] = seconds_of(partial(batch.step, tokens))
    name = f"step, {num_seqs} requests, one of them new, caching on: batched"
    return line(name, *seconds.mean(axis=2))


def in_phase_row(num_seqs: int, turns: int, rng: np.random.Generator) -> dict[str, object]:
    """Time the worst of steps where all requests fill a block at once, and take one at once."""
    prompts = list(rng.integers(0, VOCABULARY, (num_seqs, 20 * PAGE)))
    peer, batch = Peer(prompts, True), Batch(prompts, True)
    seconds = np.empty((2, turns, TURN))
    for turn in range(turns):
        steps = rng.integers(0, VOCABULARY, (TURN, num_seqs)).astype(np.int32)
        for i, tokens in enumerate(steps.tolist()):
            seconds[0, turn, i] = seconds_of(partial(peer.step, tokens))
        for i, tokens in enumerate(steps):
            seconds[1, turn, i] = seconds_of(partial(batch.step, tokens))
    worst = seconds.max(axis=2)
    row = line(f"worst step, {num_seqs} requests in phase, caching on: batched", *worst)
    slowest = worst.max(axis=1)
    row.update(zip(("vllm us", "pagedtq us"), (slowest * 1e6).tolist(), strict=True))
    row["times faster"] = float(slowest[0] / slowest[1])
    return row


def admission_row(turns: int, rng: np.random.Generator) -> dict[str, object]:
    peer, manager, hasher = Peer([], True), BlockManager(POOL, PAGE), BlockHasher(PAGE)
    calls = []
    for i in range(turns * TURN):
        prompt = rng.integers(0, VOCABULARY, PROMPT).astype(np.int32)
        calls.append(
            (
                lambda i=i, p=prompt: peer.admit(peer.request(str(i), p)),
                lambda i=i, p=prompt: admit(manager, ServedRequest(str(i), p, hasher)),
            )
        )
    return line(f"admission of {PROMPT} new tokens, hashing included", *by_turn(calls))


def page_rows(count: int, rng: np.random.Generator) -> list[dict[str, object]]:
    """Time getting pages so many times, then freeing what was got each time."""
    turns = 100_000 // (count * PAGE)
    theirs, ours = BlockPool(100_000, True, PAGE), PagePool(100_000)
    order = rng.permutation(99_999)
    blocks = theirs.get_new_blocks(99_999)
    theirs.free_blocks([blocks[i] for i in order])
    ours.release(ours.acquire(99_999)[order])
    pairs = ((theirs.get_new_blocks, theirs.free_blocks), (ours.acquire, ours.release))
    seconds = np.empty((2, 2, turns))
    for turn, side in np.ndindex(turns, 2):
        get, free = pairs[side]
        taken: list[object] = []
        start = time.process_time()
        for _ in range(PAGE):
            taken.append(get(count))
        middle = time.process_time()
        for some in taken:
            free(some)
        seconds[:, side, turn] = middle - start, time.process_time() - middle
    seconds /= PAGE
    return [
        line(f"get {count} of 100 000 pages", *seconds[0]),
        line(f"free {count} of 100 000 pages", *seconds[1]),
    ]


def by_turn(rounds: Sequence[tuple[Callable[[], object], ...]]) -> np.ndarray:
    """Return mean seconds of each side's call, ``[sides, turns]``; the peer's comes first."""
    num_turns = len(rounds) // TURN
    seconds = np.empty((len(rounds[0]), num_turns))
    for turn, side in np.ndindex(num_turns, len(seconds)):
        calls = [calls[side] for calls in rounds[turn * TURN : (turn + 1) * TURN]]
        start = time.process_time()
        for call in calls:
            call()
        seconds[side, turn] = (time.process_time() - start) / TURN
    return seconds


def seconds_of(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def line(name: str, theirs: np.ndarray, ours: np.ndarray) -> dict[str, object]:
    """Compare the mean seconds of a round in every turn."""
    return {
        "what": name,
        "vllm us": float(theirs.mean()) * 1e6,
        "pagedtq us": float(ours.mean()) * 1e6,
        "times faster": float(theirs.mean() / ours.mean()),
        "worst turn": float((theirs / ours).min()),
    }


if __name__ == "__main__":
    main()
