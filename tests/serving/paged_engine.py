"""An engine whose pages hold token ids and whose model reads them through the page tables.

The next token is a function of the tokens read, so that a page that is shared, copied, swapped or
freed wrongly changes what is generated. `expected` says what must come out: the same function on a
plain list.
"""

from __future__ import annotations

import zlib

import numpy as np

from pagedtq.serving import Scheduler

#: Tokens of the vocabulary; small, so that stop tokens happen.
VOCABULARY = 97


def next_token(tokens, sample=0):
    """Return what the model says after some tokens; samples differ."""
    return (zlib.crc32(np.asarray(tokens, "<i4").tobytes()) + sample) % VOCABULARY


def expected(request, sample=0):
    """Return what a request generates, and why it ends."""
    tokens, out = list(request.prompt), []
    while True:
        out.append(next_token(tokens, sample))
        tokens.append(out[-1])
        # Only the first token tells samples apart; from then on their tokens do.
        sample = 0
        if len(out) >= request.min_tokens and out[-1] in request.stop_token_ids:
            return out, "stop"
        if len(out) == request.max_tokens:
            return out, "length"


class PagedEngine:
    """Runs steps of a scheduler over an array of token ids, one per slot of the pool."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler, self.tables = scheduler, scheduler.tables
        size = self.tables.page_size
        self.pages = np.full((self.tables.pool.num_pages, size), -1, np.int64)
        self.host = np.full((self.tables.host.num_pages + 1, size), -1, np.int64)
        self.steps = self.tokens = self.copied = 0

    def run_step(self, step):
        """Compute a step and end it; return its output."""
        self.compute(step)
        self.steps += 1
        self.tokens += step.num_tokens
        return self.scheduler.update(self.sample(step))

    def compute(self, step):
        for swap in step.swaps:
            self.copy_swap(swap)
        plan = step.plan
        self.pages[plan.new_pages] = -1
        self.pages[plan.cow_dst] = self.pages[plan.cow_src]
        slots = plan.slot_mapping
        assert np.unique(slots).size == slots.size
        self.pages.ravel()[slots] = step.token_ids

    def copy_swap(self, swap):
        self.copied += swap.pages.size
        if swap.direction == "out":
            self.host[swap.host_pages] = self.pages[swap.pages]
        else:
            self.pages[swap.pages] = self.host[swap.host_pages]

    def read(self, seq_id):
        """Return all tokens of a sequence, through its page table."""
        length = int(self.tables.lengths([seq_id])[0])
        tokens = self.pages[self.tables.block_table([seq_id])[0]].ravel()[:length]
        assert (tokens >= 0).all(), "a token is read that was never written"
        return tokens

    def sample(self, step):
        contents = {m: self.read(s) for m, s in enumerate(step.plan.seq_ids.tolist())}
        sampled, seen = [], {}
        for member in step.sample_members.tolist():
            sample = seen[member] = seen.get(member, -1) + 1
            sampled.append(next_token(contents[member], sample))
        return np.array(sampled, np.int32)


def serve(scheduler, requests=(), after_step=None, engine=None):
    """Serve requests to the end; return what finished, by id."""
    for request in requests:
        scheduler.add(request)
    engine, finished = engine or PagedEngine(scheduler), {}
    while scheduler.has_work:
        step = scheduler.schedule()
        assert step is not None
        output = engine.run_step(step)
        finished |= {request.request_id: request for request in output.finished}
        if after_step is not None:
            after_step(step, output)
        assert engine.steps < 20_000
    return finished


def assert_served(request, finished):
    """Assert that a request generated exactly what it should."""
    assert finished.request_id == request.request_id
    assert [c.index for c in finished.completions] == list(range(request.num_samples))
    for sample, completion in enumerate(finished.completions):
        tokens, reason = expected(request, sample)
        assert completion.token_ids.tolist() == tokens, (request.request_id, sample)
        assert (completion.num_tokens, completion.reason) == (len(tokens), reason)


class CopyingEngine(PagedEngine):
    """Copies swaps while later steps compute, and reports them when it likes.

    A copy is made the moment it is begun, or as late as it is reported; until then the pages that
    it writes hold nothing that may be read.
    """

    def __init__(self, scheduler: Scheduler, late=True) -> None:
        super().__init__(scheduler)
        self.late, self.under_way = late, []
        self.overlapped = 0
        scheduler._start_swap = self.begin

    def begin(self, swap):
        if swap.direction == "in":
            self.pages[swap.pages] = -1
        if not self.late:
            self.copy_swap(swap)
        self.under_way.append(swap)

    def end(self, at=0, failed=False):
        swap = self.under_way.pop(at)
        if failed:
            self.scheduler.swap_failed(swap)
            return
        if self.late:
            self.copy_swap(swap)
        self.scheduler.swap_done(swap)

    def compute(self, step):
        assert not step.swaps
        moving = {seq for swap in self.under_way for seq in swap.seq_ids.tolist()}
        assert not moving & set(step.plan.seq_ids.tolist())
        self.overlapped += bool(moving)
        super().compute(step)


def serve_overlapped(scheduler, requests=(), every=2, engine=None):
    """Serve requests while each copy takes some steps; return what finished, by id."""
    for request in requests:
        scheduler.add(request)
    engine, finished, rounds = engine or CopyingEngine(scheduler), {}, 0
    while scheduler.has_work:
        rounds += 1
        assert rounds < 20_000
        step = scheduler.schedule()
        if step is not None:
            output = engine.run_step(step)
            finished |= {request.request_id: request for request in output.finished}
        if engine.under_way and (step is None or rounds % every == 0):
            engine.end()
        else:
            assert step is not None or not scheduler.has_work, "nothing runs, and nothing will"
    return finished
