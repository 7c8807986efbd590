"""What one swap moves between the device and the host, and what is known of swapped sequences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..errors import OutOfHostPages, OutOfWindowSlots
from .arguments import Bools, Int32, Int64, integer
from .page_pool import CountedPool


@dataclass(frozen=True, slots=True, eq=False)
class SwapPlan:
    """Copies between the tiers, for a data plane to make before the swap is committed.

    Pairs go from left to right when sequences are swapped out, from right to left when they come
    back. Until then neither side is used for anything else.

    Attributes
    ----------
    direction : {"out", "in"}
        From the device to the host, or back.
    seq_ids : int64[B]
        The sequences, in the order given.
    pages, host_pages : int32[n]
        Pages of the device and of the host, whole pages of all layers. Pages whose bytes are on the
        other side already are left out.
    window_slots, rings : int32[k]
        Window slots of the device, and rings of the host.
    ring_spans : int64[k, 2]
        Positions ``[begin, end)`` of each that hold tokens; position p is row ``p mod W``.
    sink_records, sink_host_pages : int32[j]
        Sink records of the device, and the pages of the host (of block 0) whose sinks they are.
    num_sinks : int64[j]
        Sinks of each, from row 0 on; rows behind them stay as they are.
    num_reused : int
        Pages that were not copied because the other side has their bytes.
    """

    direction: Literal["out", "in"]
    seq_ids: Int64
    pages: Int32
    host_pages: Int32
    window_slots: Int32
    rings: Int32
    ring_spans: Int64
    sink_records: Int32
    sink_host_pages: Int32
    num_sinks: Int64
    num_reused: int
    _rows: Int64
    # One entry per block of each sequence, 0 where it was evicted.
    _entry_pages: Int32
    _entry_host_pages: Int32
    # One per sequence, -1 without a window.
    _row_slots: Int32
    _row_rings: Int32


class SwappedRow(NamedTuple):
    """A sequence on the host.

    Attributes
    ----------
    host_pages : int32[blocks]
        Page of the host of each block, 0 where it was evicted.
    findable : bool[blocks]
        Whether its page of the device held a block that could be found.
    ring : int
        Ring of the host, -1 without one.
    """

    host_pages: Int32
    findable: Bools
    ring: int


class HostPool(CountedPool):
    """Pages of the host tier, numbered from 1; 0 stands for none in rows of tables.

    Attributes
    ----------
    rings : CountedPool
        Rings of the exact window on the host, numbered from 0; never fewer than pages.
    """

    exhausted = OutOfHostPages
    noun = "host page"

    def __init__(self, num_pages: int) -> None:
        super().__init__(1, integer("num_host_pages", num_pages, 0, (1 << 31) - 2))
        self.num_pages = self._count
        self.rings = _HostRings(0, self._count)


class _HostRings(CountedPool):
    exhausted = OutOfWindowSlots
    noun = "host ring"
