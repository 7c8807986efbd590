"""What sampled tokens do to sequences: they begin, go on, branch and end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import ArgumentError
from ..paging.arguments import Bools, Int32, Int64, integers
from ..paging.block_chain import Tokens
from ..paging.block_keys import token_array
from .generation import FinishedRequest, ScheduledStep
from .intake import Intake
from .jobs import Prefill
from .state import NO_TOKENS


class Continuation(Intake):
    """The second half of a step, once its tokens are stored."""

    def _checked_tokens(self, step: ScheduledStep, tokens: Tokens | None) -> Int32 | None:
        if not self._track_tokens:
            if tokens is not None:
                raise ArgumentError("a scheduler without track_tokens takes no tokens")
            return None
        if tokens is None:
            raise ArgumentError(f"expected {step.sample_members.size} sampled tokens, got none")
        sampled = token_array("tokens", tokens)
        if sampled.size != step.sample_members.size:
            raise ArgumentError(
                f"expected {step.sample_members.size} sampled tokens, got {sampled.size}"
            )
        return sampled

    def _checked_parents(self, step: ScheduledStep, parents: Any) -> Int64:
        chosen, own = integers("parents", parents), step.sample_members
        if chosen.shape != own.shape:
            raise ArgumentError(f"expected {own.size} parents, got {chosen.size}")
        for at in np.flatnonzero(chosen != own).tolist():
            number, parent = self._batch.number, int(chosen[at])
            inside = at < step.num_decoding and 0 <= parent < step.num_decoding
            same = inside and number[at] == number[parent]
            if not same or not self._jobs[int(number[at])].request.beam_width:
                raise ArgumentError(
                    f"token {at} cannot continue member {parent}: expected a hypothesis of the "
                    "same beam search"
                )
        return chosen

    def _prepare(self, step: ScheduledStep, parents: Int64 | None) -> list[int]:
        """Do what may fail at the end of a step: find memory, and make its forks, all or none.

        Returns
        -------
        list of int
            The forks, in the order in which they are used.
        """
        sources: list[int] = []
        if parents is not None:
            seqs, own = self._batch.seqs, parents[: step.num_decoding]
            sources += [int(seqs[own[at]]) for at in _later(own)]
        ended = [p for p, count in self._chunks if p.done + count == p.entry.target]
        sources += [p.seq_id for p in ended for _ in range(p.entry.width - 1)]
        begun = sum(p.entry.width for p in ended)
        self._batch.reserve(begun + self.num_held)
        if self._track_tokens:
            generated = int(self._batch.generated.max(initial=0))
            generated = max([generated, *(p.entry.generated for p in ended)])
            self._token_rows.reserve(begun, generated + 1)
        forks: list[int] = []
        try:
            for seq_id in sources:
                forks.append(self._cache.fork(seq_id))
        except BaseException:
            self._closing += forks
            raise
        return forks

    def _continue_beams(self, parents: Int64, forks: Iterator[int]) -> None:
        """Let each sequence go on from its parent: keep, fork and close as needed."""
        batch = self._batch
        moved = np.flatnonzero(parents != np.arange(parents.size))
        if not moved.size:
            return
        seqs = batch.seqs.copy()
        taken = np.zeros(parents.size, np.bool_)
        taken[parents] = True
        self._closing += seqs[~taken].tolist()
        # The first child goes on in its parent's sequence, the others in forks of it.
        _, first = np.unique(parents, return_index=True)
        batch.seqs[first] = seqs[parents[first]]
        for at in _later(parents):
            batch.seqs[at] = next(forks)
        if self._track_tokens:
            self._token_rows.copy(batch.token_rows[parents[moved]], batch.token_rows[moved])
        self._forked = True

    def _start_decoding(
        self, prefill: Prefill, sampled: Int32 | None, forks: Iterator[int]
    ) -> None:
        """Let a prompt that is done decode, once per completion."""
        entry, job = prefill.entry, prefill.entry.job
        generated = entry.generated + 1
        left = job.request.max_tokens - generated
        for at in range(entry.width):
            seq_id = next(forks) if at else prefill.seq_id
            track, row, last = max(entry.track, 0) + at, -1, 0
            if sampled is not None:
                row, last = self._token_rows.take(), int(sampled[at])
                outputs = NO_TOKENS if entry.outputs is None else entry.outputs
                self._token_rows.begin(row, np.append(outputs, sampled[at]))
            fields = job.number, track, seq_id, entry.target, left, generated, job.priority, row
            self._batch.push(fields, last)
        self._forked |= entry.width > 1

    def _retire(self, begin: int) -> list[FinishedRequest]:
        """Close sequences that are complete, of the batch from ``begin`` on."""
        batch = self._batch
        ended: Bools = batch.left == 0
        if begin:
            ended[:begin] = False
        stopped = self._stopped(begin) if self._stop_tokens.size else []
        if stopped:
            ended[stopped] = True
        if not ended.any():
            return []
        finished = []
        for at in np.flatnonzero(ended).tolist():
            job = self._complete(at, "stop" if at in stopped else "length")
            if len(job.completions) == job.request.width:
                finished.append(self._leave(job))
        self._release(ended)
        return finished

    def _stopped(self, begin: int) -> list[int]:
        """Return the sequences whose last token ends them."""
        stopped: list[int] = []
        batch = self._batch
        last, stops = batch.last[begin:], self._stop_tokens
        # One stop token is the common case, and `isin` costs several comparisons.
        hits = last == stops[0] if stops.size == 1 else np.isin(last, stops)
        for at in np.flatnonzero(hits).tolist():
            request = self._jobs[int(batch.number[begin + at])].request
            enough = int(batch.generated[begin + at]) >= request.min_tokens
            if enough and int(batch.last[begin + at]) in request.stop_token_ids:
                stopped.append(begin + at)
        return stopped


def _later(parents: Int64) -> list[int]:
    """Return the children that are not the first of their parent."""
    later = np.ones(parents.size, np.bool_)
    later[np.unique(parents, return_index=True)[1]] = False
    return np.flatnonzero(later).tolist()
