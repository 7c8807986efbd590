"""From a memory budget to pages and window slots, and back.

Byte counts come from ``PageLayout``; here they are only multiplied and divided.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from .config import PRESETS, CacheConfig, preset
from .errors import ArgumentError, ConfigError
from .models import ModelShape
from .paging.layout import PageLayout

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGT", 1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGT", 1)},
}


class Format(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A way to store the cache, named as in ``k4v4`` or ``k4v4-w0``.

    Parameters
    ----------
    name : str
        As given.
    preset : str
        Codec pair, a key of ``pagedtq.config.PRESETS``.
    window : int or None
        Tokens of the exact window; 0 none, None the default (one page).
    byte_share : float
        Bytes of a page as a share of what the layout says. 1 for what pagedtq stores; ``fp8`` is
        the 16-bit layout at a share of 1/2, there for comparison: pure accounting, no codec.
    """

    name: str
    preset: str
    window: int | None = None
    byte_share: float = 1.0

    @classmethod
    def parse(cls, name: str) -> Format:
        """Read a format's name.

        ``fp16``, ``fp8``, or a preset, optionally followed by ``-wN``: an exact window of N
        tokens (0 turns it off).

        Raises
        ------
        ConfigError
            If there is no such format.
        """
        if name == "fp16":
            return cls(name=name, preset="exact", window=0)
        if name == "fp8":
            return cls(name=name, preset="exact", window=0, byte_share=0.5)
        base, dash, window = name.rpartition("-w")
        if dash and base in PRESETS and re.fullmatch(r"\d{1,7}", window, re.ASCII):
            return cls(name=name, preset=base, window=int(window))
        if name in PRESETS:
            return cls(name=name, preset=name)
        raise ConfigError(
            f"unknown format {name!r}; there are: fp16, fp8, {', '.join(PRESETS)}, "
            "each preset also with -wN for an exact window of N tokens"
        )

    def config(self, shape: ModelShape, page_size: int = 64, **fields: Any) -> CacheConfig:
        """Return the cache configuration of this format for a model shape.

        ``num_pages`` is the smallest allowed unless given: sizing replaces it.
        """
        fields.setdefault("num_pages", 2)
        return preset(
            self.preset,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            page_size=page_size,
            window=self.window,
            **fields,
        )


class Capacity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a memory budget holds.

    Parameters
    ----------
    num_pages : int
        Pages, the null page included, as ``CacheConfig.num_pages`` counts them.
    num_window_slots : int
        Sequences that can own an exact window at a time; 0 if there is none.
    page_size : int
        Tokens in a page.
    page_bytes, window_slot_bytes : int
        Bytes of one page (all layers and heads, alignment included) and of one window.
    """

    num_pages: int
    num_window_slots: int
    page_size: int
    page_bytes: int
    window_slot_bytes: int

    @property
    def usable_pages(self) -> int:
        """Pages that sequences can hold: all but the null page."""
        return self.num_pages - 1

    @property
    def tokens(self) -> int:
        """Tokens that fit in the usable pages."""
        return self.usable_pages * self.page_size

    @property
    def total_bytes(self) -> int:
        """Bytes taken: pages and window slots. Never more than the budget planned for."""
        return self.num_pages * self.page_bytes + self.num_window_slots * self.window_slot_bytes

    def sequences(self, tokens: int) -> int:
        """Return how many sequences of a length fit at a time, slots considered."""
        if tokens < 1:
            raise ArgumentError(f"tokens must be at least 1, got {tokens}")
        by_pages = self.usable_pages // -(-tokens // self.page_size)
        return min(by_pages, self.num_window_slots) if self.window_slot_bytes else by_pages


def plan_capacity(
    config: CacheConfig,
    budget_bytes: int,
    *,
    max_sequences: int | None = None,
    tokens_per_sequence: float | None = None,
    byte_share: float = 1.0,
) -> Capacity:
    """Divide a memory budget between pages and window slots.

    Parameters
    ----------
    config : CacheConfig
        Format and shape; its ``num_pages`` is ignored.
    budget_bytes : int
        Bytes for the pool and the windows together.
    max_sequences : int, optional
        Window slots to set aside. Default: see ``tokens_per_sequence``.
    tokens_per_sequence : float, optional
        Expected length of a running sequence: as many slots as sequences of this length fit with
        their window and pages. Without it and ``max_sequences``, ``config.num_window_slots``.
    byte_share : float
        Scales the page bytes (``Format.byte_share``).

    Returns
    -------
    Capacity
        ``total_bytes <= budget_bytes``.

    Raises
    ------
    ArgumentError
        If the budget does not hold the null page, one page and one window slot.
    """
    layout = PageLayout(config)
    page_bytes = round(layout.page_bytes * byte_share)
    slot_bytes = layout.window_slot_bytes
    slots = 0
    if slot_bytes:
        slots = config.num_window_slots if max_sequences is None else max_sequences
        if max_sequences is None and tokens_per_sequence is not None:
            pages = -(-max(tokens_per_sequence, 1) // config.page_size)
            slots = int((budget_bytes - page_bytes) // (slot_bytes + pages * page_bytes))
            slots = max(1, slots)
    if slots < 0 or (slot_bytes and slots == 0):
        raise ArgumentError(f"max_sequences must be at least 1, got {slots}")
    num_pages = (budget_bytes - slots * slot_bytes) // page_bytes
    if num_pages < 2:
        raise ArgumentError(
            f"need at least {2 * page_bytes + slots * slot_bytes} bytes for the null page, one "
            f"page of {page_bytes} and {slots} window slots of {slot_bytes}; got {budget_bytes}"
        )
    return Capacity(
        num_pages=num_pages,
        num_window_slots=slots,
        page_size=config.page_size,
        page_bytes=page_bytes,
        window_slot_bytes=slot_bytes,
    )


def fit_to_budget(
    config: CacheConfig,
    budget_bytes: int,
    *,
    max_sequences: int | None = None,
    tokens_per_sequence: float | None = None,
) -> CacheConfig:
    """Return the configuration with the ``num_pages`` and window slots that a budget holds.

    Parameters and errors as for ``plan_capacity``; ``bytes_for`` of the result is at most
    ``budget_bytes``, and one more page would exceed it.
    """
    capacity = plan_capacity(
        config,
        budget_bytes,
        max_sequences=max_sequences,
        tokens_per_sequence=tokens_per_sequence,
    )
    slots = capacity.num_window_slots or config.num_window_slots
    return config.replace(num_pages=capacity.num_pages, num_window_slots=slots)


def bytes_for(config: CacheConfig) -> int:
    """Return the bytes of a cache: its pool of pages and its window slots, sinks included."""
    layout = PageLayout(config)
    slots = config.num_window_slots if layout.window_slot_bytes else 0
    return layout.pool_bytes + slots * layout.window_slot_bytes


def parse_bytes(text: str) -> int:
    """Read a size such as ``40GiB``, ``512 MiB``, ``1.5GB`` or plain bytes.

    Raises
    ------
    ArgumentError
        If it is not a positive size with a known unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2]]) if match and match[2] in _UNITS else 0
    if size < 1:
        raise ArgumentError(f"expected a size such as 40GiB, got {text!r}")
    return size


def format_bytes(count: float) -> str:
    """Write a size with a binary unit: ``40 GiB``, ``1.25 MiB``, ``132 B``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"
