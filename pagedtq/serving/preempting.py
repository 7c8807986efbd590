"""Who gives way when pages are short, how, and who waits for pages that are on their way."""

from __future__ import annotations

import numpy as np

from ..errors import OutOfHostPages, OutOfWindowSlots
from ..paging.arguments import Bools, Int32, Int64
from .jobs import Entry, Job, Move, Parked, Place
from .moving import Moving
from .preemption import choose_preemption


class Preempting(Moving):
    """Room for the next step."""

    def _make_room(self) -> list[str]:
        """Preempt until the rest can advance; return the names of the requests concerned.

        Nobody is preempted for pages that are on their way: from a swap or behind a fence, or, if
        they are those of a sequence behind all others, from the host.
        """
        preempted = []
        while (lacking := self._lacking()) > 0:
            if self._coming() >= lacking or self._last_returning() > self._hindmost_place():
                self._hold_back()
                break
            preempted.append(self._preempt_hindmost())
        return preempted

    def _next_pages(self) -> int:
        """Return the pages that decoding sequences take in the next step."""
        if self._forked:
            return self.tables.pages_needed(self._batch.seqs, 1)
        return self._batch.pages_for_next()

    def _lacking(self) -> int:
        """Return how many pages are missing for the next step, of those who do not wait in turn."""
        if not self._batch.size:
            return 0
        spare = self.tables.pool.num_free - self._next_pages()
        if spare or not self._prefills:
            return -spare
        first = self._prefills[0]
        stuck = first.done % self._size == 0
        return int(stuck and self._place_of(self._batch.hindmost()) > first.entry.place)

    def _coming(self) -> int:
        """Return the pages that will be free without anybody giving way."""
        coming = sum(move.num_coming for move in self._moves.values())
        return coming + self.tables.pool.num_parked

    def _last_returning(self) -> Place:
        """Return the last place of those that come back from the host."""
        places = (move.entry.place for move in self._moves.values() if move.plan.direction == "in")
        return max(places, default=FOREMOST)

    def _place_of(self, at: int) -> Place:
        batch = self._batch
        return int(batch.priority[at]), int(batch.number[at]), int(batch.track[at])

    def _hindmost_place(self) -> Place:
        places = [prefill.entry.place for prefill in self._prefills]
        return max([*places, self._place_of(self._batch.hindmost())])

    def _hold_back(self) -> None:
        """Let sequences sit the step out whose next token finds no page, the hindmost first."""
        batch = self._batch
        need, free = self._pages_each(), self.tables.pool.num_free
        order = np.lexsort((batch.track, batch.number, batch.priority))
        held = np.zeros(batch.size, np.bool_)
        held[order] = (np.cumsum(need[order]) > free) & (need[order] > 0)
        for number in np.unique(batch.number[held]).tolist():
            # Hypotheses go on from each other: a search takes a step whole.
            if self._jobs[number].request.beam_width:
                held |= batch.number == number
        if held.any():
            self._held.append(batch.take_out(held))

    def _pages_each(self) -> Int64:
        """Return the pages that each sequence would take for its next token, alone."""
        batch, tables = self._batch, self.tables
        if self._forked:
            return np.array([tables.pages_needed([seq], 1) for seq in batch.seqs.tolist()])
        begins: Int64 = (batch.length % self._size == 0).astype(np.int64)
        return begins

    # -- giving way --------------------------------------------------------------------------

    def _preempt_hindmost(self) -> str:
        at = self._batch.hindmost()
        prefill = max(self._prefills, key=lambda prefill: prefill.entry.place, default=None)
        if prefill is not None and prefill.entry.place > self._place_of(at):
            job, count = prefill.entry.job, 1
            self._cache.close([prefill.seq_id])
            self._prefills.remove(prefill)
            self._waiting.push(prefill.entry)
        else:
            job = self._jobs[int(self._batch.number[at])]
            gone = self._rows_of(job) if job.request.beam_width else self._row(at)
            count = int(np.count_nonzero(gone))
            if self.options.preemption == "recompute" or not self._swap_out(job, gone):
                fields = self._batch.fields_of(gone)
                entry = self._to_recompute(job, fields)
                self._cache.close(self._batch.seqs[gone])
                self._batch.remove(gone)
                self._queue_again(job, entry, fields)
        job.num_preemptions += count
        self.stats.preempted += count
        return job.request.request_id

    def _swap_out(self, job: Job, gone: Bools) -> bool:
        """Move decoding sequences of a request to the host, if it has room and that costs less."""
        batch, tables = self._batch, self.tables
        seqs = batch.seqs[gone]
        entries = tables.block_table(seqs)
        pages, owners = np.unique(entries[entries > 0], return_counts=True)
        if self.options.preemption == "auto" and not self._swap_is_cheaper(gone, pages):
            return False
        following = int(batch.length[gone][0] % self._size == 0)
        if seqs.size > 1:
            following = tables.pages_needed(seqs, 1)
        coming = int(np.count_nonzero(tables.pool.ref_counts[pages] == owners))
        try:
            plan = self._cache.begin_swap_out(seqs)
        except (OutOfHostPages, OutOfWindowSlots):
            return False
        track = -1 if job.request.beam_width else int(batch.track[gone][0])
        fields, last = batch.take_out(gone)
        parked = Parked(fields, last, pages.size, following)
        self._start(Move(plan, Entry(job, track, parked=parked), parked, coming))
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
        windows = 0
        if self.tables.window_tokens:
            slots = self.tables.window_slots(batch.seqs[gone])
            windows = np.unique(slots[slots >= 0]).size
        choice = choose_preemption(
            self._costs,
            tokens,
            pages.size * self._page_bytes + windows * self._slot_bytes,
            num_found=min(found, tokens),
            num_bytes_shared=int(np.count_nonzero(elsewhere)) * self._page_bytes,
        )
        return choice == "swap"


#: Before every place.
FOREMOST: Place = (-(1 << 40), -1, -1)
