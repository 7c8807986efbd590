"""State of the scheduler, and how sequences leave it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArgumentError, ArgumentTypeError, ConcurrentCallError, StepError
from ..paging.arguments import Bools, Int32, Int64, instance, integer
from ..paging.exclusive import Turn
from ..paging.layout import PageLayout
from ..paging.page_tables import PageTables
from ..paging.swap_plan import SwapPlan
from .generation import Completion, Reason, ScheduledStep, SchedulerOptions, SchedulerStats
from .jobs import Job, Move, Outcome, Prefill, WaitingQueue
from .preemption import PreemptionCosts
from .running_batch import RunningBatch, TokenRows

if TYPE_CHECKING:
    from ..cache import PagedKVCache

#: No page or window has more.
MAX_BYTES = 1 << 62
NO_TOKENS: Int32 = np.empty(0, np.int32)


class SchedulerState:
    """What a scheduler knows; its parameters are those of `Scheduler`."""

    def __init__(
        self,
        cache: PageTables | PagedKVCache,
        options: SchedulerOptions | None = None,
        *,
        track_tokens: bool = True,
        costs: PreemptionCosts | None = None,
        page_bytes: int | None = None,
        window_slot_bytes: int | None = None,
        start_swap: Callable[[SwapPlan], object] | None = None,
    ) -> None:
        self._cache = cache
        tables = cache if isinstance(cache, PageTables) else getattr(cache, "tables", None)
        if not isinstance(tables, PageTables):
            raise ArgumentTypeError(
                f"cache must be PageTables or a PagedKVCache, got {type(cache).__name__}"
            )
        self.tables: PageTables = tables
        self.options = instance(
            "options", SchedulerOptions() if options is None else options, SchedulerOptions
        )
        if costs is not None:
            instance("costs", costs, PreemptionCosts)
        for name, size in (("page_bytes", page_bytes), ("window_slot_bytes", window_slot_bytes)):
            if size is not None:
                integer(name, size, 0, MAX_BYTES)
        if self.tables.sharing is not None and not self.tables.sharing.leave_last:
            raise ArgumentError(
                "a scheduler samples from the last token of a prompt, so that it must be computed: "
                "use SharingOptions(leave_last=True)"
            )
        if not isinstance(cache, PageTables):
            layout = PageLayout(cache.config)
            page_bytes = layout.page_bytes if page_bytes is None else page_bytes
            if window_slot_bytes is None:
                window_slot_bytes = layout.window_slot_bytes
        if self.options.preemption == "auto" and (costs is None or not page_bytes):
            raise ArgumentError(
                'preemption="auto" compares costs: pass costs=PreemptionCosts(...) and, without a '
                "PagedKVCache, page_bytes"
            )
        if start_swap is not None and not callable(start_swap):
            raise ArgumentError(f"start_swap must be callable, got {type(start_swap).__name__}")
        self._costs, self._start_swap = costs, start_swap
        self._page_bytes, self._slot_bytes = page_bytes or 0, window_slot_bytes or 0
        self.stats = SchedulerStats()
        self._track_tokens = track_tokens
        self._turn: Turn = [None]
        self._size = self.tables.page_size
        self._usable = self.tables.pool.num_pages - 1
        self._watermark = int(self.options.watermark * self._usable)
        self._most_running = min(self.options.max_running, self.options.step_tokens)
        if self.tables.window_tokens:
            self._most_running = min(self._most_running, self.tables.windows.num_slots)
        # Requests, by number, and the numbers by name.
        self._jobs: dict[int, Job] = {}
        self._numbers: dict[str, int] = {}
        self._num_added = 0
        # Every token that ends some request.
        self._stop_tokens: Int32 = NO_TOKENS
        # Pages that admitted requests may come to hold; kept for admission "whole".
        self._committed = 0
        # Where a sequence can be: waiting, in prefill, decoding, or under way between the tiers.
        self._waiting = WaitingQueue()
        self._prefills: list[Prefill] = []
        self._batch = RunningBatch(self._size)
        self._token_rows = TokenRows()
        self._moves: dict[int, Move] = {}
        # How copies ended, as they were reported, from whatever thread.
        self._ended: deque[tuple[SwapPlan, Outcome]] = deque()
        # Sequences that are done with, still to be closed.
        self._closing: list[int] = []
        # The open step: its prompts, and who decodes but sits it out; whether it is stored already.
        self._open: ScheduledStep | None = None
        self._chunks: list[tuple[Prefill, int]] = []
        self._held: list[tuple[Int64, Int32]] = []
        self._stored = False
        # Pages that decoding takes after each step, while a number of steps is being chosen.
        self._ahead: Int64 | None = None
        # What the next step tells: who gave way, and the copies to make.
        self._preempted: list[str] = []
        self._swaps: list[SwapPlan] = []
        # Requests to be dropped when the step ends.
        self._aborting: list[str] = []
        # Whether sequences were forked since the last step: then the next one may copy pages.
        self._forked = False

    @property
    def has_work(self) -> bool:
        """Whether a request waits or runs, or pages of one that left are still being copied."""
        return bool(self._jobs or self._moves or self._closing)

    @property
    def num_waiting(self) -> int:
        """Requests, or sequences of them, that wait for room."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences that hold pages, those to be forked from a prompt in prefill included."""
        prefills = sum(prefill.entry.width for prefill in self._prefills)
        if not (self._held or self._moves):
            return self._batch.size + prefills
        return self._batch.size + prefills + self.num_held + self.num_swapping

    @property
    def num_held(self) -> int:
        """Sequences that sit the open step out, for want of pages that are on their way."""
        return sum(last.size for _, last in self._held)

    @property
    def num_swapping(self) -> int:
        """Sequences whose bytes are being copied between device and host."""
        return sum(move.entry.width for move in self._moves.values())

    def _take_back(self) -> None:
        """Let the sequences that sat a step out decode again."""
        if self._held:
            # They may not have copied what they share yet.
            self._forked = True
        while self._held:
            self._batch.extend(*self._held[-1])
            self._held.pop()

    def _row(self, at: int) -> Bools:
        chosen = np.zeros(self._batch.size, np.bool_)
        chosen[at] = True
        return chosen

    def _rows_of(self, job: Job) -> Bools:
        chosen: Bools = self._batch.number == job.number
        return chosen

    # -- leaving -----------------------------------------------------------------------------

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

    def _forget(self, gone: Bools) -> None:
        """Take decoding sequences out of the batch."""
        if self._track_tokens:
            self._token_rows.give_back(self._batch.token_rows[gone])
        self._batch.remove(gone)

    def _release(self, gone: Bools) -> None:
        """Take decoding sequences out of the batch, to be closed when the call ends."""
        self._closing += self._batch.seqs[gone].tolist()
        self._forget(gone)

    def _close_rest(self) -> None:
        """Close what is done with."""
        if self._closing:
            self._cache.close(self._closing)
            self._closing = []

    def _try_closing(self) -> None:
        """Close what is done with, unless others are at work in the tables."""
        if not self._closing:
            return
        # What the call has to tell must not be lost; `schedule` closes them then.
        with suppress(ConcurrentCallError, StepError):
            self._close_rest()
