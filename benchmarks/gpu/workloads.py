"""What is measured on a device: operations, shapes, bytes that must move. Pure arithmetic."""

from __future__ import annotations

from typing import NamedTuple

from pagedtq import CacheConfig
from pagedtq.config import PRESETS
from pagedtq.paging.layout import PageLayout

KV_HEADS, GROUP, DIM, PAGE = 8, 4, 128, 64
BF16_BYTES = 2


class Workload(NamedTuple):
    """One row of the table.

    Attributes
    ----------
    operation : str
        ``attend``, ``score``, ``store``, ``load``, ``copy`` or ``swap``.
    form : str
        A preset.
    batch, tokens : int
        Sequences, and tokens of each; for ``store`` and ``load`` the tokens of one call are
        ``batch * tokens``, for ``copy`` and ``swap`` the pages are ``batch``.
    """

    operation: str
    form: str
    batch: int
    tokens: int

    @property
    def pages(self) -> int:
        """Pages the pool must hold, the null page included."""
        if self.operation == "copy":
            return 1 + 2 * self.batch
        if self.operation == "swap":
            return 1 + self.batch
        return 1 + self.batch * -(-self.tokens // PAGE)

    def config(self) -> CacheConfig:
        """One layer of an 8B model's shape."""
        keys, values = PRESETS[self.form]
        return CacheConfig(
            num_layers=1,
            num_kv_heads=KV_HEADS,
            head_dim=DIM,
            num_pages=self.pages,
            page_size=PAGE,
            keys=keys,
            values=values,
            window=0,
        )

    def bytes_moved(self) -> int:
        """Bytes that must cross the memory interface, whatever the kernel does besides."""
        layout = PageLayout(self.config())
        count = self.batch * self.tokens
        in_pages = round(count * layout.token_bytes)
        dense = 2 * count * KV_HEADS * DIM * BF16_BYTES
        if self.operation == "attend":
            return in_pages
        if self.operation == "score":
            # Keys are about half of a page; exactly, their share of the bits.
            planes = layout.extents[0].planes
            keys = sum(plane.nbytes for name, plane in planes.items() if name.startswith("key"))
            return round(count * KV_HEADS * keys / PAGE) + 4 * count * KV_HEADS * GROUP
        if self.operation in ("store", "load"):
            return in_pages + dense
        per_page = layout.page_bytes
        return (2 if self.operation == "copy" else 1) * self.batch * per_page

    def bf16_bytes(self) -> int:
        """Bytes of the same keys and values in bfloat16."""
        return 2 * self.batch * self.tokens * KV_HEADS * DIM * BF16_BYTES


def full() -> list[Workload]:
    """Return what a run measures."""
    rows = [
        Workload("attend", form, batch, tokens)
        for batch, tokens in ((64, 32768), (64, 4096), (8, 32768), (1, 32768), (1, 131072))
        for form in ("k4v4", "k3v3", "k2v2", "exact")
    ]
    rows += [Workload("attend", form, 64, 32768) for form in ("k3v4", "k8v8", "prod4v4")]
    rows += [Workload("score", form, 8, 32768) for form in ("k4v4", "k2v2")]
    rows += [
        Workload("store", form, 1, tokens) for form in ("k4v4", "k2v2") for tokens in (64, 8192)
    ]
    rows += [Workload("load", "k4v4", 1, 65536)]
    rows += [Workload("copy", "k4v4", 4096, PAGE), Workload("swap", "k4v4", 4096, PAGE)]
    return rows


def quick() -> list[Workload]:
    """Return one small workload per operation."""
    return [
        Workload("attend", "k4v4", 2, 256),
        Workload("attend", "exact", 2, 256),
        Workload("score", "k4v4", 2, 256),
        Workload("store", "k4v4", 1, 64),
        Workload("load", "k4v4", 1, 64),
        Workload("copy", "k4v4", 4, PAGE),
        Workload("swap", "k4v4", 4, PAGE),
    ]


def fitting(rows: list[Workload], free_bytes: int) -> tuple[list[Workload], list[Workload]]:
    """Split workloads into those that fit in memory, beside the same in bfloat16, and others."""

    def need(row: Workload) -> int:
        return PageLayout(row.config()).pool_bytes + row.bf16_bytes() + (1 << 30)

    fit = [row for row in rows if need(row) <= free_bytes]
    return fit, [row for row in rows if need(row) > free_bytes]
