"""Who runs in the next step: preemption, admission, and chunks of prompts.

Rules, each applied to sequences in the order of their *places* (priority, then age):

* every decoding sequence stores its next token; if pages are short, the hindmost sequence gives
  back everything and waits to be computed again, until the rest fits;
* what is left of the step's tokens goes to prompts, one after the other: those that were begun,
  then the head of the queue, if it fits. Nothing overtakes it. A step that preempted admits nobody;
* a prompt that is stuck for want of a page takes the place of sequences behind it.

So the foremost sequence always advances: nothing starves and nothing waits for itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..errors import ArgumentError
from ..paging.arguments import Bools
from ..paging.page_tables import PageTables
from .generation import Completion, Reason, SchedulerOptions, SchedulerStats
from .jobs import Entry, Job, Prefill, WaitingQueue
from .running_batch import RunningBatch, TokenRows

if TYPE_CHECKING:
    from ..cache import PagedKVCache


class Planning:
    """State of the scheduler, and the decisions of a step.

    Parameters
    ----------
    cache : PageTables or PagedKVCache
        What gives the pages; a cache also has their bytes written by the engine.
    options : SchedulerOptions, optional
        How steps are put together.
    track_tokens : bool
        Whether the engine tells which tokens it samples. Without it only lengths are scheduled, as
        a simulation does: nothing stops early, and generated tokens are not shared.

    Attributes
    ----------
    tables : PageTables
        The page tables.
    stats : SchedulerStats
        Counts since the beginning.

    Raises
    ------
    ArgumentError
        If the tables share whole prompts, so that nothing would be left to sample from.
    """

    def __init__(
        self,
        cache: PageTables | PagedKVCache,
        options: SchedulerOptions | None = None,
        *,
        track_tokens: bool = True,
    ) -> None:
        self._cache = cache
        self.tables: PageTables = cache if isinstance(cache, PageTables) else cache.tables
        if self.tables.sharing is not None and not self.tables.sharing.leave_last:
            raise ArgumentError(
                "a scheduler samples from the last token of a prompt, so that it must be computed: "
                "use SharingOptions(leave_last=True)"
            )
        self.options = options or SchedulerOptions()
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
        """Take the pages of decoding sequences of a request; they are to be computed again."""
        batch = self._batch
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
        generated, tokens = int(batch.generated[at]), None
        if self._track_tokens:
            tokens = self._token_rows.read(int(batch.token_rows[at]), generated)
        index = len(job.completions) if job.request.beam_width else int(batch.track[at])
        job.completions.append(Completion(index, generated, tokens, reason))
        return job

    # -- admission and prompts ---------------------------------------------------------------

    def _plan_chunks(self, admit: bool) -> list[tuple[Prefill, int]]:
        """Choose chunks for what decoding leaves of the step's tokens and pages."""
        size, prefills = self._size, self._prefills
        if not prefills and not (admit and self._waiting):
            return []
        free = self.tables.pool.num_free - (self._next_pages() if self._batch.size else 0)
        tokens = self.options.step_tokens - self._batch.size
        chunks: list[tuple[Prefill, int]] = []
        while tokens > 0:
            if len(chunks) == len(prefills):
                taken = self._admit(tokens, free) if admit else None
                if taken is None:
                    break
                free -= taken
            prefill = prefills[len(chunks)]
            slack, wanted = -prefill.done % size, prefill.entry.target - prefill.done
            count = min(wanted, tokens, slack + free * size)
            if count <= 0:
                break
            chunks.append((prefill, count))
            tokens -= count
            free -= -(-(count - slack) // size)
            if count < wanted:
                break
        return chunks

    def _admit(self, tokens: int, free: int) -> int | None:
        """Begin the head of the queue if it fits; return how many free pages it found."""
        entry = self._waiting.head()
        if entry is None:
            return None
        running, width, job = self.num_running, entry.width, entry.job
        if running + width > self._most_running:
            return None
        admission = self.options.admission
        if running and admission == "whole" and self._committed + job.most_pages > self._usable:
            return None
        pages = [] if entry.chain is None else self.tables.find_pages(entry.chain)
        found = len(pages) * self._size
        must_fit = min(entry.target, found + tokens) if admission == "chunk" else entry.target
        # Pages that were found without an owner leave the free queue as well.
        revived = 0
        if pages:
            revived = int(np.count_nonzero(self.tables.pool.ref_counts[pages] == 0))
        need = -(-must_fit // self._size) - len(pages) + revived
        if running:
            # The open page is copied for all forks but one.
            need += self._watermark + width - 1
        if need > free:
            return None
        self._waiting.pop()
        seq_id = self._cache.open(entry.chain)
        self._prefills.append(Prefill(entry, seq_id, found))
        if job.num_found < 0:
            job.num_found = found
            self._committed += job.most_pages
            self.stats.admitted += 1
            self.stats.prompt_tokens += job.num_prompt
            self.stats.found_tokens += found
        return revived
