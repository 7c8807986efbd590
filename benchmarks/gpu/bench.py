"""What stages share: where to run, how to time, what is known so far, how much time is left."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.gpu.figures import SHOWING, Times, time_columns
from benchmarks.gpu.peer_folder import NotHere

T = TypeVar("T")

#: Stages of other libraries.
PEERS = ("sdpa", "flashinfer", "vllm")


class Bench:
    """One stage's run.

    Parameters
    ----------
    stage : str
        Its name, in every row.
    device : Device
        Where kernels run.
    meter : CudaMeter or TrialMeter
        How calls are timed.
    seconds : float
        When to start nothing new.
    size : {"full", "quick", "listing", "tiny"}
        ``quick``, ``listing``: the same kernels on little, on least; ``tiny``: one small head
        dimension as well.
    seed : int
        Of random inputs.
    path : Path, optional
        Where rows are kept, written after every one.
    peers : callable
        What other libraries took at a shape, by name.
    """

    def __init__(
        self,
        stage: str,
        device: Any,
        meter: Any,
        seconds: float = 60.0,
        size: str = "full",
        seed: int = 0,
        path: Path | None = None,
        peers: Callable[[Any], dict[str, Times]] = lambda shape: {},
    ) -> None:
        self.stage, self.device, self.meter = stage, device, meter
        self.size, self.seed, self.path, self.peers = size, seed, path, peers
        self.rows: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.state = "running"
        self._deadline = time.perf_counter() + seconds
        self._copy_rate: float | None = None

    def left(self) -> float:
        """Return the seconds left."""
        return self._deadline - time.perf_counter()

    @property
    def copy_rate(self) -> float:
        """Bytes per second, read plus written, of a copy within the device."""
        if self._copy_rate is None:
            nbytes = self.bytes_for_copies()
            source, target = (self.device.zeros((nbytes,), "u1") for _ in range(2))
            times = self.meter.measure(lambda: self.device.xp.copyto(target, source))
            self._copy_rate = 2 * nbytes / times.median
        return self._copy_rate

    def bytes_for_copies(self) -> int:
        """Return how much the ceilings move."""
        return {"full": 1 << 30, "quick": 1 << 26}.get(self.size, 1 << 12)

    def row(self, label: Mapping[str, Any], **columns: Any) -> None:
        """Keep a row, on disk too."""
        self.rows.append({"stage": self.stage, **label, **columns})
        self.save()

    def timed(
        self,
        label: Mapping[str, Any],
        call: Callable[[], Any],
        calls: int,
        nbytes: int,
        **more: Any,
    ) -> Times:
        """Time a call and keep the row."""
        times = self.meter.measure(call, calls)
        self.row(label, **time_columns(times, nbytes, self.copy_rate), **more)
        return times

    def attempt(self, label: Mapping[str, Any], work: Callable[[], T]) -> T | None:
        """Do something that may fail; what went wrong becomes a row, and the stage goes on."""
        if self.left() <= 0:
            self.row(label, error="not measured: out of time")
            return None
        try:
            return work()
        except NotHere as reason:
            self.row(label, error=f"not run: {reason}")
        except Exception as error:  # whatever a driver or a library may raise
            self.row(label, error=f"failed: {type(error).__name__}: {error}"[:600])
        finally:
            # Calls and what they captured refer to each other.
            gc.collect()
            self.meter.release()
        return None

    def note(self, text: str) -> None:
        """Keep a note, once."""
        if text not in self.notes:
            self.notes.append(text)

    def fits(self, label: Mapping[str, Any], nbytes: int) -> bool:
        """Say whether so much memory is free; keep a row if not."""
        free = self.meter.free_bytes()
        if nbytes > free:
            self.row(label, error=f"not measured: needs {nbytes >> 20} MiB of {free >> 20}")
        return nbytes <= free

    def finish(self) -> None:
        """Say how the stage ended."""
        wrong = [row for row in self.rows if row.get("ok") is False]
        failed = [row for row in self.rows if str(row.get("error", "")).startswith("failed")]
        if self.stage in PEERS:
            failed = []  # its reason is in the row, and the fault not ours
        self.state = "failed" if wrong or failed else "passed"
        left_out = any("error" in row for row in self.rows)
        if self.state == "passed" and self.stage in SHOWING and left_out:
            # What was not compared was not shown to be right.
            self.state = "out of time"
        self.save()

    def save(self) -> None:
        """Write what is known."""
        if self.path is not None:
            known = {
                "device": self.device.name,
                "state": self.state,
                "rows": self.rows,
                "notes": self.notes,
            }
            self.path.write_text(json.dumps(known, default=float), encoding="utf-8")
