"""A reference scheduler: continuous batching over page tables, one vectorised step at a time.

The engine's loop::

    scheduler.add(request)
    while scheduler.has_work:
        step = scheduler.schedule()          # pages are taken: where every token goes
        ...                                  # compute, and sample once per step.sample_members
        output = scheduler.update(tokens)    # stored for good; who is done

A sequence of ``p`` prompt and ``o`` output tokens stores ``p + o - 1``: the prompt's last token
samples the first output token, each decode step stores the token sampled last, and the very last
one is never stored. Who runs is decided in `planning`, how sequences move to the host and back in
`moving`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    StepError,
)
from ..paging.arguments import MAX_TOKENS, Int32, Int64, integer
from ..paging.block_chain import Tokens
from ..paging.exclusive import exclusive
from ..paging.page_tables import PageTables
from ..paging.step_plan import StepPlan
from .continuation import Continuation
from .generation import (
    FinishedRequest,
    ScheduledStep,
    StepOutput,
)
from .jobs import Prefill


class Scheduler(Continuation):
    """Serves requests in steps; see the module.

    Parameters
    ----------
    cache : PageTables or PagedKVCache
        What gives the pages. Sequences that others open there only make it fuller.
    options : SchedulerOptions, optional
        How steps are put together.
    track_tokens : bool
        Whether `update` is given the tokens sampled. Without them only lengths are scheduled, as a
        simulation does: nothing stops early, and generated tokens are not shared.
    costs : PreemptionCosts, optional
        What the machine takes to move bytes and to compute tokens, for ``preemption="auto"``.
    page_bytes, window_slot_bytes : int, optional
        Bytes of a page and of an exact window, for the same; a cache knows its own.
    start_swap : callable, optional
        Given the `SwapPlan` of every swap when it has begun; starts the copy, and returns. Then
        copies overlap steps, and whoever makes them calls `swap_done` or `swap_failed`.

    Attributes
    ----------
    tables : PageTables
        The page tables.
    stats : SchedulerStats
        Counts since the beginning.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If the tables share whole prompts, so that nothing would be left to sample from, costs are
        to be compared and not known, or a parameter is of the wrong type.

    Notes
    -----
    A call that meets another one inside the scheduler, of a second thread, gets a
    ``ConcurrentCallError``, and nothing has changed; only `swap_done` and `swap_failed` may be
    called at any time. A call that fails for another reason (memory, others at work in the tables)
    can be repeated: what it did until then stays, and nothing is lost or told twice.
    """

    # -- looking -----------------------------------------------------------------------------

    @property
    def num_prefill_tokens(self) -> int:
        """Tokens stored by prompts that are not done."""
        return sum(prefill.done for prefill in self._prefills)

    @property
    def lengths(self) -> Int64:
        """Tokens stored by each decoding sequence, ``int64[n]``; not to be written.

        Without those that sit the open step out.
        """
        return self._batch.length

    def pages_ahead(self, num_steps: int) -> Int64:
        """Return the pages that decoding takes in all after each of the next steps."""
        num_steps = integer("num_steps", num_steps, 0, MAX_TOKENS)
        if self._ahead is not None and num_steps <= self._ahead.size:
            return self._ahead[:num_steps]
        return self._batch.pages_taken(num_steps)

    def members(self, step: ScheduledStep) -> list[str]:
        """Return the request of each member of the open step."""
        self._opened("members")
        jobs = self._jobs
        decoding = [jobs[number].request.request_id for number in self._batch.number.tolist()]
        return decoding + [name for name, _, _ in step.chunks]

    def counters(self) -> Mapping[str, int]:
        """Return what only grows under its names as a metric, for a `PrometheusCollector`."""
        stats = self.stats
        return {
            "prompt_tokens": stats.prompt_tokens,
            "prompt_tokens_found": stats.found_tokens,
            "preemptions": stats.preempted,
            "swapped_out_pages": stats.swapped_out_pages,
            "swapped_in_pages": stats.swapped_in_pages,
        }

    # -- steps -------------------------------------------------------------------------------

    @exclusive
    def schedule(self, choose_steps: Callable[[int], int] | None = None) -> ScheduledStep | None:
        """Open the next step: decide who runs, and take the pages.

        Parameters
        ----------
        choose_steps : callable, optional
            Called when several decode steps in a row would have the same members: given how many,
            it returns how many to take as one. Only without ``track_tokens``.

        Returns
        -------
        ScheduledStep or None
            None if nothing can run now: nothing waits, copies of swaps are to end first, or others
            hold the pages.

        Raises
        ------
        StepError
            If a step is open.
        ArgumentError, ArgumentTypeError
            If ``choose_steps`` cannot be called, or returns no number that was allowed.
        ConcurrentCallError
            If another call is at work in the scheduler or in the tables.
        """
        if choose_steps is not None and not callable(choose_steps):
            raise ArgumentTypeError(
                f"choose_steps must be callable, got {type(choose_steps).__name__}"
            )
        if self._open is not None or self.tables.has_open_step:
            raise StepError("schedule must wait: a step is open, update or abort it first")
        self._close_rest()
        if self.tables.fences.num_open:
            self.tables.fences.poll()
        self._settle()
        try:
            step = self._next_step(choose_steps)
        except BaseException:
            self._take_back()
            raise
        if step is None:
            self._take_back()
        return step

    def _next_step(self, choose_steps: Callable[[int], int] | None) -> ScheduledStep | None:
        preempted = self._make_room()
        self._preempted += preempted
        chunks = self._plan_chunks(admit=not (preempted or self._held))
        batch = self._batch
        if not batch.size and not chunks:
            return None
        steps = 1
        steady = not (self._preempted or self._prefills or self._forked)
        if choose_steps is not None and steady and not (self._held or self._moves or self._swaps):
            steps = self._choose(choose_steps)
        size, samples = batch.size, np.arange(batch.size)
        seqs: Int64 = batch.seqs
        new: Int64 | int = steps
        told: list[tuple[str, int, bool]] = []
        if chunks:
            members = size + len(chunks)
            seqs, new = np.empty(members, np.int64), np.ones(members, np.int64)
            seqs[:size] = batch.seqs
            seqs[size:] = [prefill.seq_id for prefill, _ in chunks]
            new[size:] = [count for _, count in chunks]
            sampling: list[int] = []
            for at, (prefill, count) in enumerate(chunks, size):
                ends = prefill.done + count == prefill.entry.target
                told.append((prefill.entry.job.request.request_id, count, ends))
                if ends:
                    sampling += [at] * prefill.entry.width
            if sampling:
                samples = np.concatenate((samples, np.array(sampling)))
        tokens = self._tokens_of(chunks) if self._track_tokens else None
        plan = self._begin(seqs, new, tokens)
        self._chunks = chunks
        self._open = ScheduledStep(
            plan, batch.size, told, samples, tokens, self._preempted, steps, self._swaps
        )
        self._preempted, self._swaps = [], []
        return self._open

    def _choose(self, choose_steps: Callable[[int], int]) -> int:
        if self._track_tokens:
            raise StepError("steps can be taken as one only without track_tokens")
        limit = int(self._batch.left.min())
        taken = self._batch.pages_taken(limit)
        most = int(taken.searchsorted(self.tables.pool.num_free, side="right"))
        self._ahead = taken
        try:
            steps = choose_steps(most)
        finally:
            self._ahead = None
        steps = integer("the steps chosen", steps, -MAX_TOKENS, MAX_TOKENS)
        if not 1 <= steps <= most:
            raise ArgumentError(f"expected to take 1 to {most} steps as one, got {steps}")
        return steps

    def _tokens_of(self, chunks: list[tuple[Prefill, int]]) -> Int32:
        """Return the tokens a step computes, member after member; zeros for unknown ones."""
        last = self._batch.last.copy()
        if not chunks:
            return last
        parts = [last]
        for prefill, count in chunks:
            entry, start = prefill.entry, prefill.done
            whole = np.zeros(entry.target, np.int32)
            if entry.job.tokens is not None:
                whole[: entry.job.num_prompt] = entry.job.tokens
            if entry.outputs is not None:
                whole[entry.job.num_prompt :] = entry.outputs
            parts.append(whole[start : start + count])
        return np.concatenate(parts)

    def _begin(self, seqs: Int64, new: Int64 | int, tokens: Int32 | None) -> StepPlan:
        if isinstance(self._cache, PageTables):
            return self._cache.reserve(seqs, new, tokens)
        return self._cache.begin_step(seqs, new, tokens)

    def _opened(self, verb: str) -> ScheduledStep:
        if self._open is None:
            raise StepError(f"{verb} needs an open step; call schedule first")
        return self._open

    @exclusive
    def abort_step(self) -> list[FinishedRequest]:
        """Give the open step up: its tokens are computed again by a later one.

        Preemptions and admissions stay, and copies that the step told are to be made all the same.
        Returns the requests that were aborted inside the step.

        Raises
        ------
        StepError
            If no step is open, or an `update` failed behind the point where it is stored.
        ConcurrentCallError
            If another call is at work in the scheduler or in the tables.
        """
        step = self._opened("abort_step")
        if self._stored:
            raise StepError("cannot abort_step: its tokens are stored; call update again")
        if isinstance(self._cache, PageTables):
            self._cache.abort(step.plan)
        else:
            self._cache.abort_step()
        self._open = None
        self._forked = bool(self._batch.size)
        self._take_back()
        dropped = [self._drop(name) for name in self._take_aborting()]
        self._try_closing()
        return dropped

    @exclusive
    def update(self, tokens: Tokens | None = None, parents: Any = None) -> StepOutput:
        """End the open step: its tokens are stored, and new ones were sampled.

        Parameters
        ----------
        tokens : int32[m]
            One per entry of ``sample_members``; None without ``track_tokens``.
        parents : int64[m], optional
            For beam search: the member of the step that each token continues, instead of
            ``sample_members``; of the same request. Hypotheses without a child are dropped.

        Raises
        ------
        StepError
            If no step is open (or, of a cache, not all layers are stored).
        ArgumentError, ArgumentTypeError
            If there is not one token per sample, or a parent is of another request. The step stays
            open.
        ConcurrentCallError
            If another call is at work in the scheduler or in the tables. The step stays open.
        """
        step = self._opened("update")
        sampled = self._checked_tokens(step, tokens)
        chosen = None if parents is None else self._checked_parents(step, parents)
        if not self._stored:
            if isinstance(self._cache, PageTables):
                self._cache.commit(step.plan)
            else:
                self._cache.commit()
            self._stored = True
        forks: Iterator[int] = iter(())
        if self._track_tokens or self._chunks or chosen is not None:
            forks = iter(self._prepare(step, chosen))
        # Nothing fails from here on.
        self._open, self._stored, self._forked = None, False, False
        batch = self._batch
        batch.advance(step.num_steps)
        if chosen is not None:
            self._continue_beams(chosen[: batch.size], forks)
        if sampled is not None:
            batch.last[:] = sampled[: batch.size]
            self._token_rows.write(batch.token_rows, batch.generated - 1, batch.last)
        finished = self._retire(0)
        begun, started = batch.size, []
        for prefill, count in self._chunks:
            prefill.done += count
            prefill.begun = True
            if prefill.done == prefill.entry.target:
                if not prefill.entry.job.started:
                    prefill.entry.job.started = True
                    started.append(prefill.entry.job.request.request_id)
                at = step.num_decoding + batch.size - begun
                self._start_decoding(prefill, None if sampled is None else sampled[at:], forks)
        if self._chunks:
            self._prefills = [p for p in self._prefills if p.done < p.entry.target]
            self._chunks = []
            finished += self._retire(begun)
        self._take_back()
        if self._aborting:
            finished += [self._drop(name) for name in self._take_aborting()]
        self._try_closing()
        return StepOutput(finished, started)
