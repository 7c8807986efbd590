"""The kernels whose machine code is checked, by name; page size and strides are run-time values."""

from __future__ import annotations

from pagedtq import preset
from pagedtq.backends.attend_arguments import AttendKernel, tile_tokens
from pagedtq.backends.kernel_source import Specialisation, specialise
from pagedtq.paging.kernel_macros import DTYPE_NUMBERS
from pagedtq.paging.layout import PageLayout

#: Compiled on every run.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

F16 = 16


def _attend(
    head_dim, keys, values, *, prod=False, column_tiles=1, soft_cap=False, tile=256, int8=False
):
    tile = min(tile, tile_tokens(head_dim, keys, values, column_tiles, int8))
    return AttendKernel(head_dim, keys, values, prod, column_tiles, soft_cap, tile, int8)


#: Attention kernels. The budget file counts the loops of these.
ATTEND = {
    "k4v4-d128": _attend(128, 4, 4),
    "k4v4-d128-g16": _attend(128, 4, 4, column_tiles=2),
    "k4v4-d128-page16": _attend(128, 4, 4, tile=16),
    "k4v4-d128-cap": _attend(128, 4, 4, soft_cap=True),
    "k4v4-d64": _attend(64, 4, 4),
    "k4v4-d96": _attend(96, 4, 4),
    "k4v4-d256": _attend(256, 4, 4),
    "k3v3-d128": _attend(128, 3, 3),
    "k3v4-d128": _attend(128, 3, 4),
    "k4v3-d128": _attend(128, 4, 3),
    "k3v2-d128": _attend(128, 3, 2),
    "k2v2-d128": _attend(128, 2, 2),
    "k2v2-d64": _attend(64, 2, 2),
    "prod4v4-d128": _attend(128, 3, 4, prod=True),
    "exact-d128": _attend(128, F16, F16),
    "exact-d64": _attend(64, F16, F16),
}


def specialisation(kernel: AttendKernel) -> Specialisation:
    """What to compile for an attention kernel."""
    return specialise("attend.cu", kernel.macros())


def matrix_instructions(kernel: AttendKernel) -> int:
    """Matrix instructions of one pass of the hot loop: both products of every 16 tokens."""
    per = kernel.head_dim // 16 * (3 if kernel.prod else 2)
    return kernel.tile_tokens // 16 * kernel.column_tiles * per


def elements(kernel: AttendKernel) -> int:
    """Key and value elements that one lane's share of a pass amounts to."""
    return kernel.tile_tokens * kernel.head_dim * 2 // 32


def step_kernels() -> dict[str, Specialisation]:
    """The other kernels of a step, for Prod keys: the form that uses all of their code."""
    config = preset("prod4v4", num_layers=1, num_kv_heads=8, head_dim=128, num_pages=2)
    layer = {**PageLayout(config).kernel_macros(0), "INPUT_DTYPE": DTYPE_NUMBERS["bf16"]}
    files = ("rotate_queries.cu", "merge.cu", "attend_window.cu")
    kernels = {file: specialise(file, layer) for file in files}
    kernels["plan_splits.cu"] = specialise("plan_splits.cu", {})
    kernels["score.cu"] = specialise("score.cu", ATTEND["prod4v4-d128"].macros())
    return kernels
