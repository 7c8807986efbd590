"""Timing on a CUDA device with events, and what stands in for it where there is none."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from benchmarks.gpu.figures import Times


class CudaMeter:
    """Times calls on CuPy's current stream; PyTorch's default stream is the same one.

    Parameters
    ----------
    device : CupyDevice
        Where.
    budget : float
        Seconds that one measurement may take, warm-up left out.
    rounds : int
        Each of several calls, so that launching from Python hides behind the work.
    """

    def __init__(self, device: Any, budget: float = 0.25, rounds: int = 15) -> None:
        self._cupy, self._budget, self._rounds = device.xp, budget, rounds

    def measure(self, call: Callable[[], Any], calls: int = 1) -> Times:
        """Time something that does ``calls`` operations: seconds per operation."""
        self._once(call, 2)
        estimate = self._once(call, 2)
        repeats = max(1, min(50, int(self._budget / self._rounds / max(estimate, 1e-7))))
        rounds = self._rounds if estimate * self._rounds < 4 * self._budget else 5
        return Times(tuple(self._once(call, repeats) / calls for _ in range(rounds)))

    def free_bytes(self) -> int:
        """Return device memory that is free."""
        return int(self._cupy.cuda.runtime.memGetInfo()[0])

    def release(self) -> None:
        """Give memory back that no array uses."""
        self._cupy.get_default_memory_pool().free_all_blocks()
        self._cupy.get_default_pinned_memory_pool().free_all_blocks()
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()

    def _once(self, call: Callable[[], Any], repeats: int) -> float:
        cuda = self._cupy.cuda
        stream, begin, end = cuda.get_current_stream(), cuda.Event(), cuda.Event()
        begin.record(stream)
        for _ in range(repeats):
            call()
        end.record(stream)
        end.synchronize()
        return float(cuda.get_elapsed_time(begin, end)) / 1e3 / repeats


class TrialMeter:
    """Runs every call once and pretends that it took a millisecond: for trials without a device."""

    def measure(self, call: Callable[[], Any], calls: int = 1) -> Times:
        """Run the call."""
        call()
        return Times(tuple(1e-3 * share / calls for share in (1.0, 0.9, 1.2)))

    def free_bytes(self) -> int:
        """Return enough for a trial."""
        return 1 << 50

    def release(self) -> None:
        """Do nothing."""
