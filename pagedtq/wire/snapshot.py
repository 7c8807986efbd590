"""Whole caches in files: saved atomically, loaded from a memory map."""

from __future__ import annotations

import itertools
import mmap
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np

from ..backends import BackendFactory, BackendName
from ..cache import PagedKVCache
from ..config import CacheConfig
from ..errors import ArgumentError, WireMalformed, WireMismatch, WireTruncated
from ..paging.layout import PageLayout
from .atomic import AnyPath, write_atomically
from .digests import changed_fields, sealed_only
from .header import Header, read_header
from .metadata import read_metadata
from .reading import CacheReceiver, read_records
from .source import MappedSource
from .writing import Allocate, Bytes, Task, sequence_chunks

#: Pieces that may be ready before the disk takes them: its pauses do not stop the making of them.
_PIECES_AHEAD = 4
_THREADS = 2


def save_cache(cache: PagedKVCache, path: AnyPath) -> None:
    """Save all sequences of a cache into one file.

    The file appears under its name when it is complete and on disk, in place of one that was
    there; a save that is interrupted leaves the old file as it was.

    Parameters
    ----------
    cache : PagedKVCache
        The cache; no step may be open.
    path : path
        The file.

    Raises
    ------
    StepError
        If a step is open.
    OSError
        If the file cannot be written.
    """
    ids = cache.tables.sequence_ids()
    buffers = _buffers_in_turn(_PIECES_AHEAD + 1)
    write_atomically(path, sequence_chunks(cache, ids, "cache", buffers, _ahead))


def load_cache(
    path: AnyPath,
    backend: BackendName | BackendFactory = "auto",
    *,
    config: CacheConfig | None = None,
    accumulate: Literal["float32", "float64"] = "float32",
    num_threads: int | None = None,
    debug: bool = False,
) -> PagedKVCache:
    """Load a cache from a file, on any backend.

    Sequences get new ids; ``tables.sequence_ids()`` lists them in the order in which they were
    opened when the cache was saved. The file is mapped, so it must not be cut short by others while
    this runs (`save_cache` never does that to a file).

    Parameters
    ----------
    path : path
        The file.
    backend : {"auto", "host", "cuda"} or callable
        As `PagedKVCache`.
    config : CacheConfig, optional
        The configuration to load into: it may differ from the saved one in ``num_pages``,
        ``num_window_slots``, ``num_host_pages`` and ``pool_order``. By default the saved one, as
        long as its cache fits this machine's memory.
    accumulate, num_threads, debug
        As `PagedKVCache`.

    Raises
    ------
    WireError
        If the file is broken, of another version, or not of this configuration.
    OutOfPages, OutOfWindowSlots
        If ``config`` has too few.
    ArgumentError
        If the saved configuration asks for more memory than this machine has.
    OSError
        If the file cannot be read.
    """
    source, header = open_mapped(path)
    if header.kind != "cache":
        raise WireMismatch("kind", 10, f"expected cache, got {header.kind}")
    metadata, raw = read_metadata(source, header)
    if config is None:
        config = metadata.config
        _refuse_huge(config)
    refuse_other_config(config, metadata.config)
    cache = PagedKVCache(
        config,
        backend,
        key_means=metadata.key_means,
        accumulate=accumulate,
        num_threads=num_threads,
        debug=debug,
    )
    plan = cache.tables.plan_adoption(metadata.image, sealed_only(config))
    receiver = CacheReceiver(cache, metadata, plan)
    front = header.encode() + raw
    read_records(source, header, metadata, front, receiver.slabs, receiver.rows)
    receiver.finish()
    return cache


def read_config(path: AnyPath) -> CacheConfig:
    """Return the configuration of the cache a file came from; pages and windows are not read.

    Parameters
    ----------
    path : str or Path
        A snapshot.

    Raises
    ------
    WireError
        If header or metadata are broken.
    OSError
        If the file cannot be read.
    """
    source, header = open_mapped(path)
    return read_metadata(source, header)[0].config


def open_mapped(path: AnyPath) -> tuple[MappedSource, Header]:
    """Map a file and read its header; the source stands behind it.

    Raises
    ------
    WireError
        If the header is broken, or the file longer or shorter than it says.
    OSError
        If the file cannot be read.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise WireTruncated("header", 0, "the file is empty")
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_SEQUENTIAL"):
        mapped.madvise(mmap.MADV_SEQUENTIAL)
    source = MappedSource(memoryview(mapped))
    header = read_header(source)
    if size < header.total_bytes:
        field = header.field_at(size)
        problem = f"expected a file of {header.total_bytes} bytes, it ends at {size}"
        raise WireTruncated(field, size, problem)
    if size > header.total_bytes:
        left = size - header.total_bytes
        raise WireMalformed("end", header.total_bytes, f"expected no more bytes, {left} follow")
    return source, header


def refuse_other_config(mine: CacheConfig, theirs: CacheConfig) -> None:
    """Raise ``WireMismatch`` naming the fields in which two formats differ."""
    changed = changed_fields(mine, theirs)
    if changed:
        raise WireMismatch(
            "config_digest", 16, f"the configurations differ in {', '.join(changed)}"
        )


def _ahead(tasks: Iterator[Task]) -> Iterator[Bytes]:
    """Make the next pieces on some threads while one is being written."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="pagedtq-wire") as threads:
        pending = deque(threads.submit(task) for task in itertools.islice(tasks, _PIECES_AHEAD))
        while pending:
            piece = pending.popleft().result()
            # Into the buffer of the piece before, which has been written by now.
            pending.extend(threads.submit(task) for task in itertools.islice(tasks, 1))
            yield piece


def _buffers_in_turn(count: int) -> Allocate:
    """Allocate from a few buffers in turn: some are filled while one is written."""
    buffers = [np.empty(0, np.uint8) for _ in range(count)]
    turns = itertools.cycle(range(count))

    def allocate(size: int) -> Bytes:
        turn = next(turns)
        if buffers[turn].size < size:
            buffers[turn] = np.empty(size, np.uint8)
        return buffers[turn][:size]

    return allocate


def _refuse_huge(config: CacheConfig) -> None:
    """Refuse a cache that a few bytes of a file ask for and no memory could hold."""
    layout = PageLayout(config)
    slots = config.num_window_slots if config.window_tokens else 0
    need = layout.pool_bytes + slots * layout.window_slot_bytes
    need += config.num_host_pages * layout.page_bytes
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if need > have:
        raise ArgumentError(
            f"the saved cache takes {need} bytes, this machine has {have}; "
            f"pass a config with fewer pages than {config.num_pages}"
        )
