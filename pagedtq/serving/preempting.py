"""What runs, and who gives way when pages are short."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArgumentError, OutOfHostPages, OutOfWindowSlots
from ..paging.arguments import Bools, Int32
from ..paging.layout import PageLayout
from ..paging.page_tables import PageTables
from ..paging.swap_plan import SwapPlan
from .generation import Completion, Reason, SchedulerOptions, SchedulerStats
from .jobs import Entry, Job, Parked, Prefill, WaitingQueue
from .preemption import PreemptionCosts, choose_preemption
from .running_batch import RunningBatch, TokenRows

if TYPE_CHECKING:
    from ..cache import PagedKVCache


class Preempting:
    """State of the scheduler, and the decisions of a step.

    Parameters
    ----------
    cache : PageTables or PagedKVCache
        What gives the pages; a cache also has their bytes written by the engine.
    options : SchedulerOptions, optional
        How steps are put together.
    track_tokens : bool
        Whether the engine tells which tokens it samples.
    costs : PreemptionCosts, optional
        What the machine takes to move bytes and to compute tokens, for ``preemption="auto"``.
    page_bytes : int, optional
        Bytes of a page; a cache knows its own.
    """

    def __init__(
        self,
        cache: PageTables | PagedKVCache,
        options: SchedulerOptions | None = None,
        *,
        track_tokens: bool = True,
        costs: PreemptionCosts | None = None,
        page_bytes: int | None = None,
    ) -> None:
        self._cache = cache
        self.tables: PageTables = cache if isinstance(cache, PageTables) else cache.tables
        if self.tables.sharing is not None and not self.tables.sharing.leave_last:
            raise ArgumentError(
                "a scheduler samples from the last token of a prompt, so that it must be computed: "
                "use SharingOptions(leave_last=True)"
            )
        self.options = options or SchedulerOptions()
        if page_bytes is None and not isinstance(cache, PageTables):
            page_bytes = PageLayout(cache.config).page_bytes
        if self.options.preemption == "auto" and (costs is None or not page_bytes):
            raise ArgumentError(
                'preemption="auto" compares costs: pass costs=PreemptionCosts(...) and, without a '
                "PagedKVCache, page_bytes"
            )
        self._costs, self._page_bytes = costs, page_bytes or 0
        self.stats = SchedulerStats()
        self._track_tokens = track_tokens
        self._size = self.tables.page_size
        self._usable = self.tables.pool.num_pages - 1
        self._watermark = int(self.options.watermark * self._usable)
        self._most_running = min(self.options.max_running, self.options.step_tokens)
        if self.tables.window_tokens:
            self._most_running = min(self._most_running, self.tables.windows.num_slots)
        self._waiting = WaitingQueue()
        self._prefills: list[Prefill] = []
        self._batch = RunningBatch(self._size)
        self._token_rows = TokenRows()
        self._jobs: dict[int, Job] = {}
        self._numbers: dict[str, int] = {}
        # Pages that admitted requests may come to hold; kept for admission "whole".
        self._committed = 0
        # Swaps of foreign bytes that the next step tells the engine to make.
        self._swaps: list[SwapPlan] = []
        # Whether sequences were forked since the last step: then the next one may copy pages.
        self._forked = False

    @property
    def num_running(self) -> int:
        """Sequences that hold pages, those to be forked from a prompt in prefill included."""
        return self._batch.size + sum(prefill.entry.width for prefill in self._prefills)

    # -- preemption --------------------------------------------------------------------------

    def _make_room(self) -> list[str]:
        """Preempt until the rest can advance; return the names of the requests concerned."""
        preempted = []
        while self._lacks_room():
            preempted.append(self._preempt_hindmost())
        return preempted

    def _next_pages(self) -> int:
        """Return the pages that decoding sequences take in the next step."""
        if self._forked:
            return self.tables.pages_needed(self._batch.seqs, 1)
        return self._batch.pages_for_next()

    def _lacks_room(self) -> bool:
        if not self._batch.size:
            return False
        spare = self.tables.pool.num_free - self._next_pages()
        if spare or not self._prefills:
            return spare < 0
        first = self._prefills[0]
        stuck = first.done % self._size == 0
        return stuck and self._place_of(self._batch.hindmost()) > first.entry.place

    def _place_of(self, at: int) -> tuple[int, int, int]:
        batch = self._batch
        return int(batch.priority[at]), int(batch.number[at]), int(batch.track[at])

    def _preempt_hindmost(self) -> str:
        at = self._batch.hindmost()
        prefill = max(self._prefills, key=lambda prefill: prefill.entry.place, default=None)
        if prefill is not None and prefill.entry.place > self._place_of(at):
            self._prefills.remove(prefill)
            self._cache.close([prefill.seq_id])
            job, count = prefill.entry.job, 1
            self._waiting.push(prefill.entry)
        else:
            job = self._jobs[int(self._batch.number[at])]
            gone = self._rows_of(job) if job.request.beam_width else self._row(at)
            count = int(np.count_nonzero(gone))
            self._set_aside(job, gone)
        job.num_preemptions += count
        self.stats.preempted += count
        return job.request.request_id

    def _set_aside(self, job: Job, gone: Bools) -> None:
        """Take the pages of decoding sequences of a request."""
        batch = self._batch
        if self.options.preemption != "recompute" and self._swap_out(job, gone):
            return
        if job.request.beam_width:
            # Hypotheses that went on from each other are not known by their tokens alone: the
            # search begins again.
            job.completions.clear()
            self._waiting.push(Entry(job, chain=job.chain))
        else:
            (at,) = np.flatnonzero(gone).tolist()
            generated, outputs, chain = int(batch.generated[at]), None, job.chain
            if self._track_tokens:
                outputs = self._token_rows.read(int(batch.token_rows[at]), generated)
                if chain is not None and not chain.opaque:
                    chain = self.tables.lengthened(chain, outputs)
            self._waiting.push(Entry(job, int(batch.track[at]), generated, outputs, chain))
        self._release(gone)

    def _swap_out(self, job: Job, gone: Bools) -> bool:
        """Move decoding sequences of a request to the host, if it has room and that costs less."""
        batch, tables = self._batch, self.tables
        seqs = batch.seqs[gone]
        pages = np.unique(tables.block_table(seqs))
        pages = pages[pages > 0]
        if self.options.preemption == "auto" and not self._swap_is_cheaper(gone, pages):
            return False
        following = int(batch.length[gone][0] % self._size == 0)
        if seqs.size > 1:
            following = tables.pages_needed(seqs, 1)
        try:
            plan = self._cache.begin_swap_out(seqs)
        except (OutOfHostPages, OutOfWindowSlots):
            return False
        self._move(plan)
        track = -1 if job.request.beam_width else int(batch.track[gone][0])
        fields, last = batch.take_out(gone)
        parked = Parked(fields, last, pages.size, following)
        self._waiting.push(Entry(job, track, parked=parked))
        self.stats.swapped += last.size
        return True

    def _swap_is_cheaper(self, gone: Bools, pages: Int32) -> bool:
        assert self._costs is not None
        batch, pool = self._batch, self.tables.pool
        # A search is computed again from its prompt on, and all its steps after it.
        tokens = int(batch.length[gone][0] + batch.generated[gone][1:].sum())
        elsewhere = pool.ref_counts[pages] > np.count_nonzero(gone)
        found = 0
        if self.tables.prefix is not None:
            found = int(np.count_nonzero(elsewhere & self.tables.prefix.held[pages])) * self._size
        choice = choose_preemption(
            self._costs,
            tokens,
            pages.size * self._page_bytes,
            num_found=min(found, tokens),
            num_bytes_shared=int(np.count_nonzero(elsewhere)) * self._page_bytes,
        )
        return choice == "swap"

    def _move(self, plan: SwapPlan) -> None:
        """Have the bytes of a swap copied, and end it."""
        if isinstance(self._cache, PageTables):
            self._swaps.append(plan)
        else:
            self._cache.copy_swap(plan)
        self._cache.commit_swap(plan)

    def _release(self, gone: Bools) -> None:
        """Close decoding sequences."""
        batch = self._batch
        self._cache.close(batch.seqs[gone])
        if self._track_tokens:
            self._token_rows.give_back(batch.token_rows[gone])
        batch.remove(gone)

    def _row(self, at: int) -> Bools:
        chosen = np.zeros(self._batch.size, np.bool_)
        chosen[at] = True
        return chosen

    def _rows_of(self, job: Job) -> Bools:
        chosen: Bools = self._batch.number == job.number
        return chosen

    def _complete(self, at: int, reason: Reason) -> Job:
        """Note that a decoding sequence is done; return its request."""
        batch = self._batch
        job = self._jobs[int(batch.number[at])]
        track, row = int(batch.track[at]), int(batch.token_rows[at])
        self._note_completion(job, track, int(batch.generated[at]), row, reason)
        return job

    def _note_completion(
        self, job: Job, track: int, generated: int, token_row: int, reason: Reason
    ) -> None:
        tokens = self._token_rows.read(token_row, generated) if self._track_tokens else None
        index = len(job.completions) if job.request.beam_width else track
        job.completions.append(Completion(index, generated, tokens, reason))
