"""A step: reserve pages and window slots for new tokens, then commit or abort."""

from __future__ import annotations

import numpy as np

from ..errors import OutOfPages, OutOfWindowSlots, StepError
from .arguments import Bools, Int32, Int64, Integers, ranges, token_counts
from .block_chain import Tokens
from .decode_runs import DecodeRuns
from .exclusive import calls_met, exclusive
from .published_blocks import NO_MEMBERS
from .sequence_rows import LEAVING
from .step_plan import NO_COPIES, PageCopies, SequenceState, StepPlan


class Steps(DecodeRuns):
    """Appending to a batch of sequences; at most one step is open at a time."""

    _step: StepPlan | None = None

    @property
    def has_open_step(self) -> bool:
        """Whether a step was reserved that is neither committed nor aborted."""
        return self._step is not None

    def reserve(
        self,
        seq_ids: Integers,
        num_new_tokens: int | Integers,
        token_ids: Tokens | None = None,
    ) -> StepPlan:
        """Open a step that appends tokens to a batch of sequences; all of it or nothing.

        Pages and window slots that are shared with other sequences and would be written are left
        for new ones (copy on write). Where several members of the batch share one, they come in
        the order of the batch, and the last owner left writes in place.

        Parameters
        ----------
        seq_ids : integers [B]
            Sequences, each at most once.
        num_new_tokens : int or integers [B]
            Tokens to append to each, 0 included.
        token_ids : integers [N], optional
            Ids of the new tokens, the members' one after the other; those of sequences that were
            opened without tokens are ignored. Without it a sequence appends the tokens it was
            opened with, and behind these nothing more of it is shared.

        Returns
        -------
        StepPlan
            The open step. The state is that after the append already.

        Raises
        ------
        UnknownSequence, ArgumentError, ArgumentTypeError
            For bad ids, counts or token ids.
        StepError
            If a step is open.
        OutOfPages, OutOfWindowSlots
            If the step as a whole does not fit.
        """
        # As `exclusive`, without the price of passing arguments on.
        try:
            self._turn.pop()
        except IndexError:
            raise calls_met("reserve") from None
        try:
            return self._reserve(seq_ids, num_new_tokens, token_ids)
        finally:
            self._turn.append(None)

    def _reserve(
        self, seq_ids: Integers, num_new_tokens: int | Integers, token_ids: Tokens | None = None
    ) -> StepPlan:
        self._refuse_open_step("reserve")
        rows = self._resident_rows(seq_ids, "append to")
        self._step = self._run_step(rows, num_new_tokens, token_ids)
        if self._step is not None:
            return self._step
        num_new = token_counts("num_new_tokens", num_new_tokens, rows.size)
        if num_new is num_new_tokens:
            # The plan must not change with the caller's array.
            num_new = num_new.copy()
        size = self.page_size
        old = self._states(rows)
        sharing = self.prefix is not None
        tokens = self._step_tokens(rows, old.length, num_new, token_ids) if sharing else None
        new = self._after_append(old, num_new)
        blocks, blocks_after = self._num_blocks(old.length), self._num_blocks(new.length)
        fresh = blocks_after - blocks
        leaving = self._leaving_pages(rows, old.length, num_new)
        need = int(np.add.reduce(fresh)) + leaving.size
        if need > self.pool.num_free:
            raise OutOfPages(need, self.pool.num_free, self.pool.num_pages - 1)
        slot_members, slot_copies = self._entering_slots(rows, num_new)
        if slot_members.size > self.windows.num_free:
            free, total = self.windows.num_free, self.windows.num_slots
            raise OutOfWindowSlots(slot_members.size, free, total)
        if need:
            self._grow_width(int(np.maximum.reduce(blocks_after)))
        copied, begun = self._new_first_pages(old, blocks, fresh, leaving)
        if self.retention is not None:
            # Only now: a call that is refused must not even bring priorities up to date.
            self.retention._refresh()
        pages, slots, records = self._take(need, slot_members.size, copied.size + begun.size)
        # Nothing fails from here on.
        self.version += 1
        cow = copies = sink_copies = NO_COPIES
        fresh_pages = new_pages = pages
        if leaving.size:
            taken = fresh.copy()
            taken[leaving] += 1
            places = (np.cumsum(taken) - taken)[leaving]
            fresh_pages = np.delete(pages, places)
            at = rows[leaving], old.length[leaving] // size
            cow = PageCopies(self._table[at], pages[places])
            self._table[at] = cow.dst
            self._touch(*at)
            self.pool.release(cow.src)
            coded = old.coded[leaving] > at[1] * size
            copies = PageCopies(cow.src[coded], cow.dst[coded])
            new_pages = np.delete(pages, places[coded])
        if tokens is not None and leaving.size:
            self._page_tokens[cow.dst] = self._page_tokens[cow.src]
        if fresh_pages.size:
            self._enter_pages(rows, blocks, fresh, fresh_pages)
        if copied.size or begun.size:
            members = np.concatenate((leaving[copied], begun))
            firsts = self._table[rows[members], 0]
            self.windows.bind_records(firsts, records)
            given = records[: copied.size]
            had = self.windows.sink_record[cow.src[copied[: given.size]]]
            sink_copies = PageCopies(had, given)
            if records.size < members.size:
                new = new._replace(num_sinks=new.num_sinks.copy())
                new.num_sinks[members[records.size :]] = 0
        if self._twins.count:
            self._part_written(rows, old.length, num_new)
        if tokens is not None:
            self._note_writes(rows, old.length, num_new, tokens)
        window_copies = self._enter_slots(rows, old, slot_members, slot_copies, slots)
        self._length[rows] = new.length
        if self.window_tokens:
            self._coded[rows] = new.coded
            self._ring_start[rows] = new.ring_start
            self._sinks[rows] = new.num_sinks
        self._note_decoded(rows, num_new)
        self._step = StepPlan(
            self,
            self._ids[rows],
            rows,
            num_new,
            old,
            new,
            new_pages,
            cow,
            copies,
            window_copies,
            sink_copies,
        )
        return self._step

    def pages_needed(self, seq_ids: Integers, num_new_tokens: int | Integers) -> int:
        """Return how many pages `reserve` would take for a step now, copies on write included.

        Raises
        ------
        UnknownSequence, ArgumentError, ArgumentTypeError
            For bad ids or counts.
        """
        rows = self._resident_rows_now(seq_ids, "append to")
        num_new = token_counts("num_new_tokens", num_new_tokens, rows.size)
        length, size = self._length.take(rows), self.page_size
        fresh = (length + num_new + (size - 1)) // size - (length + (size - 1)) // size
        return int(fresh.sum()) + self._leaving_pages(rows, length, num_new).size

    def commit(self, plan: StepPlan, publish_to: Integers | None = None) -> None:
        """Close the open step; its tokens stay, and blocks that are complete can be found.

        Parameters
        ----------
        plan : StepPlan
            The open step.
        publish_to : integers [B], optional
            Positions of each member from there on are drafts: a block that holds one is published
            by a later commit, if it is not cut away by then.

        Raises
        ------
        StepError
            If ``plan`` is not the open step.
        """
        try:
            self._turn.pop()
        except IndexError:
            raise calls_met("commit") from None
        try:
            upto = None
            if publish_to is not None:
                upto = token_counts("publish_to", publish_to, plan.rows.size)
            self._end_step(plan, "commit")
            if upto is not None:
                # A run knows no drafts.
                self._run = None
            if not self._publish_run():
                self._publish(plan.rows, upto)
        finally:
            self._turn.append(None)

    @exclusive
    def abort(self, plan: StepPlan) -> Int32:
        """Close the open step and truncate its sequences to their old lengths.

        Copies on write are kept. A layer that was not stored must first encode
        `StepPlan.abort_seal`.

        Returns
        -------
        int32[n]
            Pages that became free.

        Raises
        ------
        StepError
            If ``plan`` is not the open step.
        """
        self._end_step(plan, "abort")
        return self._cut(plan.rows, plan.old.length)

    def pages_in_flight(self) -> Int32:
        """Return pages that work under way reads or writes.

        Those of the open step's members, and of sequences that are being swapped out. No eviction
        policy takes them; a page may be listed twice.
        """
        rows = [NO_MEMBERS] if self._step is None else [self._step.rows]
        if self._num_away:
            rows.append(np.flatnonzero(self._away == LEAVING))
        pages = self._table[np.concatenate(rows)]
        return pages[pages > 0]

    def _refuse_open_step(self, operation: str) -> None:
        if self._step is not None:
            raise StepError(f"{operation} must wait: a step is open, commit or abort it first")

    def _end_step(self, plan: StepPlan, operation: str) -> None:
        if self._step is None or plan is not self._step:
            state = "no step is open" if self._step is None else "another step is open"
            raise StepError(f"cannot {operation} this plan: {state}")
        self._step = None

    def _after_append(self, old: SequenceState[Int64], num_new: Int64) -> SequenceState[Int64]:
        length = old.length + num_new
        if not self.window_tokens:
            return SequenceState(length, length, length, old.num_sinks)
        coded = np.maximum(old.coded, length // self.page_size * self.page_size)
        ring_start = np.maximum(old.ring_start, length - self.window_tokens)
        sinks = old.num_sinks
        if self.num_sinks and old.length.size and int(old.length.min()) < self.num_sinks:
            # Sinks grow while every token so far is one; never again once block 0 was evicted.
            growing = sinks == old.length
            sinks = np.where(growing, np.minimum(length, self.num_sinks), sinks)
        return SequenceState(length, coded, ring_start, sinks)

    def _leaving_pages(self, rows: Int64, length: Int64, num_new: Int64) -> Int64:
        """Return the members that must copy their open block's page."""
        if not self.pool.num_shared:
            return NO_MEMBERS
        blocks = length // self.page_size
        writers = np.flatnonzero((num_new > 0) & (blocks * self.page_size < length))
        pages = self._table[rows[writers], blocks[writers]]
        return writers[self.pool.copied_on_write(pages)]

    def _entering_slots(self, rows: Int64, num_new: Int64) -> tuple[Int64, Bools]:
        """Return the members that need a window slot, and which of them leave a shared one."""
        if not self.window_tokens:
            return NO_MEMBERS, NO_FLAGS
        slots = self._slot.take(rows, mode="clip")
        wanting = (slots < 0) & (num_new > 0)
        if self.windows.num_shared:
            owners = np.flatnonzero((slots >= 0) & (num_new > 0))
            wanting[owners] = self.windows.copied_on_write(slots[owners])
        members = np.flatnonzero(wanting)
        return members, slots[members] >= 0

    def _new_first_pages(
        self, old: SequenceState[Int64], blocks: Int64, fresh: Int64, leaving: Int64
    ) -> tuple[Int64, Int64]:
        """Return who gets a page of block 0 that needs a sink record.

        Returns
        -------
        copied : int64[n]
            Which of ``leaving`` copy one that has sinks.
        begun : int64[m]
            Members that begin.
        """
        if not self.num_sinks:
            return NO_MEMBERS, NO_MEMBERS
        first = old.length[leaving] < self.page_size
        copied = np.flatnonzero(first & (old.num_sinks[leaving] > 0))
        return copied, np.flatnonzero((blocks == 0) & (fresh > 0))

    def _enter_pages(self, rows: Int64, blocks: Int64, fresh: Int64, pages: Int32) -> None:
        """Write new pages behind the blocks of each member, member by member."""
        members = fresh.nonzero()[0]
        at = blocks[members]
        if pages.size > members.size:
            counts = fresh[members]
            members, at = np.repeat(members, counts), np.repeat(at, counts) + ranges(counts)
        self._table[rows[members], at] = pages

    def _enter_slots(
        self, rows: Int64, old: SequenceState[Int64], members: Int64, leaving: Bools, slots: Int32
    ) -> PageCopies:
        """Give members their window slots; return the pairs whose ring rows must be copied."""
        if members.size == 0:
            return NO_COPIES
        src = self._slot[rows[members]]
        self._slot[rows[members]] = slots
        self.windows._release_row(src)
        used = leaving & (old.ring_start[members] < old.length[members])
        return PageCopies(src[used], slots[used])


NO_FLAGS: Bools = np.empty(0, np.bool_)
