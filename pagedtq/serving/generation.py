"""What is asked of the reference scheduler, how it decides, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import msgspec

from ..errors import ConfigError, RequestError
from ..paging.arguments import MAX_TOKENS, Int32, Int64, integer
from ..paging.step_plan import StepPlan
from ..paging.swap_plan import SwapPlan

#: Why a completion ended: all its tokens, a stop token, or `Scheduler.abort`.
Reason: TypeAlias = Literal["length", "stop", "abort"]


class SchedulerOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How steps are put together.

    Parameters
    ----------
    step_tokens : int
        Tokens of a step, never exceeded: one per decoding sequence, the rest for prompts.
    max_running : int
        Sequences that may hold pages at a time; window slots and ``step_tokens`` may allow fewer.
    watermark : float
        Share of the pages that admission leaves free, so that running sequences do not soon need
        what was just given away. Not applied while nothing runs.
    admission : {"prompt", "chunk", "whole"}
        What must fit above the watermark: the whole prompt, or only its next chunk. With "whole"
        a request is admitted if it and all that run fit to their last token: nothing is ever
        preempted, and pages stay empty for tokens that may never come.
    policy : {"fcfs", "priority"}
        Whom admission serves first and preemption spares longest: who came first, or who has the
        lowest ``priority``, then who came first. Nothing overtakes the head of the queue.
    preemption : {"recompute", "swap", "auto"}
        What becomes of a sequence that must give way: it is computed again, or moves to the host
        while that has room, or whichever costs less (`choose_preemption`).
    """

    step_tokens: int = 2048
    max_running: int = 4096
    watermark: float = 0.01
    admission: Literal["prompt", "chunk", "whole"] = "prompt"
    policy: Literal["fcfs", "priority"] = "fcfs"
    preemption: Literal["recompute", "swap", "auto"] = "recompute"

    def __post_init__(self) -> None:
        for field in ("step_tokens", "max_running"):
            value = getattr(self, field)
            if type(value) is not int:
                raise ConfigError(f"{field} must be an integer, got {value!r}")
            if value < 1:
                raise ConfigError(f"{field} must be at least 1, got {value}")
        share = self.watermark
        if type(share) not in (int, float) or not 0 <= share < 1:
            raise ConfigError(f"watermark must be in [0, 1), got {share!r}")
        for field, known in (
            ("admission", ("prompt", "chunk", "whole")),
            ("policy", ("fcfs", "priority")),
            ("preemption", ("recompute", "swap", "auto")),
        ):
            if getattr(self, field) not in known:
                raise ConfigError(f"{field} must be one of {known}, got {getattr(self, field)!r}")


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A prompt and how much to generate for it.

    Parameters
    ----------
    request_id : str
        Its name, which no other request of the scheduler has at the time.
    prompt : sequence of int or int
        Token ids; or only how many there are, for a prompt that is never shared.
    max_tokens : int
        Tokens to generate at most, of each completion.
    num_samples : int
        Completions that are sampled independently and share the prompt.
    beam_width : int
        Hypotheses of a beam search, which go on from each other; 0 for none. The engine chooses
        them, see `Scheduler.update`.
    priority : int
        The lower, the sooner; for the "priority" policy.
    stop_token_ids : sequence of int
        Tokens that end a completion, itself included in it.
    min_tokens : int
        Tokens of a completion before which no stop token ends it.
    salt, extra_keys
        As in `PageTables.open`; they need token ids.
    block_keys : sequence of bytes, optional
        Instead of token ids: keys of the prompt's whole blocks.

    Raises
    ------
    RequestError
        If a number is out of range, or parts contradict each other.
    """

    request_id: str
    prompt: Any
    max_tokens: int
    num_samples: int = 1
    beam_width: int = 0
    priority: int = 0
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    salt: bytes = b""
    extra_keys: Mapping[int, bytes] | None = None
    block_keys: Sequence[bytes] | None = None

    def __post_init__(self) -> None:
        name = self.request_id
        if not isinstance(name, str) or not name:
            raise RequestError(str(name), f"request_id must be a name, got {name!r}")
        # Messages are put together for the bad ones only.
        for field, low, high in _RANGES:
            value = getattr(self, field)
            if type(value) is not int or not low <= value <= high:
                refuse_number(name, field, value, low, high)
        if self.beam_width and self.num_samples > 1:
            raise RequestError(
                name,
                f"a beam search of {self.beam_width} cannot sample {self.num_samples} times; "
                "use one of num_samples and beam_width",
            )

    @property
    def width(self) -> int:
        """Sequences that it decodes at a time."""
        return self.beam_width or self.num_samples


_RANGES = (
    ("max_tokens", 1, MAX_TOKENS),
    ("num_samples", 1, 1 << 16),
    ("beam_width", 0, 1 << 16),
    ("priority", -(1 << 31), (1 << 31) - 1),
    ("min_tokens", 0, MAX_TOKENS),
)


def refuse_number(name: str, field: str, value: object, low: int, high: int) -> None:
    """Refuse a request's number unless it is an integer of another type in its range.

    Raises
    ------
    RequestError
        Naming the request and what is wrong with the number.
    """
    try:
        integer(field, value, low, high)
    except (TypeError, ValueError) as error:
        raise RequestError(name, str(error)) from error


class Completion(msgspec.Struct, frozen=True, gc=False):
    """One finished sequence of a request.

    Parameters
    ----------
    index : int
        Which of the request's sequences; hypotheses of a beam are numbered as they end.
    num_tokens : int
        Tokens generated.
    token_ids : int32[n] or None
        The tokens; None if the scheduler does not keep them.
    reason : {"length", "stop", "abort"}
        Why it ended.
    """

    index: int
    num_tokens: int
    token_ids: Any
    reason: Reason


class FinishedRequest(msgspec.Struct, frozen=True, gc=False):
    """A request that left.

    Parameters
    ----------
    request_id : str
    completions : list of Completion
        In order of their index; an aborted request has those that were done or begun.
    num_prompt_tokens : int
        Length of the prompt.
    num_found_tokens : int
        Those of them that were found in pages when it was first admitted.
    num_preemptions : int
        How often one of its sequences was preempted.
    """

    request_id: str
    completions: list[Completion]
    num_prompt_tokens: int
    num_found_tokens: int
    num_preemptions: int


class ScheduledStep(msgspec.Struct, frozen=True, gc=False):
    """What to compute now.

    Parameters
    ----------
    plan : StepPlan
        The open step of the page tables: decoding sequences first, then chunks of prompts.
    num_decoding : int
        Members that decode.
    chunks : list of tuple
        The other members: request, number of tokens, and whether they end the prompt.
    sample_members : int64[m]
        The member from which each new token is to be sampled; one that ends the prompt of a request
        with several completions is there several times.
    token_ids : int32[N] or None
        The tokens to compute, member after member: zeros where a prompt's are unknown; None if
        tokens are not kept.
    preempted : list of str
        Requests that lost the pages of a sequence to make this step possible.
    num_steps : int
        Decode steps taken as one; 1 unless asked for more.
    swaps : list of SwapPlan
        Copies between device and host to make before anything is computed, in this order. Empty
        for a cache, which makes them itself, and if copies overlap steps.
    """

    plan: StepPlan
    num_decoding: int
    chunks: list[tuple[str, int, bool]]
    sample_members: Int64
    token_ids: Int32 | None
    preempted: list[str]
    num_steps: int = 1
    swaps: Sequence[SwapPlan] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens that the step stores."""
        return self.plan.num_tokens


class StepOutput(msgspec.Struct, frozen=True, gc=False):
    """What a step completed.

    Parameters
    ----------
    finished : list of FinishedRequest
        Requests that left with it.
    started : list of str
        Requests whose first token it sampled.
    """

    finished: list[FinishedRequest]
    started: list[str]


class SchedulerStats(msgspec.Struct):
    """Counts since the scheduler was made.

    Parameters
    ----------
    admitted : int
        Requests that were admitted.
    prompt_tokens, found_tokens : int
        Their tokens, and how many of these were found in pages at first admission.
    preempted : int
        Sequences preempted.
    swapped : int
        Those of them that went to the host.
    swapped_out_pages, swapped_in_pages : int
        Pages copied to the host and back, without those whose bytes were there.
    """

    admitted: int = 0
    prompt_tokens: int = 0
    found_tokens: int = 0
    preempted: int = 0
    swapped: int = 0
    swapped_out_pages: int = 0
    swapped_in_pages: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that was found."""
        return self.found_tokens / self.prompt_tokens if self.prompt_tokens else 0.0
