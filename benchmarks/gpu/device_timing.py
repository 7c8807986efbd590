"""Timing on a CUDA device with events, its ceilings, and the baseline. Needs CuPy and a device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu.figures import Times
from benchmarks.gpu.workloads import DIM, GROUP, KV_HEADS, Workload

#: Seconds that one measurement may take, warm-up left out.
BUDGET_SECONDS = 0.5
_ROUNDS = 15


def measure(cupy: Any, call: Callable[[], Any]) -> Times:
    """Time a call in rounds of several, so that launching from Python hides behind the work."""
    stream = cupy.cuda.get_current_stream()

    def once(repeats: int) -> float:
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        for _ in range(repeats):
            call()
        end.record(stream)
        end.synchronize()
        return float(cupy.cuda.get_elapsed_time(begin, end)) / 1e3 / repeats

    once(2)
    estimate = once(2)
    repeats = max(1, min(50, int(BUDGET_SECONDS / _ROUNDS / max(estimate, 1e-7))))
    return Times(tuple(once(repeats) for _ in range(_ROUNDS)))


def ceilings(cupy: Any, device: Any, nbytes: int = 1 << 30) -> dict[str, tuple[int, Times]]:
    """Measure copies: within the device, to pinned memory, and from it; bytes read plus written."""
    source, target = (cupy.zeros(nbytes, cupy.uint8) for _ in range(2))
    pinned = device.pinned((nbytes // 4,), "u1")
    part = source[: nbytes // 4]
    return {
        "device copy": (2 * nbytes, measure(cupy, lambda: cupy.copyto(target, source))),
        "device read": (nbytes, measure(cupy, lambda: source.view(cupy.uint64).max())),
        "to pinned memory": (part.nbytes, measure(cupy, lambda: device.copy_out(pinned, part))),
        "from pinned memory": (
            part.nbytes,
            measure(cupy, lambda: device.copy_in(part, pinned, pinned=True)),
        ),
    }


def torch_baselines(workload: Workload) -> tuple[dict[str, Callable[[], Any]], str | None]:
    """Return PyTorch's attention on contiguous bfloat16, in the call forms worth comparing with.

    The reason instead, where there is no PyTorch that runs here.
    """
    try:
        import torch
    except ImportError:
        return {}, "PyTorch is not installed"
    if not torch.cuda.is_available():
        return {}, "this PyTorch has no CUDA"
    shape = (workload.batch, KV_HEADS, workload.tokens, DIM)
    keys, values = (torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    heads = torch.randn(
        workload.batch, KV_HEADS * GROUP, 1, DIM, dtype=torch.bfloat16, device="cuda"
    )
    rows = heads.view(workload.batch, KV_HEADS, GROUP, DIM)
    attend = torch.nn.functional.scaled_dot_product_attention
    return {
        "torch SDPA bf16, enable_gqa": lambda: attend(heads, keys, values, enable_gqa=True),
        "torch SDPA bf16, group as query rows": lambda: attend(rows, keys, values),
    }, None
