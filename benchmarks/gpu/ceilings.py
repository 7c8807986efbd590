"""Stage ``ceilings``: what the device can do at most; everything else is a share of this."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.gpu.bench import Bench
from benchmarks.gpu.plain_decode import KERNELS
from pagedtq.backends.page_launches import BLOCK, Launch

# Of kernels/rates.cu.
_CHAINS, _UNROLL = 8, 16
#: Kernel: what it counts, and operations that one instruction of a warp stands for.
RATES = {
    "prmt_rate": ("PRMT", 32, "lanes"),
    "lop3_rate": ("LOP3", 32, "lanes"),
    "hmma_rate": ("HMMA m16n8k16", 2 * 16 * 8 * 16, "multiply-adds, two each"),
    "imma_rate": ("IMMA m16n8k32", 2 * 16 * 8 * 32, "multiply-adds, two each"),
}


def ceilings(bench: Bench) -> None:
    """Measure copies, then instruction rates."""
    bench.attempt({"how": "device copy"}, lambda: _copies(bench))
    for kernel in RATES:
        bench.attempt({"how": RATES[kernel][0]}, lambda kernel=kernel: _rate(bench, kernel))


def _copies(bench: Bench) -> None:
    device, nbytes = bench.device, bench.bytes_for_copies()
    copyto = device.xp.copyto
    source, target = (device.zeros((nbytes,), np.uint8) for _ in range(2))
    source[...] = source.dtype.type(0x5A)
    bench.timed({"how": "device copy"}, lambda: copyto(target, source), 1, 2 * nbytes)
    words = source.view(np.uint64)
    bench.timed({"how": "device read (maximum)"}, words.max, 1, nbytes)
    part = source[: nbytes // 4]
    pinned = device.pinned((nbytes // 4,), np.uint8)
    pinned[...] = 1
    bench.timed({"how": "to pinned memory"}, lambda: device.copy_out(pinned, part), 1, part.nbytes)
    bench.timed(
        {"how": "from pinned memory"},
        lambda: device.copy_in(part, pinned, pinned=True),
        1,
        part.nbytes,
    )


def _rate(bench: Bench, kernel: str) -> None:
    device, (name, operations, unit) = bench.device, RATES[kernel]
    per_processor = 8  # 32 warps
    blocks = per_processor * device.multiprocessors
    rounds = {"full": 4000, "quick": 400}.get(bench.size, 1)
    if name.startswith(("HMMA", "IMMA")):
        rounds = max(1, rounds // 8)
    out = device.zeros((blocks * BLOCK,), np.uint32)
    cycles = device.zeros((blocks,), np.int64)
    launch = Launch(
        str(KERNELS / "rates.cu"),
        kernel,
        {},
        (blocks,),
        (np.int32(rounds), np.uint32(0x3C01), out, cycles),
    )
    times = bench.meter.measure(lambda: device.launch(launch))
    warps = BLOCK // 32
    instructions = rounds * _CHAINS * _UNROLL * warps
    clocks = float(np.median(device.download(cycles)))
    columns: dict[str, Any] = {
        "us": 1e6 * times.median,
        "T operations/s": instructions * blocks * operations / times.median / 1e12,
        "warp instructions per clock and SM": (
            instructions * per_processor / clocks if clocks else None
        ),
    }
    bench.row({"how": name}, **columns, unit=unit)
