"""Continuous batching over a page budget, on the real control plane and a clock of its own.

A *step* processes one token of every decoding sequence and chunks of prompts, up to a number of
tokens. Requests are admitted first come, first served; nothing overtakes. When pages run out, the
sequence admitted last gives back everything and waits at the head of the queue, to be recomputed
(vLLM's rules). So waiting requests are always younger than running ones, at most one sequence is in
prefill across steps, and the oldest always advances: no livelock, whatever the pool.

A sequence of ``p`` prompt and ``o`` output tokens stores ``p + o - 1``: prefill samples the first
output token, each decode step stores the token sampled last, and the very last one is never stored.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..config import CacheConfig
from ..paging.page_tables import PageTables
from ..sizing import Capacity
from .batch import BatchingOptions, DecodeBatch, Prefill
from .cost_model import CostModel
from .step_log import Outcome, StepLog
from .workload import Workload


class Simulator:
    """One run of a workload in one storage format.

    Parameters
    ----------
    workload : Workload
        The requests.
    config : CacheConfig
        Format; only its window and sinks matter here.
    capacity : Capacity
        Pages and window slots of the run.
    cost : CostModel
        Advances the clock.
    options : BatchingOptions
        How steps are put together.

    Attributes
    ----------
    tables : PageTables
        The control plane; empty again after ``run``.
    """

    def __init__(
        self,
        workload: Workload,
        config: CacheConfig,
        capacity: Capacity,
        cost: CostModel,
        options: BatchingOptions | None = None,
    ) -> None:
        self._options = options or BatchingOptions()
        self._cost = cost
        self._page_size = capacity.page_size
        window = config.window_tokens if capacity.num_window_slots else 0
        self.tables = PageTables(
            page_size=capacity.page_size,
            num_pages=capacity.num_pages,
            window_tokens=window,
            num_sinks=config.num_sinks if window else 0,
            num_window_slots=capacity.num_window_slots,
        )
        self._max_running = self._options.max_running
        if window:
            self._max_running = min(self._max_running, capacity.num_window_slots)
        self._watermark = int(self._options.watermark * capacity.usable_pages)
        # Plain lists: single numbers are read from them.
        self._arrival: list[float] = workload.arrival.tolist()
        self._prompt: list[int] = workload.prompt_tokens.tolist()
        self._output: list[int] = workload.output_tokens.tolist()
        num = len(workload)
        self._fits = -(-(workload.final_tokens - 1) // self._page_size) <= capacity.usable_pages
        self._next = 0
        self._preempted: list[int] = []
        self._prefill: Prefill | None = None
        self._batch = DecodeBatch(self._page_size)
        self._clock = 0.0
        self._num_done = 0
        self._log = StepLog()
        self._generated = np.zeros(num, np.int64)
        self._first_token = np.full(num, np.nan)
        self._finish = np.full(num, np.nan)
        self._preemptions = np.zeros(num, np.int64)

    def run(self, progress: Callable[[int], object] | None = None) -> Outcome:
        """Serve every request and return what happened.

        Parameters
        ----------
        progress : callable, optional
            Called now and then with the number of requests served or rejected so far.
        """
        calls = 0
        while self._skip_to_work():
            self._step()
            calls += 1
            if progress is not None and calls % 512 == 0:
                progress(self._num_done)
        if progress is not None:
            progress(self._num_done)
        return Outcome(
            self._log,
            self._generated,
            self._first_token,
            self._finish,
            self._preemptions,
            np.flatnonzero(~self._fits),
        )

    def _skip_to_work(self) -> bool:
        """Pass idle time; return whether anything is left to do."""
        if self._batch.size or self._prefill is not None or self._preempted:
            return True
        request = self._head()
        if request is None:
            return False
        self._clock = max(self._clock, self._arrival[request])
        return True

    def _head(self) -> int | None:
        """Return the oldest request that is not running, arrived or not."""
        if self._preempted:
            return self._preempted[-1]
        while self._next < len(self._arrival) and not self._fits[self._next]:
            self._next += 1
            self._num_done += 1
        return self._next if self._next < len(self._arrival) else None

    def _step(self) -> None:
        preempted = self._make_room()
        chunks = [] if preempted else self._plan_prefill()
        head = self._head()
        waiting = head is not None and self._arrival[head] <= self._clock
        if chunks or preempted or self._prefill is not None or not self._batch.size:
            self._mixed_step(chunks, waiting)
        else:
            limit = None if waiting or head is None else self._arrival[head]
            self._decode_steps(limit, waiting)

    def _make_room(self) -> bool:
        """Preempt until every decoding sequence can store its next token."""
        preempted = False
        while self._batch.pages_for_next() > self.tables.pool.num_free:
            preempted = True
            self._preempt_youngest()
        return preempted

    def _preempt_youngest(self) -> None:
        if self._prefill is not None:
            request, seq_id = self._prefill.request, self._prefill.seq_id
            self._prefill = None
        else:
            request, seq_id, left = self._batch.pop()
            self._generated[request] = self._output[request] - left
        self.tables.close([seq_id])
        self._preempted.append(request)
        self._preemptions[request] += 1

    def _plan_prefill(self) -> list[tuple[Prefill, int]]:
        """Choose chunks for what decoding leaves of the step's tokens and pages, admitting."""
        page_size = self._page_size
        free = self.tables.pool.num_free - self._batch.pages_for_next()
        tokens = self._options.step_tokens - self._batch.size
        running = self._batch.size + (self._prefill is not None)
        chunks: list[tuple[Prefill, int]] = []
        prefill = self._prefill
        while tokens > 0:
            if prefill is None:
                prefill = self._admit(tokens, free, running)
                if prefill is None:
                    break
                running += 1
            slack = -prefill.done % page_size
            chunk = min(prefill.target - prefill.done, tokens, slack + free * page_size)
            if chunk <= 0:
                break
            chunks.append((prefill, chunk))
            tokens -= chunk
            free -= -(-(chunk - slack) // page_size)
            if prefill.done + chunk < prefill.target:
                break
            prefill = None
        self._prefill = prefill
        return chunks

    def _admit(self, tokens: int, free: int, running: int) -> Prefill | None:
        request = self._head()
        if request is None or self._arrival[request] > self._clock or running >= self._max_running:
            return None
        target = self._prompt[request] + int(self._generated[request])
        must_fit = target if self._options.admission == "prompt" else min(target, tokens)
        reserve = self._watermark if running else 0
        if -(-must_fit // self._page_size) + reserve > free:
            return None
        if self._preempted:
            self._preempted.pop()
        else:
            self._next += 1
        return Prefill(request, self.tables.open(), target)

    def _mixed_step(self, chunks: list[tuple[Prefill, int]], waiting: bool) -> None:
        """Take one step: with prefill chunks, after a preemption, or beside a stalled prefill."""
        batch, cost = self._batch, self._cost
        seqs, new = batch.with_chunks(chunks)
        self.tables.commit(self.tables.reserve(seqs, new))
        batch.advance(1)
        tokens = read = pairs = int(batch.length.sum())
        exact = int(cost.exact_part(batch.length).sum())
        running, prefilled = batch.size + len(chunks), 0
        for prefill, n in chunks:
            read += prefill.done
            exact += min(prefill.done, cost.exact_tokens)
            pairs += n * prefill.done + n * (n + 1) // 2
            prefilled += n
            prefill.done += n
            tokens += prefill.done
        if self._prefill is not None and not chunks:
            running += 1
            tokens += self._prefill.done
        new_tokens = np.int64(batch.size + prefilled)
        seconds = float(
            cost.step_seconds(new_tokens, np.int64(read), np.int64(exact), np.int64(pairs))
        )
        self._clock += seconds
        used = self.tables.pool.num_used
        counts = (running, tokens, used, prefilled, batch.size, int(waiting))
        self._log.append(self._clock, seconds, counts)
        self._retire()
        for prefill, _ in chunks:
            if prefill.done == prefill.target:
                self._start_decoding(prefill)

    def _decode_steps(self, next_arrival: float | None, waiting: bool) -> None:
        """Take as many steps at once as nothing but decoding can happen in.

        That is until a sequence completes, pages run out, or (if nobody waits yet) a request
        arrives. A request that waits already cannot be admitted before: pages only get fewer.
        """
        batch, pool = self._batch, self.tables.pool
        limit = int(batch.left.min()) if self._options.fast_forward else 1
        taken = batch.pages_taken(limit)
        k = int(np.searchsorted(taken, pool.num_free, side="right"))
        steps = np.arange(1, k + 1)
        tokens = int(batch.length.sum()) + batch.size * steps
        exact = batch.exact_after(steps, self._cost.exact_tokens)
        seconds = self._cost.step_seconds(np.full(k, batch.size), tokens, exact, tokens)
        # accumulate adds one after the other, exactly as single steps would.
        ends = np.add.accumulate(np.append(self._clock, seconds))[1:]
        if next_arrival is not None:
            k = min(k, int(np.searchsorted(ends, next_arrival)) + 1)
        used = pool.num_used + taken
        self.tables.commit(self.tables.reserve(batch.seqs, np.full(batch.size, k)))
        batch.advance(k)
        self._clock = float(ends[k - 1])
        counts = (batch.size, tokens[:k], used[:k], 0, batch.size, int(waiting))
        self._log.extend(ends[:k], seconds[:k], counts)
        self._retire()

    def _start_decoding(self, prefill: Prefill) -> None:
        """Sample a token from a finished prefill."""
        request = prefill.request
        if np.isnan(self._first_token[request]):
            self._first_token[request] = self._clock
        left = self._output[request] - int(self._generated[request]) - 1
        self._batch.push(request, prefill.seq_id, prefill.target, left)
        if left == 0:
            self._retire()

    def _retire(self) -> None:
        """Close the sequences that are complete."""
        ids, seqs = self._batch.take_complete()
        if ids.size:
            self.tables.close(seqs)
            self._generated[ids] = np.array([self._output[i] for i in ids])
            self._finish[ids] = self._clock
            self._num_done += ids.size
