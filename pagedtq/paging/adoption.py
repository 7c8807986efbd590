"""Sequences outside their tables: taken out as plain arrays, and adopted by other tables.

An image numbers pages and rings apart from any pool, so that forks still share them when the image
enters another one. Taking an image out changes nothing; adopting one is all-or-nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..errors import StepError
from .arguments import Int32, Int64, Integers, instance, ranges
from .exclusive import exclusive
from .sequence_image import SequenceImage, check_image
from .steps import Steps


class ExtractedSequences(NamedTuple):
    """An image of sequences, and where its pages and rings lie now.

    Attributes
    ----------
    image : SequenceImage
        The sequences.
    pages : int32[n]
        Page of the pool of each page of the image.
    slots : int32[num_rings]
        Window slot of each ring of the image.
    """

    image: SequenceImage
    pages: Int32
    slots: Int32


class AdoptionPlan(NamedTuple):
    """Where the sequences of an image will lie, if nothing changes until they are adopted.

    The pages, slots and records are free: a data plane may fill them before `PageTables.adopt`,
    and may give up at any time without a word to the tables.

    Attributes
    ----------
    image : SequenceImage
        The sequences.
    pages : int32[n]
        Page of the pool for each page of the image.
    slots : int32[num_rings]
        Window slot for each ring of the image.
    first_pages : int32[n]
        Pages of the image that are a block 0 and so have a sink record.
    records : int32[n]
        Sink record for each of them.
    version : int
        State of the tables the plan was made for.
    """

    image: SequenceImage
    pages: Int32
    slots: Int32
    first_pages: Int32
    records: Int32
    version: int


class Adoption(Steps):
    """Taking sequences out of the tables, and in from others."""

    def extract(self, seq_ids: Integers, sealed_only: bool) -> ExtractedSequences:
        """Describe sequences as they are now, sharing included; changes nothing.

        Parameters
        ----------
        seq_ids : integers
            Sequences, each at most once.
        sealed_only : bool
            Whether all layers keep the exact window, so that pages hold bytes of coded positions
            only. Otherwise every page does.

        Raises
        ------
        UnknownSequence, ArgumentError, ArgumentTypeError
            For bad ids.
        StepError
            If a step is open.
        """
        self._refuse_open_step("extract")
        rows = self._resident_rows_now(seq_ids, "extract")
        length, coded, ring_start, sinks = self._states(rows)
        counts = -(-length // self.page_size)
        member, block = np.repeat(np.arange(rows.size), counts), ranges(counts)
        entries = self._table[rows[member], block]
        limit = coded if sealed_only else length
        held = entries > 0
        filled = (limit[member] > block * self.page_size)[held]
        pages, first, inverse = np.unique(entries[held], return_index=True, return_inverse=True)
        has_bytes = np.zeros(pages.size, np.bool_)
        np.logical_or.at(has_bytes, inverse, filled)
        # Pages with bytes come first, each half in the order in which sequences meet them.
        order = np.lexsort((first, ~has_bytes))
        numbers = np.empty(pages.size, np.int32)
        numbers[order] = np.arange(pages.size)
        blocks = np.zeros(entries.size, np.int32)
        blocks[held] = numbers[inverse] + 1
        slots, rings = _numbered(self._slot[rows])
        fields = (length, coded, ring_start, sinks, self._keep[rows], self._start[rows])
        image = SequenceImage(
            np.stack(fields, axis=1).astype(np.int64, copy=False),
            rings,
            blocks,
            pages.size,
            int(has_bytes.sum()),
            slots.size,
        )
        return ExtractedSequences(image, pages[order], slots)

    def plan_adoption(self, image: SequenceImage, sealed_only: bool) -> AdoptionPlan:
        """Check an image and find room for it; changes nothing.

        Parameters
        ----------
        image : SequenceImage
            Sequences of tables with the same page size, window and sinks.
        sealed_only : bool
            As for `extract`.

        Raises
        ------
        ArgumentError
            If the image breaks an invariant; see `check_image`.
        OutOfPages, OutOfWindowSlots
            If it does not fit.
        StepError
            If a step is open.
        """
        self._refuse_open_step("adopt")
        instance("image", image, SequenceImage)
        check_image(image, self.page_size, self.window_tokens, self.num_sinks, sealed_only)
        first_pages = image.first_pages(self.page_size) if self.num_sinks else image.blocks[:0]
        return AdoptionPlan(
            image,
            self.pool.peek(image.num_pages),
            self.windows.peek(image.num_rings),
            first_pages,
            self.windows.peek_records(first_pages.size),
            self.version,
        )

    @exclusive
    def adopt(self, plan: AdoptionPlan) -> Int64:
        """Open the sequences of a plan and return their ids, ``int64[n]``, in the image's order.

        Raises
        ------
        StepError
            If the tables changed since the plan was made, or a step is open.
        """
        self._refuse_open_step("adopt")
        image = instance("plan", plan, AdoptionPlan).image
        if (
            plan.version != self.version
            or not np.array_equal(plan.pages, self.pool.peek(image.num_pages))
            or not np.array_equal(plan.slots, self.windows.peek(image.num_rings))
        ):
            raise StepError("cannot adopt this plan: the tables changed since it was made")
        counts = image.block_counts(self.page_size)
        if counts.size:
            self._grow_width(int(counts.max()))
        self._grow_for(len(image.states))
        taken, slots, records = self._take(image.num_pages, image.num_rings, plan.first_pages.size)
        ids, rows = self._new_rows(len(image.states))
        self.version += 1
        pages = np.concatenate((np.zeros(1, np.int32), taken))
        self.pool.retain(pages[_repeats(image.blocks)])
        self.windows.retain(slots[_repeats(image.rings + 1) - 1])
        # What the pages hold now has no tokens.
        self._known[rows] = -1 if self.prefix is not None else 0
        self._table[np.repeat(rows, counts), ranges(counts)] = pages[image.blocks]
        ringed = image.rings >= 0
        self._slot[rows[ringed]] = slots[image.rings[ringed]]
        # Without a window c, r and s of a row stay 0.
        kept = image.states.T.copy()
        if not self.window_tokens:
            kept[1:4] = 0
        self._fields[:6, rows] = kept
        self._evicted[rows] = image.evicted_counts(self.page_size)
        self.windows.bind_records(pages[plan.first_pages + 1], records)
        return ids


def _numbered(slots: Int32) -> tuple[Int32, Int32]:
    """Return the distinct slots in order of appearance, and the number of each member's slot."""
    owned = slots >= 0
    distinct, first, inverse = np.unique(slots[owned], return_index=True, return_inverse=True)
    order = np.argsort(first)
    numbers = np.empty(distinct.size, np.int32)
    numbers[order] = np.arange(distinct.size)
    rings = np.full(slots.size, -1, np.int32)
    rings[owned] = numbers[inverse]
    return distinct[order], rings


def _repeats(numbers: Int32) -> Int32:
    """Return the positive numbers without the first occurrence of each."""
    held = numbers[numbers > 0]
    again = np.ones(held.size, np.bool_)
    again[np.unique(held, return_index=True)[1]] = False
    return held[again]
