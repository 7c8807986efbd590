"""vLLM's own scheduler, once over its own block manager and once over ours, on the same requests.

Needs vLLM's scheduler core (vllm 0.33; ``tests/peers/vllm_environment.sh DIR`` makes an environment
for it). A scheduler nobody here wrote serves requests that arrive over time and share prompts, with
chunked prefill, in a pool too small for them, so that it preempts. In place of a model, pages hold
token ids: each step writes the scheduled tokens through the block ids the scheduler sent, and the
next token is a checksum of all tokens read back through them. A page given to two requests, a wrong
prefix hit or a lost block would change tokens.

vLLM 0.33 reuses freed pages that hold no block before all others, the newest first; ours wait
their turn, as in vLLM before. So the third run is vLLM's manager with that one rule put back:
against it, every block id of every step must be equal.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq.integrations.vllm import attach
from pagedtq.serving import BlockManager

try:
    import torch
    from vllm.config import CacheConfig, DeviceConfig, SchedulerConfig, VllmConfig
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request
    from vllm.v1.structured_output import StructuredOutputManager
except ImportError as error:
    raise SystemExit(f"vLLM's scheduler core is needed: {error}") from error

PAGE, VOCABULARY, MAX_LEN = 16, 30_000, 4096


class Prompt(NamedTuple):
    """What is asked for, and in which step it arrives."""

    name: str
    step: int
    tokens: list[int]
    num_output: int
    priority: int


class Log(NamedTuple):
    """What a scheduler did."""

    #: Per step: tokens scheduled and new block ids by request, in order.
    steps: list[dict[str, tuple[int, list[int]]]]
    #: Generated tokens by request.
    outputs: dict[str, list[int]]
    preemptions: int
    #: Tokens that were found instead of computed, by new and by preempted requests.
    found: int
    seconds: float


def prompts_of(count: int, rng: np.random.Generator) -> list[Prompt]:
    """Make requests of which two thirds begin with one of four shared prompts."""
    shared = [rng.integers(0, VOCABULARY, n).tolist() for n in (70, 160, 400, 900)]
    prompts, step = [], 0
    for i in range(count):
        step += int(rng.integers(0, 4))
        begin = shared[int(rng.integers(4))] if rng.random() < 2 / 3 else []
        own = rng.integers(0, VOCABULARY, int(rng.integers(1, 600))).tolist()
        num_output, priority = int(rng.integers(1, 200)), int(rng.integers(3))
        prompts.append(Prompt(f"request-{i}", step, begin + own, num_output, priority))
    return prompts


def scheduler_of(num_pages: int, caching: bool, policy: str) -> Any:
    """Make vLLM's scheduler for a model with one group of full-attention layers."""
    config = VllmConfig(
        cache_config=CacheConfig(block_size=PAGE, enable_prefix_caching=caching),
        scheduler_config=SchedulerConfig(
            max_num_seqs=32,
            max_num_batched_tokens=256,
            max_model_len=MAX_LEN,
            is_encoder_decoder=False,
            enable_chunked_prefill=True,
            async_scheduling=False,
            policy=policy,
        ),
        device_config=DeviceConfig(device="cpu"),
    )
    config.cache_config.num_gpu_blocks = num_pages
    # What a scheduler asks of the model; the real class would load one.
    config.model_config = SimpleNamespace(
        max_model_len=MAX_LEN,
        runner_type="generate",
        uses_mrope=False,
        is_encoder_decoder=False,
        is_diffusion=False,
        supports_multimodal_inputs=False,
        multimodal_config=None,
        return_sampling_mask=False,
        skip_tokenizer_init=True,
    )
    spec = FullAttentionSpec(PAGE, num_kv_heads=8, head_size=128, dtype=torch.float16)
    cache = KVCacheConfig(num_pages, [], [KVCacheGroupSpec(["layer"], spec)])
    grammars = StructuredOutputManager(config)
    return Scheduler(config, cache, grammars, block_size=PAGE)


