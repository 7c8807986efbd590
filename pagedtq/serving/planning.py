"""Who runs in the next step: preemption, admission, and chunks of prompts.

Rules, each applied to sequences in the order of their *places* (priority, then age):

* every decoding sequence stores its next token; if pages are short, the hindmost sequence gives
  back everything and waits, until the rest fits. What it has computed goes to the host, or is
  computed again, whichever costs less;
* what is left of the step's tokens goes to prompts, one after the other: those that were begun,
  then the head of the queue, if it fits. Nothing overtakes it. A step that preempted admits nobody;
* a prompt that is stuck for want of a page takes the place of sequences behind it;
* nobody gives way for pages that are on their way (of a swap whose copy overlaps steps, or behind a
  fence): who needs one sits the step out, the hindmost first, and nobody is admitted meanwhile.

So the foremost sequence always advances: nothing starves and nothing waits for itself.
"""

from __future__ import annotations

import numpy as np

from ..errors import OutOfPages, OutOfWindowSlots
from .jobs import Entry, Move, Parked, Prefill
from .preempting import Preempting
from .running_batch import SEQS


class Planning(Preempting):
    """Admission, and the chunks of a step."""

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
                entry = self._head() if admit else None
                if entry is None:
                    break
                if entry.parked is not None:
                    taken = self._swap_in(entry, entry.parked, tokens, free)
                    if taken is None:
                        break
                    free -= taken
                    if self._start_swap is None:
                        # They are back, and decode in this step.
                        tokens -= entry.width
                    continue
                taken = self._admit(entry, tokens, free)
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

    def _head(self) -> Entry | None:
        """Return who is admitted next: the head of the queue, if none before it is leaving."""
        entry = self._waiting.head()
        if entry is not None and self._moves:
            moves = self._moves.values()
            leaving = [move for move in moves if move.plan.direction == "out" and not move.dropped]
            if any(move.entry.place < entry.place for move in leaving):
                return None
        return entry

    def _lacks_slots(self, width: int) -> bool:
        """Tell whether sequences find no window slots beside those that run have still to take.

        Sequences of others, and fences, may keep slots from the scheduler.
        """
        if not self.tables.window_tokens:
            return False
        pending = sum(p.entry.width - p.begun for p in self._prefills)
        for move in self._moves.values():
            if move.plan.direction == "in":
                pending += move.parked.last.size - move.plan.window_slots.size
        if self._forked:
            slots = self.tables.window_slots(self._batch.seqs)
            pending += slots.size - np.unique(slots[slots >= 0]).size
        return width > self.tables.windows.num_free - pending

    def _admit(self, entry: Entry, tokens: int, free: int) -> int | None:
        """Begin the head of the queue if it fits; return how many free pages it found."""
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
        revived = self.tables.pool.num_leaving(pages) if pages else 0
        need = -(-must_fit // self._size) - len(pages) + revived
        if running:
            # The open page is copied for all forks but one.
            need += self._watermark + width - 1
        if need > free:
            return None
        if self._lacks_slots(width):
            return None
        seq_id = self._cache.open(entry.chain)
        # Others may have changed since what can be found.
        found = self.tables.length_of(seq_id)
        self._waiting.pop()
        self._prefills.append(Prefill(entry, seq_id, found))
        if job.num_found < 0:
            job.num_found = found
            self._committed += job.most_pages
            self.stats.admitted += 1
            self.stats.prompt_tokens += job.num_prompt
            self.stats.found_tokens += found
        return revived

    def _swap_in(self, entry: Entry, parked: Parked, tokens: int, free: int) -> int | None:
        """Bring the head of the queue back from the host if it fits and can decode at once.

        Returns
        -------
        int or None
            Pages that it takes, those of its next tokens included; None if it does not fit.
        """
        running, width = self.num_running, entry.width
        if width > tokens or running + width > self._most_running:
            return None
        spare = free - parked.num_next - (self._watermark if running else 0)
        # Pages that are on the device still need not be taken, but to know that costs a try.
        if (running and parked.num_pages > spare) or self._lacks_slots(width):
            return None
        before = self.tables.pool.num_free
        try:
            plan = self._cache.begin_swap_in(parked.fields[SEQS])
        except (OutOfPages, OutOfWindowSlots):
            # Others hold them.
            return None
        taken = before - self.tables.pool.num_free
        self._waiting.pop()
        move = Move(plan, entry, parked, 0)
        if taken > spare:
            self._cancel(move)
            return None
        self._start(move)
        return taken + parked.num_next
