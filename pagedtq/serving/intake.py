"""Taking on requests, and dropping them."""

from __future__ import annotations

import numpy as np

from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    RequestError,
    RequestTooLarge,
    UnknownRequest,
)
from ..paging.arguments import MAX_TOKENS
from ..paging.block_keys import token_array
from ..paging.exclusive import exclusive
from .generation import (
    Completion,
    FinishedRequest,
    GenerationRequest,
    refuse_number,
)
from .jobs import Entry, Job
from .planning import Planning
from .running_batch import FIELDS, SEQS


class Intake(Planning):
    """The requests of a scheduler, from `add` until they leave."""

    @exclusive
    def add(self, request: GenerationRequest) -> None:
        """Take on a request; it waits until it is admitted.

        Raises
        ------
        RequestError
            If its id is taken, or tokens, salts or keys are bad.
        RequestTooLarge
            If it would not fit even alone.
        ArgumentTypeError
            If it is no `GenerationRequest`.
        ConcurrentCallError
            If another call is at work in the scheduler.
        """
        if not isinstance(request, GenerationRequest):
            raise ArgumentTypeError(
                f"add expects a GenerationRequest, got {type(request).__name__}"
            )
        name = request.request_id
        if name in self._numbers:
            raise RequestError(name, "the id is taken by a request that waits or runs; abort it")
        prompt, keys = request.prompt, request.block_keys
        known = not isinstance(prompt, int | np.integer)
        try:
            chain, tokens = None, None
            if known:
                tokens = token_array("prompt", prompt).copy()
                sharing = self.tables.prefix is not None
                if sharing or request.salt or request.extra_keys or keys is not None:
                    chain = self.tables.prepare(
                        tokens if keys is None else None,
                        salt=request.salt,
                        extra_keys=request.extra_keys,
                        block_keys=keys,
                        num_tokens=None if keys is None else tokens.size,
                    )
            elif keys is not None or request.salt or request.extra_keys:
                chain = self.tables.prepare(
                    salt=request.salt,
                    extra_keys=request.extra_keys,
                    block_keys=keys,
                    num_tokens=int(prompt),
                )
            stops = token_array("stop_token_ids", request.stop_token_ids)
        except (ArgumentError, ArgumentTypeError) as error:
            raise RequestError(name, str(error)) from error
        length = int(prompt) if tokens is None else tokens.size
        if not known or not length:
            number = prompt if not known else length
            if type(number) is not int or not 1 <= number <= MAX_TOKENS:
                refuse_number(name, "the number of prompt tokens", number, 1, MAX_TOKENS)
        most = self._most_pages(request, length)
        priority = request.priority if self.options.policy == "priority" else 0
        job = Job(request, self._num_added, priority, length, chain, tokens, most)
        if stops.size and not np.isin(stops, self._stop_tokens).all():
            self._stop_tokens = np.union1d(self._stop_tokens, stops).astype(np.int32)
        self._num_added += 1
        self._numbers[name] = job.number
        self._jobs[job.number] = job
        self._waiting.push(Entry(job, chain=chain))

    def _most_pages(self, request: GenerationRequest, length: int) -> int:
        """Return the pages a request may hold at most; refuse one that cannot be served alone."""
        size, width = self._size, request.width
        name = request.request_id
        if width > self._most_running:
            remedy = "raise max_running, step_tokens or num_window_slots"
            raise RequestTooLarge(name, width, self._most_running, "sequences at a time", remedy)
        last = -(-(length + request.max_tokens - 1) // size)
        shared = length // size
        most = last if width == 1 else shared + width * (last - shared)
        # Independent samples can run one after the other; hypotheses cannot.
        alone = most if request.beam_width or self.options.admission == "whole" else last
        if alone > self._usable:
            remedy = "lower max_tokens or raise num_pages"
            raise RequestTooLarge(name, alone, self._usable, "pages", remedy)
        return most

    @exclusive
    def abort(self, request_id: str) -> FinishedRequest | None:
        """Drop a request, wherever it is, and return what it has generated.

        While a step is open it is dropped when the step ends: None is returned now, and the request
        is among those that `update` reports. Pages that are being copied come back when the copy is
        done, and `has_work` until then.

        Raises
        ------
        UnknownRequest
            If it neither waits nor runs.
        ConcurrentCallError
            If another call is at work in the scheduler.
        """
        try:
            known = request_id in self._numbers
        except TypeError:
            known = False
        if not known:
            raise UnknownRequest(
                str(request_id), "neither waits nor runs here: it was never added, or has left"
            )
        if self._open is not None:
            self._aborting.append(request_id)
            return None
        dropped = self._drop(request_id)
        self._try_closing()
        return dropped

    def _drop(self, request_id: str) -> FinishedRequest:
        job = self._jobs[self._numbers[request_id]]
        gone = self._rows_of(job)
        for at in np.flatnonzero(gone).tolist():
            self._complete(at, "abort")
        if gone.any():
            self._release(gone)
        for prefill in [p for p in self._prefills if p.entry.job is job]:
            self._prefills.remove(prefill)
            self._closing.append(prefill.seq_id)
            self._drop_entry(prefill.entry)
        for entry in self._waiting.remove(job):
            self._drop_entry(entry)
            if entry.parked is not None:
                self._closing += entry.parked.fields[SEQS].tolist()
        for move in self._moves.values():
            if move.entry.job is job:
                self._drop_entry(move.entry)
                move.dropped = True
        return self._leave(job)

    def _drop_entry(self, entry: Entry) -> None:
        """Note what a sequence that was preempted had generated, and give back what it holds."""
        if entry.parked is not None:
            batch_fields = dict(zip(FIELDS, entry.parked.fields, strict=True))
            for track, generated, row in zip(
                *(batch_fields[name].tolist() for name in ("track", "generated", "token_rows")),
                strict=True,
            ):
                self._note_completion(entry.job, track, generated, row, "abort")
            if self._track_tokens:
                self._token_rows.give_back(batch_fields["token_rows"])
        elif entry.generated:
            done = Completion(entry.track, entry.generated, entry.outputs, "abort")
            entry.job.completions.append(done)

    def _leave(self, job: Job) -> FinishedRequest:
        del self._jobs[job.number], self._numbers[job.request.request_id]
        if job.num_found >= 0:
            self._committed -= job.most_pages
        return job.finished()

    def _take_aborting(self) -> list[str]:
        names, self._aborting = self._aborting, []
        return [name for name in dict.fromkeys(names) if name in self._numbers]
