"""The kernels whose machine code is checked, by name; page size and strides are run-time values."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from pagedtq import CacheConfig, Exact, TurboQuant
from pagedtq.backends.attend_kernel import AttendKernel
from pagedtq.backends.kernel_source import Specialisation, specialise
from pagedtq.backends.stream_formats import (
    AHEAD_DIM,
    column_tiles_of,
    is_tuned,
    prefers_int8,
    takes_int8_values,
    tile_tokens,
)
from pagedtq.paging.kernel_macros import DTYPE_NUMBERS
from pagedtq.paging.layout import PageLayout

#: Compiled on every run.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)

F16 = 16


def _attend(
    head_dim,
    keys,
    values,
    *,
    prod=False,
    column_tiles=1,
    soft_cap=False,
    tile=256,
    int8=None,
    int8_values=False,
):
    int8 = prefers_int8(head_dim, keys, prod) if int8 is None else int8
    tokens = tile_tokens(head_dim, keys, values, column_tiles, int8, prod, int8_values)
    tile = min(tile, tokens)
    return AttendKernel(
        head_dim, keys, values, prod, column_tiles, soft_cap, tile, int8, int8_values=int8_values
    )


#: Attention kernels. The budget file counts the loops of these.
ATTEND = {
    "k4v4-d128": _attend(128, 4, 4),
    "k4v4-d128-int8": _attend(128, 4, 4, int8=True),
    "k4v4-d128-g16": _attend(128, 4, 4, column_tiles=2),
    "k4v4-d128-page16": _attend(128, 4, 4, tile=16),
    "k4v4-d128-cap": _attend(128, 4, 4, soft_cap=True),
    "k4v4-d64": _attend(64, 4, 4),
    "k4v4-d96": _attend(96, 4, 4),
    "k4v4-d256": _attend(256, 4, 4),
    "k3v3-d128": _attend(128, 3, 3),
    "k3v3-d128-f16": _attend(128, 3, 3, int8=False),
    "k3v3-d128-v8": _attend(128, 3, 3, int8_values=True),
    "k3v3-d96": _attend(96, 3, 3),
    "k3v3-d128-g16": _attend(128, 3, 3, column_tiles=2),
    "k3v4-d128": _attend(128, 3, 4),
    "k4v3-d128": _attend(128, 4, 3),
    "k3v2-d128": _attend(128, 3, 2),
    "k2v2-d128": _attend(128, 2, 2),
    "k2v2-d128-f16": _attend(128, 2, 2, int8=False),
    "k2v2-d128-g16": _attend(128, 2, 2, column_tiles=2),
    "k2v2-d128-v8": _attend(128, 2, 2, int8_values=True),
    "k2v2-d64": _attend(64, 2, 2),
    "k2v4-d128": _attend(128, 2, 4),
    "prod4v4-d128": _attend(128, 3, 4, prod=True),
    "exact-d128": _attend(128, F16, F16),
    "exact-d64": _attend(64, F16, F16),
}

_CODECS = {
    "k4v4": (TurboQuant(bits=4), TurboQuant(bits=4)),
    "k3v3": (TurboQuant(bits=3), TurboQuant(bits=3)),
    "k2v2": (TurboQuant(bits=2), TurboQuant(bits=2)),
    "k8v8": (TurboQuant(bits=8), TurboQuant(bits=8)),
    "prod4v4": (TurboQuant(bits=4, estimator="prod"), TurboQuant(bits=4)),
    "orthogonal4v4": (
        TurboQuant(bits=4, estimator="prod", projection="orthogonal"),
        TurboQuant(bits=4),
    ),
    "dense4v4": (TurboQuant(bits=4, rotation="dense"), TurboQuant(bits=4, rotation="dense")),
    "searched3v3": (TurboQuant(bits=3, scale="searched"), TurboQuant(bits=3, scale="searched")),
    "exact": (Exact(dtype="f16"), Exact(dtype="f16")),
}

#: Kernels of a page's bytes and of a step, by name: file, codecs, head dim.
_OTHERS = {
    **{f"store-{name}-d128": ("store", name, 128) for name in _CODECS},
    "store-k4v4-d64": ("store", "k4v4", 64),
    "store-k4v4-d96": ("store", "k4v4", 96),
    "store-k4v4-d256": ("store", "k4v4", 256),
    "seal-k4v4-d128": ("seal", "k4v4", 128),
    **{
        f"load-{name}-d128": ("load", name, 128)
        for name in ("k4v4", "k3v3", "prod4v4", "dense4v4", "exact")
    },
    "store_window-d128": ("store_window", "k4v4", 128),
    "write_bounds-k4v4-d128": ("write_bounds", "k4v4", 128),
    **{
        f"rotate_queries-{name}-d128": ("rotate_queries", name, 128)
        for name in ("k4v4", "prod4v4", "exact")
    },
    "merge-k4v4-d128": ("merge", "k4v4", 128),
    "merge-dense4v4-d128": ("merge", "dense4v4", 128),
    "attend_window-d128": ("attend_window", "k4v4", 128),
}

#: Kernels that the attention macros specialise.
_SCORES = ("k4v4-d128", "k3v3-d128", "prod4v4-d128")

#: Kernels without specialisations.
_PLAIN = ("plan_splits", "page_stats", "copy_pages", "gather_slabs", "scatter_slabs", "clear_norms")


def specialisation(kernel: AttendKernel) -> Specialisation:
    """What to compile for an attention kernel."""
    return specialise("attend.cu", kernel.macros())


def other_kernels() -> dict[str, Specialisation]:
    """What to compile for all other kernels; the budget file limits their registers."""
    kernels = {name: _page_kernel(*what) for name, what in _OTHERS.items()}
    kernels |= {f"score-{name}": specialise("score.cu", ATTEND[name].macros()) for name in _SCORES}
    return kernels | {name: specialise(name + ".cu", {}) for name in _PLAIN}


def _page_kernel(
    file: str, codecs: str | tuple, head_dim: int, kind: str = "bf16"
) -> Specialisation:
    keys, values = _CODECS[codecs] if isinstance(codecs, str) else codecs
    config = CacheConfig(
        num_layers=1, num_kv_heads=8, head_dim=head_dim, num_pages=2, keys=keys, values=values,
        window=0, key_bounds=not isinstance(keys, Exact),
    )  # fmt: skip
    kinds = dict.fromkeys(("INPUT_DTYPE", "OUTPUT_DTYPE"), DTYPE_NUMBERS[kind])
    return specialise(file + ".cu", {**PageLayout(config).kernel_macros(0), **kinds})


def matrix_instructions(kernel: AttendKernel) -> int:
    """Matrix instructions of one pass of the hot loop: both products of every 16 tokens.

    Keys as bytes take as many as halves: half per term of the query, which has two. Where rows are
    decoded in loops of their own, which are not unrolled, the hot loop has some.
    """
    tuned = all(
        is_tuned(kernel.head_dim, form) for form in (kernel.key_format, kernel.value_format)
    )
    if kernel.head_dim > AHEAD_DIM or not tuned:
        return 1
    per = kernel.head_dim // 16 * (3 if kernel.prod else 2)
    return kernel.tile_tokens // 16 * kernel.column_tiles * per


def elements(kernel: AttendKernel) -> int:
    """Key and value elements that one lane's share of a pass amounts to."""
    return kernel.tile_tokens * kernel.head_dim * 2 // 32


