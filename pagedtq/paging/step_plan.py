"""What one step does to the tables, and where its tokens' bytes go.

A step appends ``num_new[i]`` tokens to sequence ``i`` of a batch. `PageTables.reserve` moves the
state at once and returns a `StepPlan`; a data plane then executes it, in this order:

1. for all layers, before any ``store``: clear the norms of ``new_pages``; copy ``copy_src`` to
   ``copy_dst`` (in layers without an overlay, which write codes with every token, ``cow_src`` to
   ``cow_dst``), ``window_copy_src`` to ``window_copy_dst``, ``sink_copy_src`` to ``sink_copy_dst``;
2. per layer: encode ring rows ``seal_rows`` into ``seal_mapping``;
3. encode inputs into ``store_mapping`` (layers without an overlay: ``slot_mapping``, and no 2, 4);
4. write inputs into sinks (``sink_mapping``), then into the ring (``ring_mapping``).

Sealing comes first because the ring rows it reads are overwritten by 4.

Per-token arrays are made when they are first read, so that a simulation of the control plane alone
never pays for them. That works until the tables change next (later reads of arrays that were not
made by then raise ``StepError``).
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

from ..errors import StepError
from .arguments import Int32, Int64, ranges

if TYPE_CHECKING:
    from .table_views import TableViews

T = TypeVar("T", int, Int64)


class SequenceState(NamedTuple, Generic[T]):
    """``(L, c, r, s)`` of one sequence (integers) or of a batch (``int64[B]`` each).

    Always ``0 <= r <= c <= L``, ``L - r <= window_tokens``, ``s <= min(num_sinks, L)``; without a
    window ``r = c = L`` and ``s = 0``.
    """

    #: L, the number of tokens.
    length: T
    #: c: positions ``[0, c)`` have codes in pages.
    coded: T
    #: r: positions ``[r, L)`` are in the ring.
    ring_start: T
    #: s: positions ``[0, s)`` are in the sinks.
    num_sinks: T


class PageCopies(NamedTuple):
    """Pairs of source and destination, ``int32[n]`` each."""

    src: Int32
    dst: Int32


NO_IDS: Int32 = np.empty(0, np.int32)
NO_COPIES = PageCopies(NO_IDS, NO_IDS)


class StepPlan:
    """One reserved step. Read only.

    Attributes
    ----------
    seq_ids : int64[B]
        The batch, in the order given.
    rows : int64[B]
        Rows of the tables.
    num_new : int64[B]
        Tokens appended to each.
    old, new : SequenceState of int64[B]
        State before and after.
    new_pages : int32[n]
        Pages taken in this step whose bytes are not copied from another: norms must be cleared.
    cow_src, cow_dst : int32[n]
        Every copy on write, reported once: the owner of ``dst`` left the shared page ``src``.
    copy_src, copy_dst : int32[n]
        Those whose open block already had codes in layers with an overlay
        (``c > P * floor(L / P)``).
    window_copy_src, window_copy_dst : int32[n]
        Window slots left shared, and those that replace them; only where the ring held rows.
    sink_copy_src, sink_copy_dst : int32[n]
        Sink records of copied block-0 pages; only where there were sinks.
    """

    # Most steps copy nothing.
    cow_src = cow_dst = copy_src = copy_dst = NO_IDS
    window_copy_src = window_copy_dst = sink_copy_src = sink_copy_dst = NO_IDS

    def __init__(
        self,
        tables: TableViews,
        seq_ids: Int64,
        rows: Int64,
        num_new: Int64,
        old: SequenceState[Int64],
        new: SequenceState[Int64],
        new_pages: Int32,
        cow: PageCopies = NO_COPIES,
        copies: PageCopies = NO_COPIES,
        window_copies: PageCopies = NO_COPIES,
        sink_copies: PageCopies = NO_COPIES,
    ) -> None:
        self._tables = tables
        self._version = tables.version
        self.seq_ids, self.rows, self.num_new = seq_ids, rows, num_new
        self.old, self.new = old, new
        self.new_pages = new_pages
        if cow is not NO_COPIES:
            self.cow_src, self.cow_dst = cow
            self.copy_src, self.copy_dst = copies
        if window_copies is not NO_COPIES:
            self.window_copy_src, self.window_copy_dst = window_copies
        if sink_copies is not NO_COPIES:
            self.sink_copy_src, self.sink_copy_dst = sink_copies

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of the step, N."""
        return int(self.num_new.sum())

    @cached_property
    def token_rows(self) -> Int64:
        """Member of the batch of each token, ``int64[N]``: an index into ``seq_ids``."""
        return np.repeat(np.arange(self.rows.size), self.num_new)

    @cached_property
    def positions(self) -> Int64:
        """Position of each token in its sequence, ``int64[N]``."""
        return self.old.length[self.token_rows] + ranges(self.num_new)

    @cached_property
    def slot_mapping(self) -> Int64:
        """Page slot of each token, ``int64[N]``."""
        return self._current().page_slots(self.rows[self.token_rows], self.positions)

    @cached_property
    def store_mapping(self) -> Int64:
        """Page slot of each token that is encoded from the input, else -1, ``int64[N]``."""
        coded = self.positions < self.new.coded[self.token_rows]
        return np.where(coded, self.slot_mapping, -1)

    @cached_property
    def ring_mapping(self) -> Int64:
        """Row ``slot * W + position mod W`` of the last ``min(n, W)`` tokens of each member.

        ``int64[N]``, -1 for the others and without a window.
        """
        tables = self._current()
        window = tables.window_tokens
        members = self.token_rows
        kept = self.positions >= self.new.length[members] - window
        return np.where(kept, tables.ring_rows(self.rows[members], self.positions), -1)

    @cached_property
    def sink_mapping(self) -> Int64:
        """Row ``record * S + position`` of each token that becomes a sink, else -1, ``int64[N]``.

        Sinks are the first tokens of a sequence, so ``new.num_sinks`` alone decides: a token of
        this step below it cannot have been one before.
        """
        tables = self._current()
        members = self.token_rows
        mapping = np.full(members.size, -1, np.int64)
        sinks = np.flatnonzero(self.positions < self.new.num_sinks[members])
        records = tables.row_sink_records(self.rows[members[sinks]])
        mapping[sinks] = records.astype(np.int64) * tables.num_sinks + self.positions[sinks]
        return mapping

    @cached_property
    def seal_rows(self) -> Int64:
        """Ring rows of the old positions ``[c, min(c', L))`` that are encoded now, ``int64[M]``."""
        rows, positions = self._sealed
        return self._current().ring_rows(rows, positions)

    @cached_property
    def seal_mapping(self) -> Int64:
        """Page slots of ``seal_rows``, ``int64[M]``."""
        rows, positions = self._sealed
        return self._current().page_slots(rows, positions)

    @cached_property
    def filled_pages(self) -> Int32:
        """Pages of the blocks that became completely coded in this step, ``int32[n]``."""
        tables = self._current()
        first = self.old.coded // tables.page_size
        counts = self.new.coded // tables.page_size - first
        blocks = np.repeat(first, counts) + ranges(counts)
        return tables.row_pages(np.repeat(self.rows, counts), blocks)

    def abort_seal(self) -> tuple[Int64, Int64]:
        """Return what an abort must still encode in layers that were not stored.

        Aborting leaves ``c = min(c', L)``: positions ``[c, min(c', L))`` of the old tokens count
        as coded, but a layer that was not stored holds them in its ring only. They are the ones
        that this step seals.

        Returns
        -------
        rows, mapping : int64[M]
            Ring rows, and the page slots to encode them into, as ``seal_rows, seal_mapping``.
        """
        return self.seal_rows, self.seal_mapping

    @cached_property
    def _sealed(self) -> tuple[Int64, Int64]:
        """Table rows and positions of the tokens that move from the ring into pages."""
        counts = np.minimum(self.new.coded, self.old.length) - self.old.coded
        positions = np.repeat(self.old.coded, counts) + ranges(counts)
        return np.repeat(self.rows, counts), positions

    def _current(self) -> TableViews:
        if self._tables.version != self._version:
            raise StepError(
                "per-token arrays of a step must be read before its tables change again"
            )
        return self._tables
