"""Decoding: the same batch again, one token each, in a fraction of what a step costs.

Which members need a page and which fill a block then repeats every ``page_size`` steps, so it is
worked out once per member, not once per step. A run is that knowledge. It begins when a batch
decodes for the second time, and ends with any other change of the tables; what a step does, and in
which order, is what `Steps` would do without it.
"""

from __future__ import annotations

import numpy as np

from ..errors import TokenRangeError
from .arguments import Int32, Int64, Integers, token_counts
from .block_chain import Tokens
from .block_keys import token_array
from .published_blocks import PublishedBlocks
from .step_plan import NO_IDS, SequenceState, StepPlan

#: NumPy takes three times as long to add a Python integer to a small array as this.
ONE = np.array(1)
#: No version of the tables.
HOPELESS = -1


class Turn:
    """Members of a run that are at a block's end at the same time.

    Attributes
    ----------
    members, rows : int64[n]
        Their places in the batch, and their rows.
    count : int
        n.
    blocks : int64[n]
        Blocks that each has, all of them full.
    pages : int64[n]
        Pages of the last of them. NumPy is slow with indices of any other width.
    keys : list of list of bytes
        Keys of the blocks of each, with prefix sharing; they grow.
    """

    __slots__ = ("blocks", "count", "keys", "members", "most_blocks", "pages", "rows")

    def __init__(self, members: Int64, rows: Int64, blocks: Int64, pages: Int64) -> None:
        self.members, self.rows, self.blocks, self.pages = members, rows, blocks, pages
        self.count = rows.size
        self.most_blocks = max(blocks.tolist(), default=0)
        self.keys: list[list[bytes]] = []


class DecodeRun:
    """A batch without a window that appends one token to each member, step after step.

    Attributes
    ----------
    rows, seq_ids : int64[B]
        The batch.
    num_new : int64[B]
        Ones.
    state : SequenceState of int64[B]
        As it is now, read only: it is part of plans.
    places : int64[B]
        With prefix sharing, the page slot of each member's next token; meaningless for those at a
        block's end.
    num_steps : int
        Steps since the run began.
    version : int
        Version of the tables after the last one.
    """

    __slots__ = (
        "_first_offsets",
        "num_new",
        "num_new_bytes",
        "num_steps",
        "places",
        "rows",
        "seq_ids",
        "state",
        "turns",
        "version",
    )

    def __init__(
        self, rows: Int64, seq_ids: Int64, length: Int64, offsets: Int64, places: Int64
    ) -> None:
        self.rows, self.seq_ids, self._first_offsets, self.places = rows, seq_ids, offsets, places
        self.num_new, no_sinks = np.ones(rows.size, np.int64), np.zeros(rows.size, np.int64)
        self.state = SequenceState(length, length, length, no_sinks)
        # Plans of the run have them.
        for shared in (seq_ids, length, self.num_new, no_sinks):
            shared.setflags(write=False)
        self.num_new_bytes = self.num_new.tobytes()
        self.num_steps = self.version = 0
        #: By offset in its block that a member had when the run began.
        self.turns: dict[int, Turn] = {}

    def appends(self, num_new_tokens: int | Integers) -> bool:
        """Tell whether a step goes on with the run; refuse counts that are none."""
        if type(num_new_tokens) is int:
            return num_new_tokens == 1
        counts = token_counts("num_new_tokens", num_new_tokens, self.rows.size)
        return counts.tobytes() == self.num_new_bytes

    def members_at(self, offset: int) -> Int64:
        """Return the members that had this offset when the run began."""
        members: Int64 = (self._first_offsets == offset).nonzero()[0]
        return members


