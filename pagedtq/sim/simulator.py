"""A workload served by the reference scheduler, on a clock that a cost model advances.

Every page and window slot is taken and given back by the real control plane; only the bytes, and
the time they take, are imagined. Who runs when is `pagedtq.serving.Scheduler`'s business.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..config import CacheConfig
from ..errors import RequestTooLarge
from ..paging.block_chain import SharingOptions
from ..paging.page_tables import PageTables
from ..paging.swap_plan import SwapPlan
from ..serving.generation import GenerationRequest, ScheduledStep, SchedulerOptions, StepOutput
from ..serving.scheduler import Scheduler
from ..sizing import Capacity
from .cost_model import CostModel
from .host_link import HostLink
from .step_log import Outcome, StepLog
from .workload import Float64, Int64, Workload


class DecodeRun(NamedTuple):
    """Decode steps that are taken as one: a number per step."""

    ends: Float64
    seconds: Float64
    tokens: Int64
    used: Int64


class Simulator:
    """One run of a workload in one storage format.

    Parameters
    ----------
    workload : Workload
        The requests. Those with ``hash_ids`` share pages between prompts that begin alike.
    config : CacheConfig
        Format; only its window and sinks matter here.
    capacity : Capacity
        Pages and window slots of the run.
    cost : CostModel
        Advances the clock.
    options : SchedulerOptions, optional
        How steps are put together.
    num_host_pages : int
        Pages of the host, for preemption by swap.
    overlap_swaps : bool
        Let copies of swaps run while other sequences step; else every step waits for its copies.
    fast_forward : bool
        Take runs of steps in which only decoding can happen at once. Never changes a result.

    Attributes
    ----------
    tables : PageTables
        The control plane; without an owner of a page again after ``run``.
    scheduler : Scheduler
        Who runs when.
    """

    def __init__(
        self,
        workload: Workload,
        config: CacheConfig,
        capacity: Capacity,
        cost: CostModel,
        options: SchedulerOptions | None = None,
        *,
        num_host_pages: int = 0,
        overlap_swaps: bool = True,
        fast_forward: bool = True,
    ) -> None:
        window = config.window_tokens if capacity.num_window_slots else 0
        self.tables = PageTables(
            page_size=capacity.page_size,
            num_pages=capacity.num_pages,
            window_tokens=window,
            num_sinks=config.num_sinks if window else 0,
            num_window_slots=capacity.num_window_slots,
            sharing=None if workload.hash_ids is None else SharingOptions(),
            num_host_pages=num_host_pages,
        )
        self.scheduler = Scheduler(
            self.tables,
            options,
            track_tokens=False,
            costs=cost.preemption_costs(),
            page_bytes=capacity.page_bytes,
            window_slot_bytes=capacity.window_slot_bytes,
            start_swap=self._begin_copy if overlap_swaps else None,
        )
        self._link = HostLink(cost.link_bandwidth)
        self._workload, self._cost = workload, cost
        self._choose_steps = self._decode_run if fast_forward else None
        # Plain lists: single numbers are read from them.
        self._arrival: list[float] = workload.arrival.tolist()
        self._prompt: list[int] = workload.prompt_tokens.tolist()
        self._output: list[int] = workload.output_tokens.tolist()
        self._next = 0
        self._clock = 0.0
        self._num_done = 0
        self._run: DecodeRun | None = None
        self._rejected: list[int] = []
        num = len(workload)
        self._log = StepLog()
        self._generated = np.zeros(num, np.int64)
        self._first_token = np.full(num, np.nan)
        self._finish = np.full(num, np.nan)
        self._preemptions = np.zeros(num, np.int64)
        self._found = np.zeros(num, np.int64)

    def run(self, progress: Callable[[int], object] | None = None) -> Outcome:
        """Serve every request and return what happened.

        Parameters
        ----------
        progress : callable, optional
            Called now and then with the number of requests served or rejected so far.
        """
        calls = 0
        while self._add_arrivals():
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
            np.array(self._rejected, np.int64),
            self._found,
            self._link.totals(self.scheduler.stats.swapped),
        )

    def _add_arrivals(self) -> bool:
        """Hand over what has arrived, passing idle time; return whether anything is to be done."""
        scheduler, arrival = self.scheduler, self._arrival
        while self._next < len(arrival):
            if not scheduler.has_work:
                self._clock = max(self._clock, arrival[self._next])
            if arrival[self._next] > self._clock:
                break
            self._add(self._next)
            self._next += 1
        return scheduler.has_work

    def _add(self, index: int) -> None:
        request = GenerationRequest(
            request_id=str(index),
            prompt=self._prompt[index],
            max_tokens=self._output[index],
            block_keys=self._workload.block_keys(index, self.tables.page_size),
        )
        try:
            self.scheduler.add(request)
        except RequestTooLarge:
            self._rejected.append(index)
            self._num_done += 1

    def _begin_copy(self, plan: SwapPlan) -> None:
        self._link.begin(plan, self.scheduler.swap_bytes(plan), self._clock)

    def _step(self) -> None:
        for plan in self._link.take_done(self._clock):
            self.scheduler.swap_done(plan)
        step = self.scheduler.schedule(self._choose_steps)
        if step is None:
            self._wait_for_copies()
            return
        run, self._run = self._run, None
        if run is None:
            self._single_step(step)
        else:
            self._many_steps(step, run)
        self._note(self.scheduler.update())

    def _wait_for_copies(self) -> None:
        """Let time pass until a copy is done, or a request arrives that may run meanwhile."""
        until = self._link.next_done()
        if self._next < len(self._arrival):
            until = min(until, self._arrival[self._next])
        # The pool is nobody else's, and what cannot run alone was rejected.
        assert until < float("inf")
        self._link.wait_seconds += until - self._clock
        self._clock = until

    def _single_step(self, step: ScheduledStep) -> None:
        """Advance the clock by a step of any kind."""
        cost, n = self._cost, step.num_decoding
        before, after = step.plan.old.length, step.plan.new.length
        decoded = tokens = read = pairs = int(after[:n].sum())
        exact = int(cost.exact_part(after[:n]).sum())
        prefilled = 0
        if step.chunks:
            prefix, new = before[n:], step.plan.num_new[n:]
            prefilled = int(new.sum())
            read += int(prefix.sum())
            exact += int(cost.exact_part(prefix).sum())
            pairs += int((new * prefix + new * (new + 1) // 2).sum())
        # Prompts in prefill, those that are stuck included, as long as before plus the new tokens.
        tokens = decoded + self.scheduler.num_prefill_tokens + prefilled
        tokens += self.scheduler.num_idle_tokens
        seconds = float(cost.step_seconds(n + prefilled, read, exact, pairs))
        for plan in step.swaps:
            seconds += self._link.copy(plan, self.scheduler.swap_bytes(plan))
        self._clock += seconds
        running, used = self.scheduler.num_running, self.tables.pool.num_used
        waiting = int(self.scheduler.num_waiting > 0)
        self._log.append(self._clock, seconds, (running, tokens, used, prefilled, n, waiting))

    def _decode_run(self, most: int) -> int:
        """Choose how many decode steps to take as one: until a request arrives, if none waits."""
        scheduler, cost = self.scheduler, self._cost
        lengths = scheduler.lengths
        steps = np.arange(1, most + 1)
        tokens = int(lengths.sum()) + lengths.size * steps
        exact = exact_after(lengths, steps, cost.exact_tokens)
        seconds = cost.step_seconds(np.full(most, lengths.size), tokens, exact, tokens)
        # accumulate adds one after the other, exactly as single steps would.
        ends = np.add.accumulate(np.append(self._clock, seconds))[1:]
        # A request that waits already cannot be admitted before: pages only get fewer.
        if not scheduler.num_waiting and self._next < len(self._arrival):
            most = min(most, int(np.searchsorted(ends, self._arrival[self._next])) + 1)
        used = self.tables.pool.num_used + scheduler.pages_ahead(most)
        self._run = DecodeRun(ends[:most], seconds[:most], tokens[:most], used)
        return most

    def _many_steps(self, step: ScheduledStep, run: DecodeRun) -> None:
        self._clock = float(run.ends[-1])
        n, waiting = step.num_decoding, int(self.scheduler.num_waiting > 0)
        self._log.extend(run.ends, run.seconds, (n, run.tokens, run.used, 0, n, waiting))

    def _note(self, output: StepOutput) -> None:
        for name in output.started:
            self._first_token[int(name)] = self._clock
        for request in output.finished:
            index = int(request.request_id)
            self._generated[index] = request.completions[0].num_tokens
            self._finish[index] = self._clock
            self._preemptions[index] = request.num_preemptions
            self._found[index] = request.num_found_tokens
            self._num_done += 1


def exact_after(lengths: Int64, steps: Int64, limit: int) -> Int64:
    """Return the sum of ``min(length, limit)`` after each number of steps."""
    short = lengths[lengths < limit]
    exact = np.full(steps.size, (lengths.size - short.size) * limit)
    if short.size:
        exact += np.minimum(short[:, None] + steps, limit).sum(axis=0)
    return exact
