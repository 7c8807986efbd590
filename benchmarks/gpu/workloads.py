"""What is measured on a device: operations, shapes, bytes that must move. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedtq import CacheConfig
from pagedtq.config import PRESETS
from pagedtq.paging.layout import PageLayout

HEADS, LAYERS = 8, 32
BF16_BYTES = 2
#: Bytes that repeated calls go through before they come back: several times any L2.
ROTATED_BYTES = 256 << 20
_MOST_COPIES = 32

#: Tokens of all sequences beyond which a row of the grid is left out.
GRID_TOKENS = 8 << 20


class Workload(NamedTuple):
    """One thing to measure.

    Attributes
    ----------
    operation : str
        ``attend``, ``score``, ``store``, ``copy`` or ``swap``.
    form : str
        A preset.
    batch, tokens : int
        Sequences, and tokens of each; ``store`` writes ``batch * tokens`` in a call, ``copy`` and
        ``swap`` move ``batch`` pages.
    group, dim, page, heads, layers : int
        Query heads per KV head, head dimension, tokens of a page, KV heads, layers of the pool.
    window : int
        Tokens of the exact window, with four sinks.
    order : str
        Of the pool's bytes.
    lengths : tuple of int
        Instead of ``tokens``, where sequences differ.
    """

    operation: str
    form: str
    batch: int
    tokens: int
    group: int = 4
    dim: int = 128
    page: int = 64
    heads: int = HEADS
    layers: int = 1
    window: int = 0
    order: str = "layer_major"
    lengths: tuple[int, ...] = ()

    @property
    def lens(self) -> npt.NDArray[np.int64]:
        """Tokens of every sequence."""
        if self.lengths:
            return np.array(self.lengths, np.int64)
        return np.full(self.batch, self.tokens, np.int64)

    @property
    def blocks(self) -> npt.NDArray[np.int64]:
        """Pages of every sequence."""
        return -(-self.lens // self.page)

    @property
    def copies(self) -> int:
        """Sets of pages that repeated calls take turns in, so that no cache answers."""
        if self.operation in ("copy", "swap", "score", "step") or self.layers > 1:
            return 1
        return max(1, min(_MOST_COPIES, -(-ROTATED_BYTES // max(1, self.bytes_moved()))))

    @property
    def pages(self) -> int:
        """Pages the pool must hold, the null page included."""
        if self.operation in ("copy", "swap"):
            return 1 + (2 if self.operation == "copy" else 1) * self.batch
        return 1 + self.copies * int(self.blocks.sum())

    def config(self) -> CacheConfig:
        """Return the configuration of the cache."""
        return self._config(self.pages)

    def label(self) -> dict[str, Any]:
        """Return what identifies a row."""
        return {
            "operation": self.operation,
            "format": self.form,
            "batch": len(self.lens) if self.lengths else self.batch,
            "tokens": round(float(self.lens.mean())) if self.lengths else self.tokens,
            "group": self.group,
            "d": self.dim,
            "page": self.page,
            "window": self.window,
            "pool": self.order,
            "lengths": "Azure" if self.lengths else "equal",
        }

    def bytes_moved(self) -> int:
        """Bytes that must cross the memory interface, whatever the kernel does besides."""
        layout = PageLayout(self._config(2))
        count = int(self.lens.sum())
        in_pages = round(count * layout.token_bytes / self.layers)
        if self.operation == "attend":
            return in_pages
        if self.operation == "score":
            # Keys are about half of a page; exactly, their share of the bits.
            planes = layout.extents[0].planes
            keys = sum(plane.nbytes for name, plane in planes.items() if name.startswith("key"))
            scores = 4 * count * self.heads * self.group
            return round(count * self.heads * keys / self.page) + scores
        if self.operation == "store":
            return in_pages + self.bf16_bytes()
        return (2 if self.operation == "copy" else 1) * self.batch * layout.page_bytes

    def bf16_bytes(self) -> int:
        """Bytes of the same keys and values in bfloat16."""
        return 2 * int(self.lens.sum()) * self.heads * self.dim * BF16_BYTES

    def memory(self) -> int:
        """Device memory that measuring takes, the largest baseline beside it left out."""
        pool = PageLayout(self._config(self.pages)).pool_bytes
        return pool + (self.bytes_moved() if self.operation in ("score", "swap") else 0) + (1 << 30)

    def shrunk(self, batch: int, tokens: int) -> Workload:
        """Return a trial of it: the same kernels on little."""
        lengths = tuple(min(tokens, length) for length in self.lengths[:batch])
        return self._replace(
            batch=min(self.batch, batch),
            tokens=min(self.tokens, tokens),
            lengths=lengths,
            layers=min(self.layers, 2),
        )

    def _config(self, pages: int) -> CacheConfig:
        keys, values = PRESETS[self.form]
        return CacheConfig(
            num_layers=self.layers,
            num_kv_heads=self.heads,
            head_dim=self.dim,
            num_pages=pages,
            page_size=self.page,
            keys=keys,
            values=values,
            window=self.window,
            num_window_slots=max(1, self.batch),
            pool_order=self.order,  # type: ignore[arg-type]
            kv_dtype="bf16" if self.operation == "store" else "f16",
        )


def attend_rows(azure: tuple[int, ...] = ()) -> list[Workload]:
    """Return attention to measure, what has a figure to reach first.

    Parameters
    ----------
    azure : tuple of int
        Lengths of requests of the Azure trace, empty where it is not at hand.
    """
    bar = Workload("attend", "k4v4", 64, 32768)
    rows = [bar._replace(form=form, group=g) for g in (4, 8) for form in ("k4v4", "k3v3", "k2v2")]
    rows += [bar._replace(batch=1, tokens=8192, form=form) for form in ("k4v4", "k3v3", "k2v2")]
    rows += [bar._replace(form=form) for form in ("exact", "k3v4", "k8v8", "prod4v4")]
    rows += [bar._replace(batch=b, tokens=t) for b, t in grid()]
    rows += [bar._replace(group=1), bar._replace(page=16)]
    rows += [bar._replace(dim=64, form=form) for form in ("k4v4", "k2v2")]
    for scale, some in ((1, azure[:256]), (16, azure[256:320])):
        if some:
            lengths = tuple(scale * length for length in some)
            rows.append(bar._replace(batch=len(some), tokens=max(lengths), lengths=lengths))
    rows += [bar._replace(batch=1, tokens=t, form="exact") for t in (8192, 131072)]
    rows += [bar._replace(group=8, form=form) for form in ("prod4v4", "exact")]
    return list(dict.fromkeys(rows))


def grid() -> list[tuple[int, int]]:
    """Return batch sizes and contexts of the crossover, large and small by turns."""
    pairs = [
        (batch, tokens)
        for tokens in (32768, 1024, 131072, 4096)
        for batch in (1, 8, 32, 64, 256)
        if batch * tokens <= GRID_TOKENS
    ]
    return [(8, 8192), *pairs]


def operation_rows() -> list[Workload]:
    """Return the other operations that have figures to reach."""
    bar = Workload("attend", "k4v4", 64, 32768)
    rows = [Workload("store", form, 1, 8192) for form in ("k4v4", "k2v2")]
    rows += [Workload("store", form, 64, 1) for form in ("k4v4", "k2v2")]
    rows += [bar._replace(operation="score", form=form) for form in ("k4v4", "k3v3", "k2v2")]
    rows += [Workload(what, "k4v4", 1024, 64, layers=LAYERS) for what in ("copy", "swap")]
    rows += [bar._replace(window=window) for window in (0, 64)]
    rows += [
        # 97 GB of pages in use.
        bar._replace(batch=88, layers=LAYERS, order=order)
        for order in ("layer_major", "page_major")
    ]
    return rows


#: Sequences and tokens of trials.
TRIALS = {"quick": (4, 2048), "listing": (2, 300), "tiny": (2, 80)}


def at_size(rows: Iterable[Workload], size: str) -> list[Workload]:
    """Return workloads, or small versions of them, each once; see `Bench`."""
    if size == "full":
        return list(rows)
    small = [row.shrunk(*TRIALS[size]) for row in rows]
    if size == "tiny":
        # A window is a multiple of the page.
        page = {"dim": 64, "page": 16, "heads": 2}
        small = [row._replace(**page, window=16 * (row.window > 0)) for row in small]
    return list(dict.fromkeys(small))
