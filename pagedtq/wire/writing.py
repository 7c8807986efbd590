"""Turning pages, sequences and caches into chunks of bytes."""

from __future__ import annotations

import functools
import hashlib
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..cache import PagedKVCache
from ..errors import StepError
from ..paging.adoption import ExtractedSequences
from ..paging.sequence_image import SequenceImage
from .digests import sealed_only
from .header import END_MAGIC, FOOTER
from .metadata import Metadata, encode_metadata

Bytes = npt.NDArray[np.uint8]
#: Gives room for a chunk of a size.
Allocate = Callable[[int], Bytes]
#: Makes a piece: page records ``uint8[n, page_stride]``.
Task = Callable[[], Bytes]
#: Runs tasks and yields what they return, in order.
Run = Callable[[Iterator[Task]], Iterator[Bytes]]

#: Pages are gathered and written in pieces of about this size.
PIECE_BYTES = 4 << 20


class PageTokens(NamedTuple):
    """How many leading slots of each page are in use, ``int64[num_pages]`` each.

    ``coded`` in layers that keep the exact window, ``stored`` in the others.
    """

    coded: npt.NDArray[np.int64]
    stored: npt.NDArray[np.int64]


def fresh(size: int) -> Bytes:
    """Allocate a chunk that its receiver may keep."""
    return np.empty(size, np.uint8)


def one_by_one(tasks: Iterator[Task]) -> Iterator[Bytes]:
    """Run each task when its piece is asked for."""
    return (task() for task in tasks)


def sequence_chunks(
    cache: PagedKVCache,
    seq_ids: Any,
    kind: str,
    allocate: Allocate = fresh,
    run: Run = one_by_one,
) -> Iterator[memoryview]:
    """Yield the chunks of sequences, header first.

    Parameters
    ----------
    cache : PagedKVCache
        The cache; it must not change until the last chunk.
    seq_ids : integers
        The sequences.
    kind : {"sequence", "cache"}
        What the header calls it.
    allocate : callable
        Where chunks of pages go; called in the order of the chunks.
    run : callable
        How pieces of pages are made: tasks are independent and may run on any thread.

    Raises
    ------
    UnknownSequence, ArgumentError, StepError
    """
    config = cache.config
    only_sealed = sealed_only(config)
    extracted = cache.tables.extract(seq_ids, only_sealed)
    image, size = extracted.image, config.page_size
    used = PageTokens(image.page_tokens(size, True), image.page_tokens(size, False))
    return _chunks(cache, extracted, used, kind, allocate, run)


def page_chunks(cache: PagedKVCache, pages: Any) -> Iterator[memoryview]:
    """Yield the chunks of bare pages, header first."""
    ids = np.asarray(pages)
    cache.backend.pages.check(ids)
    none = np.empty(0, np.int32)
    image = SequenceImage(np.empty((0, 6), np.int64), none, none, ids.size, ids.size, 0)
    extracted = ExtractedSequences(image, ids.astype(np.int32), none)
    full = np.full(ids.size, cache.config.page_size)
    return _chunks(cache, extracted, PageTokens(full, full), "pages", fresh, one_by_one)


def _chunks(
    cache: PagedKVCache,
    extracted: ExtractedSequences,
    used: PageTokens,
    kind: str,
    allocate: Allocate,
    run: Run,
) -> Iterator[memoryview]:
    version = cache.tables.version
    image = extracted.image
    metadata = Metadata(cache.config, image, cache.backend.key_means)
    header, body = encode_metadata(metadata, kind)
    front = header.encode() + body
    digest = hashlib.sha256(front)

    def unchanged() -> None:
        if cache.tables.version != version:
            raise StepError("the cache changed while it was being written out")

    def tasks() -> Iterator[Task]:
        per_piece = max(1, PIECE_BYTES // header.page_stride)
        for begin in range(0, image.num_filled, per_piece):
            unchanged()
            end = min(begin + per_piece, image.num_filled)
            piece = allocate((end - begin) * header.page_stride).reshape(end - begin, -1)
            pages = extracted.pages[begin:end]
            yield functools.partial(_fill_piece, cache, pages, used, begin, piece)

    yield memoryview(front)
    for piece in run(tasks()):
        digest.update(piece[:, header.page_bytes :].tobytes())
        yield piece.reshape(-1).data
    unchanged()
    for record, data in enumerate(_window_records(cache, extracted, metadata)):
        unchanged()
        footer = make_footer(record, data)
        digest.update(footer)
        yield memoryview(data + footer)
    yield memoryview(END_MAGIC + digest.digest())


def _fill_piece(
    cache: PagedKVCache, pages: Any, used: PageTokens, begin: int, piece: Bytes
) -> Bytes:
    """Gather pages into the records of a piece, whose first number is ``begin``, with footers."""
    slabs = piece[:, : -FOOTER.size]
    cache.backend.pages.gather(pages, slabs)
    # What a former owner left behind must not travel, and equal tokens give equal files.
    coded = used.coded[begin : begin + len(piece)]
    for index in np.flatnonzero(coded < cache.config.page_size).tolist():
        _clear_unused(cache, slabs[index], used, begin + index)
    for index, slab in enumerate(slabs):
        piece[index, -FOOTER.size :] = np.frombuffer(make_footer(begin + index, slab), np.uint8)
    return piece


def _clear_unused(cache: PagedKVCache, slab: Bytes, used: PageTokens, page: int) -> None:
    config = cache.config
    for layer in range(config.num_layers):
        tokens = used.coded if config.has_overlay(layer) else used.stored
        if tokens[page] < config.page_size:
            cache.backend.pages.clear_slots(slab, layer, int(tokens[page]))


def make_footer(index: int, data: Any) -> bytes:
    """Return the footer of a record: its index, and a CRC32 over index and data."""
    return FOOTER.pack(index, zlib.crc32(data, zlib.crc32(index.to_bytes(4, "little"))))


def _window_records(
    cache: PagedKVCache, extracted: ExtractedSequences, metadata: Metadata
) -> Iterator[bytes]:
    """Yield the data of ring records, then of sink records."""
    config = cache.config
    for slot, (begin, end) in zip(extracted.slots.tolist(), metadata.ring_spans):
        rows = np.arange(begin, end) % config.window_tokens
        yield _rows(cache, True, slot, rows)
    if config.num_sinks:
        firsts = extracted.pages[extracted.image.first_pages(config.page_size)]
        records = cache.tables.windows.sink_record[firsts].tolist()
        for record, count in zip(records, metadata.sink_rows):
            yield _rows(cache, False, record, np.arange(count))


def _rows(
    cache: PagedKVCache, ring: bool, owner: int, rows: npt.NDArray[np.signedinteger[Any]]
) -> bytes:
    layers = [layer for layer in range(cache.config.num_layers) if cache.config.has_overlay(layer)]
    return b"".join(
        cache.backend.window(layer).take_rows(ring, owner, rows).tobytes() for layer in layers
    )
