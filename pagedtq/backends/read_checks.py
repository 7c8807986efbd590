"""What a batch reads, checked before anything follows it: ranges, page tables, window slots.

Both backends refuse the same with the same words: what NumPy would turn into an error of its own,
or into a negative index, a kernel would read outside its arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import CacheConfig
from ..errors import ArgumentError, ArgumentTypeError
from ..paging.arguments import Int64, integers
from ..paging.table_views import Reads

Array = npt.NDArray[Any]

#: Window slots and sink records of a batch.
Owners = tuple[Int64, Int64]

_OWNERS = ("window_slots", "sink_records")


def check_ranges(reads: Reads) -> None:
    """Refuse read ranges that are not integers in NumPy arrays ``[batch]``.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Naming the field.
    """
    batch = len(reads.kv_lens)
    for name, field in zip(Reads._fields, reads):
        _check_integers(f"reads.{name}", field)
        if field.shape != (batch,):
            raise ArgumentError(
                f"reads.{name} must have shape [{batch}], one per sequence, got {list(field.shape)}"
            )


def check_table(block_table: Array, reads: Reads) -> None:
    """Refuse a page table of another shape or type than ``int[batch, n]``, and such ranges.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Saying what came.
    """
    check_ranges(reads)
    _check_integers("block_table", block_table)
    batch = len(reads.kv_lens)
    if block_table.ndim != 2 or len(block_table) != batch:
        raise ArgumentError(
            f"block_table must have shape [{batch}, any] (sequences, blocks), "
            f"got {list(block_table.shape)}"
        )


def check_pages(block_table: Array, reads: Reads, config: CacheConfig) -> None:
    """Refuse what would be read outside a page table (of checked shape) or the pool.

    Raises
    ------
    ArgumentError
        A sequence is longer than its row; a block that is read has no page of the pool.
    """
    blocks, page_size, num_pages = block_table.shape[1], config.page_size, config.num_pages
    longest = int(np.minimum(reads.stop, reads.kv_lens).max(initial=0))
    if longest > blocks * page_size:
        raise ArgumentError(
            f"block_table must have {-(-longest // page_size)} blocks for {longest} tokens, "
            f"got {blocks}"
        )
    wild = (block_table < 0) | (block_table >= num_pages)
    if not wild.any():
        return
    # What lies outside the read ranges may hold anything.
    begin = np.arange(blocks) * page_size
    end = begin + page_size
    wild &= (begin < reads.stop[:, None]) & (end > reads.first[:, None])
    wild &= (begin < reads.keep[:, None]) | (end > reads.start[:, None])
    bad = block_table[wild]
    if bad.size:
        raise ArgumentError(f"pages must be in [0, {num_pages - 1}], got {bad[0]} in block_table")


def window_owners(window: Any, batch: int) -> Owners:
    """Return ``window_slots, sink_records`` as ``int64[batch]`` each.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Not a pair; wrong type; not one per sequence.
    """
    if not isinstance(window, tuple | list) or len(window) != 2:
        raise ArgumentTypeError(
            f"window must be a pair of window_slots and sink_records, got {type(window).__name__}"
        )
    slots, records = (integers(name, values) for name, values in zip(_OWNERS, window))
    for name, values in zip(_OWNERS, (slots, records)):
        if values.size != batch:
            raise ArgumentError(
                f"{name} must have one entry per sequence: expected {batch}, got {values.size}"
            )
    return slots, records


def check_owners(owners: Owners, reads: Reads, config: CacheConfig) -> None:
    """Refuse window slots and sink records that do not hold what is read of the exact window.

    Raises
    ------
    ArgumentError
        One outside the window's storage; none (-1) where exact rows are read; more sinks than a
        record has.
    """
    total = config.num_window_slots
    for name, values in zip(_OWNERS, owners):
        bad = values[(values < -1) | (values >= total)]
        if bad.size:
            raise ArgumentError(f"{name} must be in [-1, {total - 1}], got {bad[0]}")
    sinks = np.minimum(reads.first, reads.kv_lens)
    reads_sinks = sinks > np.where(reads.keep > 0, 0, reads.start)
    wide = np.flatnonzero(reads_sinks & (sinks > config.num_sinks))
    if wide.size:
        raise ArgumentError(
            f"reads.first must be at most {config.num_sinks}, the number of sinks, "
            f"got {reads.first[wide[0]]} for sequence {wide[0]} of the batch"
        )
    for name, values, needed in zip(_OWNERS, owners, (reads.stop < reads.kv_lens, reads_sinks)):
        without = np.flatnonzero(needed & (values < 0))
        if without.size:
            raise ArgumentError(
                f"{name} must not be -1 where exact rows are read, got -1 for sequence "
                f"{without[0]} of the batch"
            )


def checked_owners(window: Any, reads: Reads, config: CacheConfig) -> Owners:
    """Return `window_owners` of a batch that passed `check_owners`."""
    owners = window_owners(window, len(reads.kv_lens))
    check_owners(owners, reads, config)
    return owners


def _check_integers(name: str, array: Any) -> None:
    if not isinstance(array, np.ndarray):
        raise ArgumentTypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype.kind not in "iu":
        raise ArgumentTypeError(f"{name} must be integers, got dtype {array.dtype}")
