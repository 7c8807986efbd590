"""Moving sequences and pages between caches of equal format, as chunks of bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..cache import PagedKVCache
from ..errors import WireMismatch
from .digests import codec_digest, sealed_only
from .header import Header, read_header
from .metadata import Metadata, read_metadata
from .reading import CacheReceiver, read_records
from .snapshot import refuse_other_config
from .source import Buffer, ChunkSource
from .writing import page_chunks, sequence_chunks


def export_sequence(cache: PagedKVCache, seq_id: int) -> Iterator[memoryview]:
    """Return the bytes of a sequence, in chunks: pages, exact window and state.

    Parameters
    ----------
    cache : PagedKVCache
        The cache. It must not change until the last chunk was taken.
    seq_id : int
        The sequence; it stays as it is.

    Returns
    -------
    iterator of memoryview
        Some megabytes each; the receiver may keep them.

    Raises
    ------
    UnknownSequence, ArgumentTypeError
        If there is no such sequence.
    StepError
        If a step is open, or (while iterating) the cache changed.
    """
    return sequence_chunks(cache, [seq_id], "sequence")


def import_sequence(cache: PagedKVCache, chunks: Iterable[Buffer]) -> int:
    """Open a sequence from the chunks of `export_sequence`, all of it or nothing.

    Parameters
    ----------
    cache : PagedKVCache
        A cache of the same format and key means; it must not be changed by whoever makes the
        chunks.
    chunks : iterable of bytes-like
        The bytes, cut in any way. All are read.

    Returns
    -------
    int
        The new sequence.

    Raises
    ------
    WireError
        If the bytes are broken, or belong to another format.
    OutOfPages, OutOfWindowSlots
        If the sequence does not fit.
    StepError
        If a step is open, or the cache changed meanwhile.
    """
    source = ChunkSource(chunks)
    header, metadata, front = _read_front(cache, source, "sequence")
    plan = cache.tables.plan_adoption(metadata.image, sealed_only(cache.config))
    receiver = CacheReceiver(cache, metadata, plan)
    try:
        read_records(source, header, metadata, front, receiver.slabs, receiver.rows)
        return int(receiver.finish()[0])
    except BaseException:
        receiver.give_up()
        raise


def export_pages(cache: PagedKVCache, pages: npt.NDArray[np.integer[Any]]) -> Iterator[memoryview]:
    """Return the bytes of bare pages, in chunks; who owns them is not part of it.

    Parameters
    ----------
    cache : PagedKVCache
        The cache. It must not change until the last chunk was taken.
    pages : ndarray of int ``[n]``
        Page ids.

    Raises
    ------
    ArgumentError
        If one is not in the pool.
    """
    return page_chunks(cache, pages)


def import_pages(cache: PagedKVCache, chunks: Iterable[Buffer]) -> npt.NDArray[np.uint8]:
    """Return the slabs of the chunks of `export_pages`, for ``backend.pages.scatter``.

    Parameters
    ----------
    cache : PagedKVCache
        A cache of the same format; it is not changed.
    chunks : iterable of bytes-like
        The bytes, cut in any way.

    Returns
    -------
    ndarray of uint8 ``[n, page_bytes]``

    Raises
    ------
    WireError
        If the bytes are broken, or belong to another format.
    """
    source = ChunkSource(chunks)
    header, metadata, front = _read_front(cache, source, "pages")
    # Kept piece by piece: the count is believed no further than bytes have come.
    pieces: dict[int, npt.NDArray[np.uint8]] = {}

    def keep(slabs: npt.NDArray[np.uint8], begin: int) -> None:
        pieces[begin] = slabs

    read_records(source, header, metadata, front, keep, lambda index, data: None)
    empty = np.empty((0, header.page_bytes), np.uint8)
    return np.concatenate([empty, *(pieces[begin] for begin in sorted(pieces))])


def _read_front(
    cache: PagedKVCache, source: ChunkSource, kind: str
) -> tuple[Header, Metadata, bytes]:
    """Read header and metadata, and refuse what does not belong into the cache."""
    header = read_header(source)
    if header.kind != kind:
        raise WireMismatch("kind", 10, f"expected {kind}, got {header.kind}")
    metadata, raw = read_metadata(source, header)
    refuse_other_config(cache.config, metadata.config)
    if header.codec_digest != codec_digest(cache.config, cache.backend.key_means):
        raise WireMismatch("codec_digest", 48, "the key means differ")
    return header, metadata, header.encode() + raw
