"""Our manager says what vLLM's own does, call by call, to the id of every page; opt-in.

Both serve the same request objects. vLLM's pool appends freed pages to its queue in turn, as before
0.33's rule (`freed_in_turn`); nothing else of it is changed.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("vllm.v1.core.kv_cache_manager")

import torch
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
)
from vllm.v1.request import Request, RequestStatus

from benchmarks.vllm_scheduler import freed_in_turn
from pagedtq.serving import BlockManager

SIZE, PAGES, LONGEST, WATERMARK = 4, 30, 60, 0.1
CALLS = "arrive", "admit", "admit", "step", "step", "step", "free", "evict"


class Both:
    """The same calls to either manager."""

    def __init__(self, caching: bool, seed: int) -> None:
        init_none_hash(sha256)
        self.hasher = get_request_block_hasher(SIZE, sha256) if caching else None
        spec = FullAttentionSpec(SIZE, num_kv_heads=1, head_size=16, dtype=torch.float16)
        config = KVCacheConfig(PAGES, [], [KVCacheGroupSpec(["layer"], spec)])
        self.theirs = KVCacheManager(
            config,
            max_model_len=LONGEST,
            scheduler_block_size=SIZE,
            hash_block_size=SIZE,
            enable_caching=caching,
            watermark=WATERMARK,
        )
        self.ours = BlockManager(
            PAGES, SIZE, enable_caching=caching, max_model_len=LONGEST, watermark=WATERMARK
        )
        self.rng, self.seen = np.random.default_rng(seed), Counter()
        self.waiting: list[Request] = []
        self.running: list[Request] = []

    def draw(self, *choices):
        return choices[int(self.rng.integers(len(choices)))]

    def arrive(self, number: int) -> None:
        tokens = [at % 3 for at in range(self.draw(1, 4, 9, 17, 30, 45))]
        if self.draw(True, False):
            tokens[min(self.draw(0, 5, 12), len(tokens) - 1)] = 9
        options = SamplingParams(max_tokens=100)
        request = Request(f"r{number}", tokens, options, None, block_hasher=self.hasher)
        self.waiting.append(request)

    def admit(self) -> None:
        request = self.draw(*self.waiting)
        blocks, num_found = self.theirs.get_computed_blocks(request)[:2]
        found, same = self.ours.get_computed_blocks(request)
        assert (same, list(found.page_ids)) == (num_found, blocks.get_block_ids()[0])
        self.seen["found"] += num_found
        left = request.num_tokens - num_found
        external = self.draw(0, 0, min(5, left - 1))
        new = min(left - external, self.draw(1, 6, 100))
        if self.allocate(request, new, external, (num_found, found), (num_found, blocks)):
            self.waiting.remove(request)
            self.running.append(request)
            request.status = RequestStatus.RUNNING
            request.num_computed_tokens = num_found + external + new

    def step(self) -> None:
        request = self.draw(*self.running)
        done = request.num_computed_tokens
        if done == request.num_tokens:
            request.append_output_token_ids(int(self.rng.integers(3)))
        known = min(request.num_tokens - done, self.draw(1, 1, 7))
        drafts = self.draw(0, 0, 3) if done + known == request.num_tokens else 0
        if done + known + drafts >= LONGEST or not self.allocate(request, known + drafts):
            return
        accepted = int(self.rng.integers(drafts + 1))
        for at in range(accepted):
            request.append_output_token_ids(at)
        request.num_computed_tokens += known + accepted

    def allocate(
        self, request, new, external=0, our_found=(0, None), their_found=(0, None)
    ) -> bool:
        asked = {
            "num_lookahead_tokens": self.draw(0, 0, 2, 7),
            "num_external_computed_tokens": external,
            "delay_cache_blocks": self.draw(False, False, True),
            "full_sequence_must_fit": self.draw(False, False, True),
            "reserved_blocks": self.draw(0, 0, 2, 8, 25),
            "has_scheduled_reqs": self.draw(False, True),
        }
        theirs = self.theirs.allocate_slots(request, new, *their_found, **asked)
        ours = self.ours.allocate_slots(request, new, *our_found, **asked)
        assert (ours is None) == (theirs is None), (request, new, external, asked)
        self.seen["refused" if ours is None else "given"] += 1
        if ours is not None and not external:
            # Theirs leaves out pages of tokens from elsewhere; `compare` sees them.
            assert list(ours.page_ids) == theirs.get_block_ids()[0]
        return ours is not None

    def free(self) -> None:
        request = self.draw(*self.running)
        for manager in self.ours, self.theirs:
            manager.free(request)
        self.running.remove(request)
        if self.draw(True, False):
            request.status, request.num_computed_tokens = RequestStatus.PREEMPTED, 0
            self.waiting.append(request)

    def evict(self) -> None:
        pages = {int(page) for page in self.rng.integers(1, PAGES, 2)}
        for manager in self.ours, self.theirs:
            manager.evict_blocks(pages)

    def compare(self) -> None:
        assert self.ours.num_free_blocks == self.theirs.block_pool.get_num_free_blocks()
        for request in self.running:
            name = request.request_id
            assert self.ours.get_block_ids(name)[0] == self.theirs.get_block_ids(name)[0]


@pytest.mark.parametrize("caching", [True, False])
def test_every_call_has_the_answer_of_vllms_manager(caching):
    seen = Counter()
    with freed_in_turn():
        for seed in range(8):
            both = Both(caching, seed)
            for number in range(150):
                what = both.draw(*CALLS)
                if what == "arrive" and len(both.waiting) < 5:
                    both.arrive(number)
                elif what == "admit" and both.waiting:
                    both.admit()
                elif what in ("step", "free") and both.running:
                    getattr(both, what)()
                elif what == "evict" and caching:
                    both.evict()
                both.compare()
            seen += both.seen
            both.ours.tables.check_integrity()
    assert seen["given"] > 100
    assert seen["refused"] > 20
    assert (seen["found"] > 20) == caching