class DecodeRuns(PublishedBlocks):
    """Beginning a run, going on with it, and publishing what it fills."""

    _run: DecodeRun | None = None
    # Rows and version after the last step of one token each outside a run; the version is
    # `HOPELESS` if these rows cannot have a run.
    _decoded: tuple[Int64 | None, int] = (None, 0)

    def _run_step(
        self, rows: Int64, num_new_tokens: int | Integers, token_ids: Tokens | None
    ) -> StepPlan | None:
        """Reserve a step of a run; None, with nothing changed, if it is none or would fail."""
        run, self._run = self._run, None
        if run is None or run.rows is not rows or run.version != self.version:
            if self._decoded[0] is not rows or self._decoded[1] != self.version:
                return None
            run = self._begin_run(rows)
            if run is None:
                self._decoded = rows, HOPELESS
                return None
        if not run.appends(num_new_tokens):
            return None
        tokens = None
        if self.prefix is not None:
            if token_ids is None:
                return None
            try:
                tokens = token_array("token_ids", token_ids)
            except TokenRangeError:
                # A step outside a run says whose it is.
                return None
            if tokens.size != rows.size:
                return None
        turn = self._turn_of(run)
        if turn is None:
            return None
        need = turn.count
        if need > self.pool.num_free:
            return None
        if turn.most_blocks >= self._table.shape[1]:
            self._grow_width(turn.most_blocks + 1)
        if self.retention is not None:
            self.retention._refresh()
        pages = self._take(need)[0] if need else NO_IDS
        # Nothing fails from here on.
        self.version = run.version = self.version + 1
        if need:
            self._table[turn.rows, turn.blocks] = pages
            turn.pages = pages.astype(np.intp)
            turn.blocks += ONE
            turn.most_blocks += 1
        old = run.state
        longer = old.length + ONE
        # It is the plan's, and the next one's.
        longer.setflags(write=False)
        new = run.state = SequenceState(longer, longer, longer, old.num_sinks)
        if tokens is not None:
            if need:
                run.places[turn.members] = turn.pages * self._size
            self._slot_tokens[run.places] = tokens
            run.places += ONE
            self._known[rows] = longer
        self._length[rows] = longer
        run.num_steps += 1
        self._run = run
        return StepPlan(self, run.seq_ids, rows, run.num_new, old, new, pages)

    def _note_decoded(self, rows: Int64, num_new: Int64) -> None:
        """Note a step outside a run: if it comes again, a run begins."""
        if self._decoded[0] is not rows or self._decoded[1] != HOPELESS:
            even = not self.window_tokens and np.count_nonzero(num_new == ONE) == num_new.size
            self._decoded = (rows, self.version) if even else (None, 0)

    def _begin_run(self, rows: Int64) -> DecodeRun | None:
        """Return a run of a batch that just made a step of one token each, unless it is odd.

        That step wrote into each open page. So nobody else owns it, it can not be found, and it has
        no twin; and until the version changes nothing of that does.
        """
        length = self._length.take(rows)
        blocks = length // self._size
        offsets = length - blocks * self._size
        if self.prefix is not None and (
            # Tokens are not known, or blocks are to be published still, or never.
            np.count_nonzero(self._known.take(rows) != length)
            or np.count_nonzero(self._prompt_end.take(rows) > length)
            or np.count_nonzero(self._published.take(rows) != blocks)
            or np.count_nonzero(self._taint.take(rows))
        ):
            return None
        opened = offsets.nonzero()[0]
        pages = self._table[rows[opened], blocks[opened]]
        places = np.zeros_like(length)
        places[opened] = pages * self._size + offsets[opened]
        return DecodeRun(rows, self._ids[rows], length, offsets, places)

    def _turn_of(self, run: DecodeRun) -> Turn | None:
        """Return the members of a run that are at a block's end now; None if one has odd keys."""
        offset = -run.num_steps % self.page_size
        turn = run.turns.get(offset)
        if turn is None:
            members = run.members_at(offset)
            rows = run.rows[members]
            # The page of an empty sequence is never looked at.
            blocks = self._length[rows] // self._size
            pages = self._table[rows, blocks - ONE].astype(np.intp)
            turn = Turn(members, rows, blocks, pages)
            if self.prefix is not None:
                chains = [self._chains[row] for row in rows.tolist()]
                # Of the blocks that are published, and of no others: a run begins with no block
                # to be published, and no token announced.
                turn.keys = [chain.keys for chain in chains]
                for chain in chains:
                    # The keys of further blocks must depend on nothing but their tokens.
                    if chain.extras and max(chain.extras) >= len(chain.keys):
                        self._decoded = run.rows, HOPELESS
                        return None
            run.turns[offset] = turn
        return turn

    def _publish_run(self) -> bool:
        """Publish the blocks that a run filled; tell whether it was done, else nothing changed."""
        run, self._run = self._run, None
        if run is None:
            return False
        if self.prefix is not None:
            turn = self._turn_of(run)
            if turn is None:
                return False
            self._published[turn.rows] = turn.blocks
            # Each page was taken by one of them and has been its own since.
            self._publish_next_blocks(turn.keys, turn.pages, fresh=True)
        self._run = run
        return True

    # A step that is aborted, and tokens that are hidden, end a run without a new version.

    def _cut(self, rows: Int64, lengths: Int64) -> Int32:
        self._run = None
        return super()._cut(rows, lengths)

    def _taint_rows(self, rows: Int64) -> None:
        self._run = None
        super()._taint_rows(rows)
