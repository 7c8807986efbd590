"""Hit rate of prefix sharing on the Mooncake conversation trace, by pool size.

Requests come one at a time, in the order of the trace, through the real `PagePool` and
`PrefixIndex` (no page bytes). Blocks of 512 tokens count as in the trace: every listed block, the
partial last one too. Pages of fewer tokens split each block that is whole; then a request never
finds its last token, as in serving.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq.paging import PagePool, PrefixIndex
from pagedtq.sim.traces import read_mooncake

TRACE_BLOCK = 512
CAPACITIES = (1_000, 5_000, 10_000, 30_000, 50_000, 100_000)
TRACES = Path(os.environ.get("PAGEDTQ_TRACES", Path(__file__).parents[2] / "shared" / "traces"))
NAME = "mooncake_conversation_trace.jsonl"


class Prompt(NamedTuple):
    """Tokens of a prompt, and the identities of its 512-token blocks."""

    num_tokens: int
    block_ids: list[int]


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("prefix", __doc__, argv)
    path = TRACES / NAME
    if not path.is_file():
        raise SystemExit(f"{path} is missing: fetch it from kvcache-ai/Mooncake (FAST25-release)")
    prompts = list(read_prompts(path))
    capacities = CAPACITIES[:3] if options.quick else CAPACITIES
    rows = [row(prompts, capacity, TRACE_BLOCK) for capacity in capacities]
    rows += [row(prompts, capacity, 64) for capacity in capacities[: 2 if options.quick else 4]]
    publish(
        "prefix",
        rows,
        notes=(
            f"{NAME}: {len(prompts)} requests; capacity in blocks of {TRACE_BLOCK} tokens",
            "least recently freed page first; a request frees its pages in reverse",
        ),
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def row(prompts: list[Prompt], capacity: int, page_size: int) -> dict[str, object]:
    start = time.perf_counter()
    hits, blocks, pages = replay(prompts, capacity * TRACE_BLOCK // page_size, page_size)
    seconds = time.perf_counter() - start
    return {
        "capacity": capacity,
        "page size": page_size,
        "n - 1 cap": page_size != TRACE_BLOCK,
        "hit rate %": 100 * hits / blocks,
        "us per request": seconds / len(prompts) * 1e6,
        "ns per page": seconds / pages * 1e9,
    }


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Return the prompts of a Mooncake trace, in its order."""
    trace = read_mooncake(path)
    if trace.hash_ids is None or trace.hash_offsets is None:
        raise SystemExit(f"{path} names no blocks")
    ids, offsets = trace.hash_ids.tolist(), trace.hash_offsets.tolist()
    for at, num_tokens in enumerate(trace.prompt_tokens.tolist()):
        yield Prompt(num_tokens, ids[offsets[at] : offsets[at + 1]])


def replay(prompts: Iterable[Prompt], num_pages: int, page_size: int) -> tuple[int, int, int]:
    """Serve prompts one after the other.

    Returns
    -------
    hits, blocks, pages : int
        Pages found; pages asked for; pages of all prompts, those without a key too.
    """
    pool, prefix = PagePool(num_pages + 1), PrefixIndex(num_pages + 1)
    hits = blocks = pages = 0
    for prompt in prompts:
        keys, most = keys_of(prompt, page_size)
        count = max(len(keys), -(-prompt.num_tokens // page_size))
        found = prefix.longest(keys[:most])
        pool.touch(found)
        taken = pool.acquire(count - len(found))
        prefix.forget(taken)
        new = keys[len(found) :]
        prefix.publish(new, taken[: len(new)].tolist())
        held = np.concatenate((np.array(found, np.int32), taken))
        pool.release(held[::-1])
        hits, blocks, pages = hits + len(found), blocks + len(keys), pages + count
    return hits, blocks, pages


def keys_of(prompt: Prompt, page_size: int) -> tuple[list[bytes], int]:
    """Return the keys of a prompt's pages, and how many of them may be found."""
    if page_size == TRACE_BLOCK:
        keys = [block.to_bytes(8, "little") for block in prompt.block_ids]
        return keys, len(keys)
    parts = TRACE_BLOCK // page_size
    whole = prompt.num_tokens // page_size
    # A page is a part of its block; an id stands for all tokens up to the block's end, so parts of
    # the last, partial block are named by it as well.
    keys = [
        (block * parts + part).to_bytes(9, "little")
        for block in prompt.block_ids
        for part in range(parts)
    ][:whole]
    return keys, max(prompt.num_tokens - 1, 0) // page_size


if __name__ == "__main__":
    main()
