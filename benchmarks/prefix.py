"""Hit rate of prefix sharing on the Mooncake conversation trace, by pool size.

Requests come one at a time, in the order of the trace, through the real `PagePool` and
`PrefixIndex` (no page bytes). Blocks of 512 tokens count as in the trace: every listed block, the
partial last one too. Pages of fewer tokens split each block that is whole; then a request never
finds its last token, as in serving.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq.paging import PagePool, PrefixIndex
from pagedtq.sim.traces import read_mooncake
from pagedtq.sim.workload import HASH_BLOCK_TOKENS, Workload

CAPACITIES = (1_000, 5_000, 10_000, 30_000, 50_000, 100_000)
TRACES = Path(os.environ.get("PAGEDTQ_TRACES", Path(__file__).parents[2] / "shared" / "traces"))
NAME = "mooncake_conversation_trace.jsonl"


def main(argv: Sequence[str] | None = None) -> None:
    options = arguments("prefix", __doc__, argv)
    path = TRACES / NAME
    if not path.is_file():
        raise SystemExit(f"{path} is missing: fetch it from kvcache-ai/Mooncake (FAST25-release)")
    trace = read_mooncake(path)
    capacities = CAPACITIES[:3] if options.quick else CAPACITIES
    rows = [row(trace, capacity, HASH_BLOCK_TOKENS) for capacity in capacities]
    rows += [row(trace, capacity, 64) for capacity in capacities]
    publish(
        "prefix",
        rows,
        notes=(
            f"{NAME}: {len(trace)} requests; capacity in blocks of {HASH_BLOCK_TOKENS} tokens",
            "least recently freed page first; a request frees its pages in reverse",
        ),
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def row(trace: Workload, capacity: int, page_size: int) -> dict[str, object]:
    start = time.perf_counter()
    hits, blocks, pages = replay(trace, capacity * HASH_BLOCK_TOKENS // page_size, page_size)
    seconds = time.perf_counter() - start
    return {
        "capacity": capacity,
        "page size": page_size,
        "n - 1 cap": page_size != HASH_BLOCK_TOKENS,
        "hit rate %": 100 * hits / blocks,
        "us per request": seconds / len(trace) * 1e6,
        "ns per page": seconds / pages * 1e9,
    }


def replay(trace: Workload, num_pages: int, page_size: int) -> tuple[int, int, int]:
    """Serve prompts one after the other.

    Returns
    -------
    hits, blocks, pages : int
        Pages found; pages asked for; pages of all prompts, those without a key too.
    """
    pool, prefix = PagePool(num_pages + 1), PrefixIndex(num_pages + 1)
    hits = blocks = pages = 0
    for request, num_tokens in enumerate(trace.prompt_tokens.tolist()):
        keys, most = keys_of(trace, request, page_size)
        count = max(len(keys), -(-num_tokens // page_size))
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


def keys_of(trace: Workload, request: int, page_size: int) -> tuple[list[bytes], int]:
    """Return the keys of a prompt's pages, and how many of them may be found."""
    if trace.hash_ids is None or trace.hash_offsets is None:
        raise SystemExit(f"{trace.name} names no blocks")
    if page_size == HASH_BLOCK_TOKENS:
        # Every listed block counts, the partial last one too.
        blocks = trace.hash_ids[trace.hash_offsets[request] : trace.hash_offsets[request + 1]]
        keys = [block.to_bytes(8, "little") for block in blocks.tolist()]
        return keys, len(keys)
    parts = trace.block_keys(request, page_size) or []
    return parts, (int(trace.prompt_tokens[request]) - 1) // page_size


if __name__ == "__main__":
    main()