class Worker:
    """Stands in for a model: pages of token ids, read and written through block ids."""

    def __init__(self, num_pages: int) -> None:
        self.pages = np.full((num_pages, PAGE), -1, np.int64)
        self.tokens: dict[str, list[int]] = {}
        self.blocks: dict[str, list[int]] = {}

    def step(self, output: Any) -> tuple[Any, dict[str, tuple[int, list[int]]]]:
        """Execute a step; return what a model runner returns, and what was asked."""
        computed, given = {}, {}
        for new in output.scheduled_new_reqs:
            # A request that was preempted comes as a new one, with what it generated so far.
            self.tokens[new.req_id] = list(new.prefill_token_ids or new.prompt_token_ids)
            given[new.req_id] = new.block_ids[0]
            self.blocks[new.req_id] = list(new.block_ids[0])
            computed[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for name, blocks, done in zip(
            cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
        ):
            given[name] = blocks[0] if blocks else []
            before = [] if name in cached.resumed_req_ids else self.blocks[name]
            self.blocks[name] = before + given[name]
            computed[name] = done
        # All are written before any is read, as one launch for the batch does.
        counts = output.num_scheduled_tokens
        for name, count in counts.items():
            self.write(name, computed[name], computed[name] + count)
        sampled = [self.sample(name, computed[name] + count) for name, count in counts.items()]
        names = list(counts)
        result = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, sampled)
        return result, {name: (count, given[name]) for name, count in counts.items()}

    def write(self, name: str, start: int, stop: int) -> None:
        """Write tokens where the block ids say."""
        at = np.arange(start, stop)
        pages = np.array(self.blocks[name])[at // PAGE]
        assert pages.all(), "a token is written to the null page"
        self.pages[pages, at % PAGE] = self.tokens[name][start:stop]

    def sample(self, name: str, stop: int) -> list[int]:
        """Return the next token, of everything read back; none within the prompt."""
        tokens = self.tokens[name]
        if stop < len(tokens):
            return []
        read = self.pages[self.blocks[name]].ravel()[:stop]
        tokens.append(next_token(read.tolist()))
        return tokens[-1:]


def next_token(tokens: Sequence[int]) -> int:
    """Return what follows some tokens."""
    return zlib.crc32(np.array(tokens, np.int32).tobytes()) % VOCABULARY


def serve(scheduler: Any, prompts: Sequence[Prompt], num_pages: int, caching: bool) -> Log:
    """Serve all requests until nothing is left."""
    init_none_hash(sha256)
    hasher = get_request_block_hasher(PAGE, sha256) if caching else None
    worker, waiting = Worker(num_pages), list(reversed(prompts))
    steps: list[dict[str, tuple[int, list[int]]]] = []
    requests: dict[str, Any] = {}
    preemptions = found = number = 0
    seconds = 0.0
    while waiting or scheduler.has_unfinished_requests():
        while waiting and waiting[-1].step <= number:
            prompt = waiting.pop()
            request = Request(
                prompt.name,
                prompt.tokens,
                SamplingParams(max_tokens=prompt.num_output, ignore_eos=True),
                None,
                arrival_time=float(prompt.step),
                priority=prompt.priority,
                block_hasher=hasher,
            )
            requests[prompt.name] = request
            scheduler.add_request(request)
        start = time.perf_counter()
        output = scheduler.schedule()
        seconds += time.perf_counter() - start
        found += sum(new.num_computed_tokens for new in output.scheduled_new_reqs)
        result, asked = worker.step(output)
        start = time.perf_counter()
        scheduler.update_from_output(output, result)
        seconds += time.perf_counter() - start
        steps.append(asked)
        number += 1
    preemptions = sum(request.num_preemptions for request in requests.values())
    # The last requests' pages go with the step that reports them as finished.
    scheduler.schedule()
    outputs = {name: list(request.output_token_ids) for name, request in requests.items()}
    return Log(steps, outputs, preemptions, found, seconds)


def expected_outputs(prompts: Sequence[Prompt]) -> dict[str, list[int]]:
    """Return what every request must get, computed without any cache."""
    outputs = {}
    for prompt in prompts:
        tokens = list(prompt.tokens)
        for _ in range(prompt.num_output):
            tokens.append(next_token(tokens))
        outputs[prompt.name] = tokens[len(prompt.tokens) :]
    return outputs


class Runs(NamedTuple):
    """The same requests, served three times, and the tokens that are right."""

    vllm: Log
    vllm_in_turn: Log
    ours: Log
    manager: BlockManager
    expected: dict[str, list[int]]


def run(count: int, num_pages: int, caching: bool, policy: str, seed: int) -> Runs:
    """Serve the same requests over both managers."""
    prompts = prompts_of(count, np.random.default_rng(seed))

    def served(scheduler: Any) -> Log:
        return serve(scheduler, prompts, num_pages, caching)

    vllm = served(scheduler_of(num_pages, caching, policy))
    with freed_in_turn():
        in_turn = served(scheduler_of(num_pages, caching, policy))
    scheduler = scheduler_of(num_pages, caching, policy)
    manager = attach(scheduler).manager
    ours = served(scheduler)
    return Runs(vllm, in_turn, ours, manager, expected_outputs(prompts))


@contextmanager
def freed_in_turn() -> Iterator[None]:
    """Let vLLM's pool append every freed page to its queue, as it did before 0.33's rule."""

    def free_blocks(pool: Any, ordered_blocks: Iterable[Any]) -> None:
        freed = []
        for block in ordered_blocks:
            block.ref_cnt -= 1
            if block.ref_cnt == 0 and not block.is_null:
                freed.append(block)
        pool.free_block_queue.append_n(freed)

    original = BlockPool.free_blocks
    BlockPool.free_blocks = free_blocks
    try:
        yield
    finally:
        BlockPool.free_blocks = original


def equal_steps(first: Log, second: Log, ids: bool) -> int:
    """Count the leading steps that scheduled the same tokens (and gave the same block ids)."""
    for at, (one, other) in enumerate(zip(first.steps, second.steps, strict=False)):
        same = one == other if ids else counts_of(one) == counts_of(other)
        if not same or list(one) != list(other):
            return at
    return min(len(first.steps), len(second.steps))


def counts_of(step: dict[str, tuple[int, list[int]]]) -> dict[str, int]:
    """Return the tokens scheduled for each request."""
    return {name: count for name, (count, _) in step.items()}


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("vllm_scheduler", __doc__, argv)
    count = 60 if options.quick else 400
    rows = []
    for caching, policy, num_pages in (
        (True, "fcfs", 260),
        (True, "priority", 260),
        (False, "fcfs", 400),
        (True, "fcfs", 4000),
    ):
        runs = run(count, num_pages, caching, policy, options.seed)
        ours, manager = runs.ours, runs.manager
        manager.tables.check_integrity()
        rows.append(
            {
                "caching": "on" if caching else "off",
                "policy": policy,
                "pages": num_pages,
                "requests served": len(ours.outputs),
                "tokens generated": sum(map(len, ours.outputs.values())),
                "right tokens": ours.outputs == runs.expected == runs.vllm.outputs,
                "steps": len(ours.steps),
                "steps equal, ids too, in turn": equal_steps(ours, runs.vllm_in_turn, True),
                "vllm steps": len(runs.vllm.steps),
                "steps equal to vllm": equal_steps(ours, runs.vllm, False),
                "preemptions": ours.preemptions,
                "vllm preemptions": runs.vllm.preemptions,
                "tokens found": ours.found,
                "vllm tokens found": runs.vllm.found,
                "pages leaked": manager.tables.pool.num_used,
                "s": ours.seconds,
                "vllm s": runs.vllm.seconds,
            }
        )
    publish(
        "vllm_scheduler",
        rows,
        notes=(
            f"scheduler of vllm {metadata.version('vllm')}; pages of {PAGE} tokens",
            "equal steps: leading steps that schedule the same tokens for the same requests",
            "in turn: vllm with pages reused in the order in which they were freed",
            "seconds: scheduler and manager together, over all steps",
        ),
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
