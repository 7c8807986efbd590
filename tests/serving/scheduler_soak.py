"""Thousands of steps of the scheduler on a pool that is far too small; see `test_scheduler_soak`.

Up to 1024 requests of some 500 prompt tokens, half of which begin like others, and up to 5000 to
generate, on 1000 pages. Tokens are read through the page tables, so that a page that is shared,
swapped or reused wrongly changes what is generated.
"""

from __future__ import annotations

import random
import zlib
from collections import Counter
from hashlib import sha256
from typing import Any

import numpy as np

from pagedtq.paging import PageTables, SharingOptions
from pagedtq.serving import GenerationRequest, Scheduler, SchedulerOptions
from tests.serving.paged_engine import VOCABULARY, PagedEngine

SIZE, STEMS, MOST = 16, 20, 1024


class SchedulerSoak:
    """A scheduler, its engine, and requests that keep coming.

    Parameters
    ----------
    seed : int
        Decides every request, and when one is aborted.
    num_pages, num_host_pages : int
        Small pools.
    longest : int
        Tokens to generate at most.
    options
        Of the scheduler.
    """

    def __init__(
        self,
        seed: int,
        num_pages: int = 1000,
        num_host_pages: int = 2000,
        longest: int = 5000,
        **options: Any,
    ) -> None:
        self.rng, self.longest = random.Random(seed), longest
        tables = PageTables(
            SIZE, num_pages, sharing=SharingOptions(), num_host_pages=num_host_pages
        )
        self.scheduler = Scheduler(tables, SchedulerOptions(**options))
        self.engine = PagedEngine(self.scheduler)
        self.requests: dict[str, GenerationRequest] = {}
        self.done: Counter[str] = Counter()
        self.steps = sha256()

    def run(self, steps: int, check_every: int) -> None:
        """Do so many steps, then abort what is left and check that nothing is held."""
        scheduler, rng = self.scheduler, self.rng
        for number in range(steps):
            while len(self.requests) < MOST and (rng.random() < 0.3 or not self.requests):
                self.add()
            if rng.random() < 0.002:
                self.abort(rng.choice(list(self.requests)))
            step = scheduler.schedule()
            if step is None:
                continue
            if rng.random() < 0.01:
                for swap in step.swaps:
                    self.engine.copy_swap(swap)
                scheduler.abort_step()
                self.done["aborted steps"] += 1
                continue
            self.done["sequences stepped"] += step.plan.seq_ids.size
            self.steps.update(repr((step.preempted, step.chunks)).encode())
            self.steps.update(step.plan.slot_mapping.tobytes())
            for finished in self.engine.run_step(step).finished:
                self.check(finished)
            if number % check_every == 0:
                scheduler.tables.check_integrity()
        self.done["steps"] = self.engine.steps
        self.done["tokens stored"] = self.engine.tokens
        self.done |= {
            name: getattr(scheduler.stats, name) for name in ("admitted", "preempted", "swapped")
        }
        for name in list(self.requests):
            self.abort(name)
        assert scheduler.schedule() is None and not scheduler.has_work
        tables = scheduler.tables
        tables.check_integrity()
        assert tables.num_sequences == tables.pool.num_used == tables.host.num_used == 0

    def add(self) -> None:
        rng, name = self.rng, f"r{self.done['added']}"
        stem = [rng.randrange(STEMS)] * rng.randint(0, 400)
        tail = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 200))]
        request = GenerationRequest(
            request_id=name,
            prompt=stem + tail,
            max_tokens=rng.randint(1, self.longest),
            num_samples=rng.choice((1, 1, 1, 2)),
            priority=rng.randint(-2, 2),
        )
        self.requests[name] = request
        self.scheduler.add(request)
        self.done["added"] += 1

    def abort(self, name: str) -> None:
        self.done["aborted"] += 1
        self.check(self.scheduler.abort(name), aborted=True)

    def check(self, finished: Any, aborted: bool = False) -> None:
        """Every token is what it must be, up to where it was aborted."""
        request = self.requests.pop(finished.request_id)
        for sample, completion in enumerate(finished.completions):
            tokens = completion.token_ids
            if not aborted:
                assert tokens.size == request.max_tokens
                self.done["completed"] += 1
            assert tokens.tolist() == expected(request, sample, tokens.size)
            self.done["tokens compared"] += tokens.size


def expected(request: GenerationRequest, sample: int, count: int) -> list[int]:
    """Return the first tokens of a completion: `next_token`, with its checksum carried on."""
    checksum, out = zlib.crc32(np.asarray(request.prompt, "<i4").tobytes()), []
    for _ in range(count):
        out.append((checksum + sample) % VOCABULARY)
        checksum, sample = zlib.crc32(out[-1].to_bytes(4, "little"), checksum), 0
    return out
