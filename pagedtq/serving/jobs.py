"""Requests inside the scheduler: waiting in order, in prefill, on the host or on the way."""

from __future__ import annotations

import heapq
from typing import Literal, NamedTuple, TypeAlias

from ..paging.arguments import Int32, Int64
from ..paging.block_chain import BlockChain
from ..paging.swap_plan import SwapPlan
from .generation import Completion, FinishedRequest, GenerationRequest

#: Where a sequence stands among others: priority, number of its request, track. Lower goes first.
Place: TypeAlias = tuple[int, int, int]
#: How the copy of a swap ended; "cancelled" before it began, "dropped" with its request.
Outcome: TypeAlias = Literal["done", "failed", "cancelled", "dropped"]


class Job:
    """A request that the scheduler has taken on.

    Attributes
    ----------
    request : GenerationRequest
    number : int
        How many requests came before it.
    priority : int
        0 for all under first come, first served.
    num_prompt : int
        Tokens of its prompt.
    chain : BlockChain or None
        The prompt, checked and hashed; None if it is never shared.
    tokens : int32[num_prompt] or None
        The prompt, if its tokens are known.
    most_pages : int
        Pages it may come to hold, all its sequences together, if it finds nothing.
    completions : list of Completion
        Those that are done.
    num_found : int
        Prompt tokens found when it was first admitted, -1 before.
    num_preemptions : int
    started : bool
        Whether its first token was sampled.
    """

    __slots__ = (
        "chain",
        "completions",
        "most_pages",
        "num_found",
        "num_preemptions",
        "num_prompt",
        "number",
        "priority",
        "request",
        "started",
        "tokens",
    )

    def __init__(
        self,
        request: GenerationRequest,
        number: int,
        priority: int,
        num_prompt: int,
        chain: BlockChain | None,
        tokens: Int32 | None,
        most_pages: int,
    ) -> None:
        self.request, self.number, self.priority = request, number, priority
        self.num_prompt, self.chain, self.tokens = num_prompt, chain, tokens
        self.most_pages = most_pages
        self.completions: list[Completion] = []
        self.num_found = -1
        self.num_preemptions = 0
        self.started = False

    def finished(self) -> FinishedRequest:
        """Return what is told of it when it leaves."""
        return FinishedRequest(
            self.request.request_id,
            sorted(self.completions, key=lambda completion: completion.index),
            self.num_prompt,
            max(self.num_found, 0),
            self.num_preemptions,
        )


class Parked(NamedTuple):
    """Sequences on the host that were decoding, and go on as they were.

    Attributes
    ----------
    fields : int64[fields, n]
        Their fields in the `RunningBatch`.
    last : int32[n]
        The tokens they sampled last.
    num_pages : int
        Pages they had.
    num_next : int
        Pages that their next tokens take.
    """

    fields: Int64
    last: Int32
    num_pages: int
    num_next: int


class Entry:
    """Something that waits: a whole request, or one sequence of it that was preempted.

    Attributes
    ----------
    job : Job
    track : int
        Which of the request's sequences; -1 for all of them, from the prompt on.
    generated : int
        Tokens it has generated.
    outputs : int32[generated] or None
        These tokens, if they are kept.
    chain : BlockChain or None
        What is to be computed, as far as its tokens are known.
    parked : Parked or None
        Instead, what is on the host.
    """

    __slots__ = ("chain", "generated", "job", "outputs", "parked", "track")

    def __init__(
        self,
        job: Job,
        track: int = -1,
        generated: int = 0,
        outputs: Int32 | None = None,
        chain: BlockChain | None = None,
        parked: Parked | None = None,
    ) -> None:
        self.job, self.track, self.generated = job, track, generated
        self.outputs, self.chain, self.parked = outputs, chain, parked

    @property
    def place(self) -> Place:
        """Its place among others."""
        return self.job.priority, self.job.number, self.track

    @property
    def width(self) -> int:
        """Sequences that run once it is back."""
        if self.parked is not None:
            return self.parked.last.size
        return self.job.request.width if self.track < 0 else 1

    @property
    def target(self) -> int:
        """Tokens that must be computed before it can decode."""
        return self.job.num_prompt + self.generated


class Prefill:
    """An entry that was admitted: its tokens are being computed, chunk by chunk.

    Attributes
    ----------
    entry : Entry
    seq_id : int
        Sequence of the page tables.
    done : int
        Tokens computed or found.
    begun : bool
        Whether some were computed: then it has its window slot.
    """

    __slots__ = ("begun", "done", "entry", "seq_id")

    def __init__(self, entry: Entry, seq_id: int, done: int) -> None:
        self.entry, self.seq_id, self.done = entry, seq_id, done
        self.begun = False


class Move:
    """Sequences whose bytes are under way between device and host.

    Attributes
    ----------
    plan : SwapPlan
        What is copied.
    entry : Entry
        What waits when they are on the host, or has waited for them to come back.
    parked : Parked
        What it holds.
    num_coming : int
        Pages of the device that are free when it ends.
    dropped : bool
        Whether their request has left meanwhile.
    """

    __slots__ = ("dropped", "entry", "num_coming", "parked", "plan")

    def __init__(self, plan: SwapPlan, entry: Entry, parked: Parked, num_coming: int) -> None:
        self.plan, self.entry, self.parked, self.num_coming = plan, entry, parked, num_coming
        self.dropped = False


class WaitingQueue:
    """Entries in the order of their places."""

    def __init__(self) -> None:
        self._heap: list[tuple[Place, Entry]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, entry: Entry) -> None:
        """Add an entry."""
        heapq.heappush(self._heap, (entry.place, entry))

    def head(self) -> Entry | None:
        """Return the entry that comes first."""
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Entry:
        """Remove the entry that comes first."""
        return heapq.heappop(self._heap)[1]

    def remove(self, job: Job) -> list[Entry]:
        """Remove all entries of a request and return them."""
        gone = [entry for _, entry in self._heap if entry.job is job]
        if gone:
            self._heap = [pair for pair in self._heap if pair[1].job is not job]
            heapq.heapify(self._heap)
        return gone
