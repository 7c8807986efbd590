"""The batch of a simulation: its rules, and its sequences as a struct of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from ..errors import ConfigError
from .workload import Int64


class BatchingOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How steps are put together.

    Parameters
    ----------
    step_tokens : int
        Tokens of a step: one per decoding sequence, the rest for prefill. Decoding sequences are
        served even beyond it.
    max_running : int
        Sequences that may hold pages at a time; window slots may allow fewer.
    watermark : float
        Share of the pages that admission leaves free, so that running sequences do not soon need
        what was just given away. Not applied while nothing runs.
    admission : {"prompt", "chunk"}
        What must fit above the watermark: the whole prompt, or only its next chunk.
    fast_forward : bool
        Take runs of steps in which only decoding can happen at once. Never changes a result.
    """

    step_tokens: int = 2048
    max_running: int = 4096
    watermark: float = 0.01
    admission: Literal["prompt", "chunk"] = "prompt"
    fast_forward: bool = True

    def __post_init__(self) -> None:
        for field in ("step_tokens", "max_running"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, got {getattr(self, field)}")
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark must be in [0, 1), got {self.watermark}")
        if self.admission not in ("prompt", "chunk"):
            raise ConfigError(f'admission must be "prompt" or "chunk", got {self.admission!r}')


class Prefill:
    """A sequence whose prompt, and after a preemption its output so far, is being processed.

    Attributes
    ----------
    request, seq_id : int
        Index in the workload, and sequence in the page tables.
    target, done : int
        Tokens to process, and processed.
    """

    def __init__(self, request: int, seq_id: int, target: int) -> None:
        self.request, self.seq_id, self.target = request, seq_id, target
        self.done = 0


class DecodeBatch:
    """Sequences that decode, in the order of their admission.

    Attributes
    ----------
    ids, seqs : int64[n]
        Requests, and sequences in the page tables.
    length : int64[n]
        Tokens stored.
    left : int64[n]
        Output tokens still to sample.
    """

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._rows = np.empty((4, 0), np.int64)
        self._unpack()

    @property
    def size(self) -> int:
        """Number of sequences."""
        return self._rows.shape[1]

    def push(self, request: int, seq_id: int, length: int, left: int) -> None:
        """Add the youngest sequence."""
        self._rows = np.append(self._rows, [[request], [seq_id], [length], [left]], axis=1)
        self._unpack()

    def pop(self) -> tuple[int, int, int]:
        """Remove the youngest sequence; return its request, sequence and tokens left."""
        request, seq_id, _, left = self._rows[:, -1].tolist()
        self._rows = self._rows[:, :-1]
        self._unpack()
        return request, seq_id, left

    def take_complete(self) -> tuple[Int64, Int64]:
        """Remove the sequences with nothing left to sample; return ``ids`` and ``seqs``."""
        complete = self.left == 0
        if not complete.any():
            return self.ids[:0], self.seqs[:0]
        ids, seqs = self.ids[complete], self.seqs[complete]
        self._rows = self._rows[:, ~complete]
        self._unpack()
        return ids, seqs

    def advance(self, steps: int) -> None:
        """Store and sample one token per step in every sequence."""
        self.length += steps
        self.left -= steps

    def with_chunks(self, chunks: Sequence[tuple[Prefill, int]]) -> tuple[Int64, Int64]:
        """Return sequences and their new tokens for a step that also runs prefill chunks."""
        seqs = np.concatenate((self.seqs, np.array([p.seq_id for p, _ in chunks], np.int64)))
        new = np.ones(seqs.size, np.int64)
        new[self.size :] = [n for _, n in chunks]
        return seqs, new

    def pages_for_next(self) -> int:
        """Return how many sequences need a page for their next token."""
        return int(np.count_nonzero(self.length % self._page_size == 0))

    def pages_taken(self, steps: int) -> Int64:
        """Return the pages taken after each of the next steps, cumulated, ``int64[steps]``.

        A sequence with t free slots in its last page takes one in step t + 1, and in every
        ``page_size``-th step after that.
        """
        crossings = np.bincount(-self.length % self._page_size, minlength=self._page_size)
        return np.cumsum(np.resize(crossings, steps))

    def exact_after(self, steps: Int64, limit: int) -> Int64:
        """Return the sum of ``min(length, limit)`` after each number of steps."""
        short = self.length[self.length < limit]
        exact = np.full(steps.size, (self.size - short.size) * limit)
        if short.size:
            exact += np.minimum(short[:, None] + steps, limit).sum(axis=0)
        return exact

    def _unpack(self) -> None:
        self.ids, self.seqs, self.length, self.left = self._rows
