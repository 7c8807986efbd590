"""The link between device and host: which copies it makes, how long they take, when they are done.

It moves ``link_bandwidth`` bytes per second in each direction at the same time, one swap after the
other in each. A copy that overlaps steps takes nothing from them: 50 GB/s beside the 4.3 TB/s of
the device's own memory is about a hundredth.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from ..paging.swap_plan import SwapPlan


class SwapTotals(NamedTuple):
    """What was swapped in a run.

    Attributes
    ----------
    sequences : int
        Sequences that went to the host.
    bytes_out, bytes_in : int
        Bytes copied to the host and back.
    link_seconds : float
        Time that copies took, both directions added.
    wait_seconds : float
        Time in which nothing was computed because copies had to end first.
    """

    sequences: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    link_seconds: float = 0.0
    wait_seconds: float = 0.0


class HostLink:
    """Copies of swaps on a clock.

    Parameters
    ----------
    bandwidth : float
        Bytes per second, in each direction.

    Attributes
    ----------
    bytes_out, bytes_in : int
    link_seconds, wait_seconds : float
        As in `SwapTotals`.
    """

    def __init__(self, bandwidth: float) -> None:
        self._bandwidth = bandwidth
        self._idle_from = {"out": 0.0, "in": 0.0}
        self._under_way: dict[str, deque[tuple[float, SwapPlan]]] = {"out": deque(), "in": deque()}
        self.bytes_out = self.bytes_in = 0
        self.link_seconds = self.wait_seconds = 0.0

    def begin(self, plan: SwapPlan, num_bytes: int, now: float) -> None:
        """Queue a copy that overlaps steps."""
        way = plan.direction
        done = max(now, self._idle_from[way]) + self._count(plan, num_bytes)
        self._idle_from[way] = done
        self._under_way[way].append((done, plan))

    def copy(self, plan: SwapPlan, num_bytes: int) -> float:
        """Make a copy that everything waits for; return the seconds it takes."""
        seconds = self._count(plan, num_bytes)
        self.wait_seconds += seconds
        return seconds

    def take_done(self, now: float) -> list[SwapPlan]:
        """Return the swaps whose copies are done by now, each once."""
        plans = []
        for queue in self._under_way.values():
            while queue and queue[0][0] <= now:
                plans.append(queue.popleft()[1])
        return plans

    def next_done(self) -> float:
        """Return when the next copy is done; infinity if none is under way."""
        ends = (queue[0][0] for queue in self._under_way.values() if queue)
        return min(ends, default=float("inf"))

    def totals(self, sequences: int) -> SwapTotals:
        """Return what was swapped."""
        return SwapTotals(
            sequences, self.bytes_out, self.bytes_in, self.link_seconds, self.wait_seconds
        )

    def _count(self, plan: SwapPlan, num_bytes: int) -> float:
        seconds = num_bytes / self._bandwidth
        self.link_seconds += seconds
        if plan.direction == "out":
            self.bytes_out += num_bytes
        else:
            self.bytes_in += num_bytes
        return seconds
