"""How to preempt a sequence: move its bytes to the host and back, or compute its tokens again.

The rule compares the time each choice takes from the rest of the machine:

* swapping moves the pages (and the exact window) over the link twice:
  ``bytes / out_rate + bytes / in_rate + 2 * latency``, of which copies that overlap compute hide a
  share;
* recomputing prefills the tokens that are not found again as a shared prefix:
  ``tokens / prefill_rate``.

Both grow with the length of the sequence, so that the choice is a property of the machine and the
storage format rather than of the sequence: per token, swapping costs ``token_bytes * 2 / link``,
recomputing ``1 / prefill_rate``. Compressed pages shrink the first and not the second: at 4 bits a
link counts as nearly four times as fast. (The paper on PagedAttention, arXiv 2309.06180, section
7.3, finds recomputation of fp16 pages never more than 1.2 times as slow as swapping.) Attention
makes the prefill rate fall with length; give the rate at the length in question.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, isfinite
from typing import Literal

from ..errors import ArgumentError
from ..paging.arguments import instance, integer, real


@dataclass(frozen=True, slots=True)
class PreemptionCosts:
    """What a machine takes to move bytes and to compute tokens.

    Parameters
    ----------
    out_rate, in_rate : float
        Bytes per second from the device to the host, and back.
    prefill_rate : float
        Tokens per second of a prefill, beside what else runs.
    overlap : float
        Share of the copies that hides behind compute, 0 to 1; swaps that are begun and committed
        around steps hide most of it.
    latency : float
        Seconds a copy takes however small it is.
    """

    out_rate: float
    in_rate: float
    prefill_rate: float
    overlap: float = 0.0
    latency: float = 0.0

    def __post_init__(self) -> None:
        for name in ("out_rate", "in_rate", "prefill_rate", "overlap", "latency"):
            given = getattr(self, name)
            value = real(name, given, -inf)
            if not isfinite(value) or value < 0 or (name.endswith("rate") and value == 0):
                bound = "positive" if name.endswith("rate") else "not negative"
                raise ArgumentError(f"{name} must be {bound} and finite, got {given}")
        if self.overlap > 1:
            raise ArgumentError(f"overlap must be in [0, 1], got {self.overlap}")

    def swap_seconds(self, num_bytes: float) -> float:
        """Return what moving bytes out and back costs the rest."""
        both = num_bytes / self.out_rate + num_bytes / self.in_rate + 2 * self.latency
        return both * (1 - self.overlap)

    def recompute_seconds(self, num_tokens: float) -> float:
        """Return what computing tokens again costs the rest."""
        return num_tokens / self.prefill_rate


def choose_preemption(
    costs: PreemptionCosts,
    num_tokens: int,
    num_bytes: int,
    *,
    num_found: int = 0,
    num_bytes_shared: int = 0,
    host_has_room: bool = True,
) -> Literal["swap", "recompute"]:
    """Choose how to preempt a sequence; equal costs mean recompute, which needs no host.

    Parameters
    ----------
    costs : PreemptionCosts
        The machine.
    num_tokens : int
        Tokens of the sequence.
    num_bytes : int
        Bytes of its pages and its exact window.
    num_found : int
        Of its tokens, those that will likely be found again as a shared prefix: its published
        leading blocks that others use too. They are not computed again.
    num_bytes_shared : int
        Bytes of the pages that others hold as well: they stay on the device, and come back without
        a copy.
    host_has_room : bool
        Whether the host tier can take it.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        If a number is negative or none, or a part is larger than the whole.
    """
    instance("costs", costs, PreemptionCosts)
    integer("num_found", num_found, 0, integer("num_tokens", num_tokens, 0))
    integer("num_bytes_shared", num_bytes_shared, 0, integer("num_bytes", num_bytes, 0))
    if not host_has_room:
        return "recompute"
    swap = costs.swap_seconds(num_bytes - num_bytes_shared)
    recompute = costs.recompute_seconds(num_tokens - num_found)
    return "swap" if swap < recompute else "recompute"
