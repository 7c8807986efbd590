"""Turning bytes back into pages and windows, checked record by record."""

from __future__ import annotations

import hashlib
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends.dtypes import STORAGE
from ..cache import PagedKVCache
from ..cache.swapping import POISON
from ..errors import StepError, WireChecksum, WireMalformed
from ..paging.adoption import AdoptionPlan
from .header import END_MAGIC, FOOTER, TRAILER_BYTES, Header
from .metadata import Metadata
from .source import Source
from .writing import PIECE_BYTES

Bytes = npt.NDArray[np.uint8]
#: Receives slabs ``uint8[n, page_bytes]`` and the index of the first of them.
Receive = Callable[[Bytes, int], None]

_THREADS = 2


def read_records(
    source: Source,
    header: Header,
    metadata: Metadata,
    front: bytes,
    slabs: Receive,
    rows: Callable[[int, bytes], None],
) -> None:
    """Read and check everything behind the metadata, to the end.

    Parameters
    ----------
    source : Source
        Just behind the metadata.
    header, metadata : Header, Metadata
        What was read so far.
    front : bytes
        Its bytes.
    slabs : callable
        Takes checked slabs and the index of the first; called from several threads.
    rows : callable
        Takes the index and the data of each ring record, then of each sink record; the numbering
        goes on.

    Raises
    ------
    WireTruncated, WireChecksum, WireMalformed
        Naming page, ring or sink record and its offset.
    """
    digest = hashlib.sha256(front)
    _read_pages(source, header, slabs, digest.update)
    for index, (name, size) in enumerate(_window_sizes(metadata)):
        offset = source.offset
        record = bytes(source.take(size + FOOTER.size, name))
        data, footer = record[:size], record[size:]
        _check(data, footer, index, name, offset)
        digest.update(footer)
        rows(index, data)
    offset = source.offset
    trailer = bytes(source.take(TRAILER_BYTES, "trailer"))
    magic = trailer[: len(END_MAGIC)]
    if magic != END_MAGIC:
        raise WireMalformed(
            "trailer", offset, f"expected {END_MAGIC.hex(' ')}, got {magic.hex(' ')}"
        )
    if trailer[len(END_MAGIC) :] != digest.digest():
        raise WireChecksum("trailer", offset, "SHA-256 over header and checksums does not match")
    source.expect_end()


class CacheReceiver:
    """Puts what `read_records` reads where an adoption plan has found room.

    Nobody owns these pages and rows until `finish`, so giving up on the way changes nothing.

    Parameters
    ----------
    cache : PagedKVCache
        The cache.
    metadata : Metadata
        What is being read.
    plan : AdoptionPlan
        Where it goes.
    """

    def __init__(self, cache: PagedKVCache, metadata: Metadata, plan: AdoptionPlan) -> None:
        self._cache = cache
        self._plan = plan
        config = cache.config
        self._spans, self._sinks = metadata.ring_spans, metadata.sink_rows
        self._layers = [i for i in range(config.num_layers) if config.has_overlay(i)]

    def slabs(self, slabs: Bytes, begin: int) -> None:
        """Scatter slabs."""
        self._refuse_change()
        self._cache.backend.pages.scatter(slabs, self._plan.pages[begin : begin + len(slabs)])

    def rows(self, index: int, data: bytes) -> None:
        """Write the rows of a ring or of a sink record, all layers."""
        self._refuse_change()
        ring = index < len(self._spans)
        if ring:
            owner = int(self._plan.slots[index])
            places = np.arange(*self._spans[index]) % max(1, self._cache.config.window_tokens)
        else:
            owner = int(self._plan.records[index - len(self._spans)])
            places = np.arange(self._sinks[index - len(self._spans)])
        config = self._cache.config
        shape = (len(self._layers), config.num_kv_heads, 2, places.size, config.head_dim)
        parts = np.frombuffer(data, STORAGE[config.kv_dtype]).reshape(shape)
        for layer, part in zip(self._layers, parts):
            self._cache.backend.window(layer).put_rows(ring, owner, places, part)

    def finish(self) -> npt.NDArray[np.int64]:
        """Open the sequences and return their ids."""
        self._refuse_change()
        pages = self._cache.backend.pages
        waiting = self._plan.pages[self._plan.image.num_filled :]
        if self._cache.debug:
            pages.fill(waiting, POISON)
        # As of any new page: a norm that was never written must not be NaN.
        pages.clear_norms(waiting)
        ids = self._cache.tables.adopt(self._plan)
        if self._cache.debug:
            self._cache.check_integrity()
        return ids

    def give_up(self) -> None:
        """Leave the pages as free pages are."""
        if self._cache.debug and self._cache.tables.version == self._plan.version:
            self._cache.backend.pages.fill(self._plan.pages, POISON)

    def _refuse_change(self) -> None:
        if self._cache.tables.version != self._plan.version:
            raise StepError("the cache changed while sequences were being read into it")


def _read_pages(
    source: Source, header: Header, slabs: Receive, digest: Callable[[bytes], None]
) -> None:
    """Read, check and hand on all pages; check some pieces while the next ones arrive."""
    pieces = _pieces(source, header)
    if header.num_filled * header.page_stride <= PIECE_BYTES:
        # Starting a thread takes longer than checking a small piece.
        for piece, begin, offset in pieces:
            digest(piece[:, header.page_bytes :].tobytes())
            _check_pages(piece, begin, offset, header, slabs)
        return
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="pagedtq-wire") as threads:
        pending: deque[Future[None]] = deque()
        for piece, begin, offset in pieces:
            digest(piece[:, header.page_bytes :].tobytes())
            pending.append(threads.submit(_check_pages, piece, begin, offset, header, slabs))
            # Results come in order, so that the first broken page is the one that is named.
            if len(pending) > 2 * _THREADS:
                pending.popleft().result()
        while pending:
            pending.popleft().result()


def _pieces(source: Source, header: Header) -> Iterator[tuple[Bytes, int, int]]:
    """Yield page records ``uint8[n, page_stride]``, the first one's index and its offset."""
    per_piece = max(1, PIECE_BYTES // header.page_stride)
    for begin in range(0, header.num_filled, per_piece):
        count = min(per_piece, header.num_filled - begin)
        offset = source.offset
        raw = source.take(count * header.page_stride, f"page {begin}")
        yield np.frombuffer(raw, np.uint8).reshape(count, -1), begin, offset


def _check_pages(piece: Bytes, begin: int, offset: int, header: Header, slabs: Receive) -> None:
    for index, record in enumerate(piece):
        data, footer = record[: header.page_bytes], record[header.page_bytes :].tobytes()
        number = begin + index
        _check(data, footer, number, f"page {number}", offset + index * header.page_stride)
    slabs(piece[:, : header.page_bytes], begin)


def _check(data: Any, footer: bytes, index: int, name: str, offset: int) -> None:
    claimed, got = FOOTER.unpack(footer)
    expected = zlib.crc32(data, zlib.crc32(footer[:4]))
    if got != expected:
        raise WireChecksum(name, offset, f"CRC32 is {expected:08x}, its footer says {got:08x}")
    if claimed != index:
        raise WireMalformed(name, offset, f"expected record {index}, got record {claimed}")


def _window_sizes(metadata: Metadata) -> Iterator[tuple[str, int]]:
    row = metadata.row_bytes
    for index, (begin, end) in enumerate(metadata.ring_spans):
        yield f"ring {index}", (end - begin) * row
    for index, count in enumerate(metadata.sink_rows):
        yield f"sinks {index}", count * row
