"""What is in a file, and whether it is whole: everything is checked, no cache is built."""

from __future__ import annotations

import os

import msgspec
import numpy as np

from ..config import CacheConfig
from ..errors import WireError
from .atomic import AnyPath
from .header import Header
from .metadata import Metadata, read_metadata
from .reading import read_records
from .snapshot import open_mapped


class SequenceReport(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence of a file.

    Attributes
    ----------
    length, coded, ring_start, num_sinks : int
        Its window state, see `SequenceState`.
    keep, start : int
        Its read boundary, see `Reads`.
    blocks, evicted : int
        Blocks, and how many of them have no page any more.
    """

    length: int
    coded: int
    ring_start: int
    num_sinks: int
    keep: int
    start: int
    blocks: int
    evicted: int


class SnapshotReport(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to ``pagedtq inspect --json``.

    Attributes
    ----------
    schema : int
        Version of this report.
    file_bytes : int
        Size of the file.
    whole : bool
        Whether every byte is accounted for and every checksum matches.
    problem, problem_field, problem_offset : str, str, int or None
        What is wrong first, and where.
    kind : str or None
        ``"pages"``, ``"sequence"`` or ``"cache"``; this and what follows is None where the file is
        too broken to tell.
    config_digest, codec_digest : str or None
        In hexadecimal.
    page_bytes, num_pages, num_filled, num_rings, num_sink_records : int or None
        Bytes of a page, and counts; ``num_filled`` pages have bytes in the file.
    config : CacheConfig or None
        Configuration of the cache it came from.
    has_key_means : bool or None
        Whether key means are in it.
    pages_shared : int or None
        Pages that several sequences hold.
    sequences : list of SequenceReport or None
        In the order in which they were opened.
    """

    schema: int
    file_bytes: int
    whole: bool
    problem: str | None = None
    problem_field: str | None = None
    problem_offset: int | None = None
    kind: str | None = None
    config_digest: str | None = None
    codec_digest: str | None = None
    page_bytes: int | None = None
    num_pages: int | None = None
    num_filled: int | None = None
    num_rings: int | None = None
    num_sink_records: int | None = None
    config: CacheConfig | None = None
    has_key_means: bool | None = None
    pages_shared: int | None = None
    sequences: list[SequenceReport] | None = None


def inspect_file(path: AnyPath) -> SnapshotReport:
    """Read a file from end to end and report what is in it.

    Parameters
    ----------
    path : path
        The file.

    Returns
    -------
    SnapshotReport
        A broken file gives a report as well, not an error.

    Raises
    ------
    OSError
        If the file cannot be read.
    """
    report = SnapshotReport(schema=1, file_bytes=os.stat(path).st_size, whole=False)
    try:
        source, header = open_mapped(path)
        report = _with_header(report, header)
        metadata, raw = read_metadata(source, header)
        report = _with_metadata(report, metadata)
        front = header.encode() + raw
        read_records(source, header, metadata, front, lambda *_: None, lambda *_: None)
    except WireError as error:
        return msgspec.structs.replace(
            report, problem=str(error), problem_field=error.field, problem_offset=error.offset
        )
    return msgspec.structs.replace(report, whole=True)


def _with_header(report: SnapshotReport, header: Header) -> SnapshotReport:
    return msgspec.structs.replace(
        report,
        kind=header.kind,
        config_digest=header.config_digest.hex(),
        codec_digest=header.codec_digest.hex(),
        page_bytes=header.page_bytes,
        num_pages=header.num_pages,
        num_filled=header.num_filled,
        num_rings=header.num_rings,
        num_sink_records=header.num_records,
    )


def _with_metadata(report: SnapshotReport, metadata: Metadata) -> SnapshotReport:
    image, size = metadata.image, metadata.config.page_size
    owners = np.bincount(image.blocks[image.blocks > 0])
    names = ("length", "coded", "ring_start", "num_sinks", "keep", "start", "blocks", "evicted")
    columns = (*image.states.T, image.block_counts(size), image.evicted_counts(size))
    sequences = [
        SequenceReport(**dict(zip(names, values)))
        for values in zip(*(column.tolist() for column in columns))
    ]
    return msgspec.structs.replace(
        report,
        config=metadata.config,
        has_key_means=metadata.key_means is not None,
        pages_shared=int((owners > 1).sum()),
        sequences=sequences,
    )
