"""Swaps of the scheduler: begun, copied, and ended when their bytes are there.

Without ``start_swap`` a swap is over when `schedule` returns: a cache copies at once, the engine of
bare tables before it computes the step. With it, copies overlap steps::

    leaving     keeps its pages until the copy is done; in no step meanwhile, and before all that
                waits behind it
    returning   has its pages from the beginning, and decodes from the step after the copy

Whoever copies reports it, from any thread (`swap_done`, `swap_failed`); the next `schedule` ends
the swap. What a swap gives back is not there before, so a sequence that needs a page for its next
token sits the step out (`Preempting._hold_back`) if the page is on its way.
"""

from __future__ import annotations

from ..errors import StepError
from ..paging.arguments import Int64, instance
from ..paging.page_tables import PageTables
from ..paging.swap_plan import SwapPlan
from .jobs import Entry, Job, Move, Outcome
from .running_batch import FIELDS
from .state import SchedulerState


class Moving(SchedulerState):
    """Sequences under way between device and host."""

    def swap_done(self, plan: SwapPlan) -> None:
        """Report that the copy of a swap is made; any thread may, at any time.

        Raises
        ------
        StepError
            If the swap is not under way here.
        """
        self._report(plan, "done")

    def swap_failed(self, plan: SwapPlan) -> None:
        """Report that the copy of a swap failed: its sequences are computed again.

        Raises
        ------
        StepError
            If the swap is not under way here.
        """
        self._report(plan, "failed")

    def swap_bytes(self, plan: SwapPlan) -> int:
        """Return the bytes that a swap copies: its pages, and exact windows as if they were full.

        Without a cache, those of ``page_bytes`` and ``window_slot_bytes``.
        """
        instance("plan", plan, SwapPlan)
        return plan.pages.size * self._page_bytes + plan.window_slots.size * self._slot_bytes

    def _report(self, plan: SwapPlan, outcome: Outcome) -> None:
        if self._start_swap is None or id(plan) not in self._moves:
            raise StepError(
                "no such swap is under way: expected a plan that start_swap was given, once"
            )
        self._ended.append((plan, outcome))

    def _start(self, move: Move) -> None:
        """Have the bytes of a swap copied that was begun."""
        plan = move.plan
        self._moves[id(plan)] = move
        try:
            if self._start_swap is not None:
                self._start_swap(plan)
                return
            if isinstance(self._cache, PageTables):
                self._swaps.append(plan)
            else:
                self._cache.copy_swap(plan)
        except BaseException:
            self._ended.append((plan, "failed"))
            raise
        self._ended.append((plan, "done"))
        self._settle()

    def _cancel(self, move: Move) -> None:
        """Give up a swap that was begun in vain; what it was to move waits on."""
        self._moves[id(move.plan)] = move
        self._ended.append((move.plan, "cancelled"))
        self._settle()

    def _settle(self) -> None:
        """End the swaps whose copies are reported."""
        while self._ended:
            plan, outcome = self._ended[0]
            move = self._moves.get(id(plan))
            # It may have been reported twice.
            if move is not None:
                self._end(move, "dropped" if move.dropped else outcome)
            self._ended.popleft()

    def _end(self, move: Move, outcome: Outcome) -> None:
        plan, entry, parked = move.plan, move.entry, move.parked
        if outcome != "done":
            failed = outcome == "failed"
            again = self._to_recompute(entry.job, parked.fields) if failed else entry
            self._cache.abort_swap(plan)
            del self._moves[id(plan)]
            if outcome == "cancelled":
                self._waiting.push(entry)
                return
            self._closing += plan.seq_ids.tolist()
            if failed:
                self._queue_again(entry.job, again, parked.fields)
            self._close_rest()
            return
        self._batch.reserve(parked.last.size)
        self._cache.commit_swap(plan)
        del self._moves[id(plan)]
        if plan.direction == "out":
            self._waiting.push(entry)
            self.stats.swapped += parked.last.size
            self.stats.swapped_out_pages += plan.pages.size
        else:
            self._batch.extend(parked.fields, parked.last)
            self._forked |= parked.last.size > 1
            self.stats.swapped_in_pages += plan.pages.size

    # -- computing again ---------------------------------------------------------------------

    def _to_recompute(self, job: Job, fields: Int64) -> Entry:
        """Return what waits instead of decoding sequences of a request; changes nothing."""
        if job.request.beam_width:
            # Hypotheses that went on from each other are not known by their tokens alone: the
            # search begins again.
            return Entry(job, chain=job.chain)
        of = dict(zip(FIELDS, fields[:, 0].tolist(), strict=True))
        outputs, chain = None, job.chain
        if self._track_tokens:
            outputs = self._token_rows.read(of["token_rows"], of["generated"])
            if chain is not None and not chain.opaque:
                chain = self.tables.lengthened(chain, outputs)
        return Entry(job, of["track"], of["generated"], outputs, chain)

    def _queue_again(self, job: Job, entry: Entry, fields: Int64) -> None:
        """Let sequences wait that are no longer in the batch."""
        if job.request.beam_width:
            job.completions.clear()
        if self._track_tokens:
            self._token_rows.give_back(fields[FIELDS.index("token_rows")])
        self._waiting.push(entry)

    @property
    def num_idle_tokens(self) -> int:
        """Tokens of sequences that have pages on the device and no part in the open step.

        They are held back, or their bytes are on the way.
        """
        length = FIELDS.index("length")
        idle = [fields for fields, _ in self._held]
        idle += [move.parked.fields for move in self._moves.values()]
        return sum(int(fields[length].sum()) for fields in idle)