def remaining_attend(head_dim: int) -> Iterator[AttendKernel]:
    """Every tuned attention kernel of a head dim that the list above leaves out."""
    listed = set(ATTEND.values())
    widths = [width for width in (2, 3, 4, F16) if is_tuned(head_dim, width)]
    formats = [(keys, values, False) for keys, values in product(widths, widths)]
    if head_dim % 64 == 0:
        formats += [(3, 4, True), (2, 3, True)]
    for (keys, values, prod), rows, soft_cap in product(formats, (8, 16), (False, True)):
        kernel = _attend(
            head_dim,
            keys,
            values,
            prod=prod,
            column_tiles=column_tiles_of(head_dim, rows, keys, values, prod),
            soft_cap=soft_cap,
        )
        if kernel not in listed:
            listed.add(kernel)
            yield kernel
    bytes_of = ((2, 2, False), (2, 2, True), (3, 3, False), (3, 2, False), (4, 4, False))
    for keys, values, soft_cap in (*bytes_of, (4, 3, False), (F16, 4, False)):
        if takes_int8_values(head_dim, values) and is_tuned(head_dim, keys):
            kernel = _attend(head_dim, keys, values, soft_cap=soft_cap, int8_values=True)
            if kernel not in listed:
                yield kernel


#: Head dims whose tuned kernels the whole gate compiles, and those it decodes element by element.
TUNED_DIMS = (64, 96, 128, 160, 192, 256, 512)
UNTUNED_DIMS = (20, 64, 80, 112, 128, 192, 256, 512)


def untuned_attend(head_dim: int) -> Iterator[AttendKernel]:
    """Attention kernels that decode element by element: right, without a claim to speed."""
    formats = [(8, 8, False), (1, 5, False), (17, 32, False)]
    if not is_tuned(head_dim, 3):
        formats.append((3, 3, True))
    for (keys, values, prod), rows in product(formats, (8, 16)):
        tiles = column_tiles_of(head_dim, rows, keys, values, prod)
        if tiles == (2 if rows > 8 else 1):
            yield _attend(head_dim, keys, values, prod=prod, column_tiles=tiles, soft_cap=rows > 8)


def remaining_scores(head_dim: int) -> Iterator[Specialisation]:
    """Kernels of keys' inner products alone."""
    formats = ((2, False), (3, False), (4, False), (5, False), (8, False), (F16, False), (3, True))
    for (keys, prod), rows in product(formats, (8, 16)):
        tiles = column_tiles_of(head_dim, rows, keys, 4, prod)
        if tiles == (2 if rows > 8 else 1):
            kernel = _attend(head_dim, keys, 4, prod=prod, column_tiles=tiles)
            yield specialise("score.cu", kernel.macros())


#: Head dims of the kernels of a page's bytes.
PAGE_DIMS = (64, 80, 96, 112, 128, 160, 192, 256, 512)


def remaining_pages(head_dim: int) -> Iterator[Specialisation]:
    """Kernels of a page's bytes and of a step for other widths, dims and types of input."""
    for name, file in product(_CODECS, ("store", "load", "seal")):
        yield _page_kernel(file, name, head_dim, "f32" if file == "load" else "f16")
    for file in ("store_window", "write_bounds", "attend_window", "rotate_queries", "merge"):
        yield _page_kernel(file, "orthogonal4v4", head_dim, "f32")
    if head_dim == 128:
        scales = ("norm_corrected", "searched", "unbiased", "none")
        for bits, scale in product((1, 5, 6, 7), scales):
            codec = TurboQuant(bits=bits, scale=scale)
            yield _page_kernel("store", (codec, codec), 128, "f32")
            yield _page_kernel("load", (codec, codec), 128, "f32")


def before_sm80() -> Iterator[AttendKernel]:
    """Attention kernels for sm_75: its matrix instructions, and none."""
    yield _attend(128, 4, 4)
    yield _attend(128, 3, 3, int8=False)
    yield _attend(128, F16, F16)
    yield _attend(128, 4, 4, tile=16)._replace(cuda_cores=True)
