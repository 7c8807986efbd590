"""The fixed header of a file or stream: what follows it, how much, and for which cache."""

from __future__ import annotations

import struct
import zlib
from typing import NamedTuple

from ..config import FORMAT_VERSION
from ..errors import WireChecksum, WireMalformed, WireVersion
from .source import Source

#: Version of the wire format; the page format has its own.
WIRE_VERSION = 1

#: A byte above 127, both line ends and a DOS end-of-file: transfers as text break it visibly.
MAGIC = b"\x89PTQ\r\n\x1a\n"
END_MAGIC = b"PTQ end\n"

KINDS = {1: "pages", 2: "sequence", 3: "cache"}

_FIXED = struct.Struct("<8sHHI32s32s11Q")
HEADER_BYTES = _FIXED.size + 4
#: Index and CRC32 behind every page, ring and sink record.
FOOTER = struct.Struct("<II")
TRAILER_BYTES = len(END_MAGIC) + 32

#: The metadata is padded so that pages start at a multiple of this.
PAGES_ALIGN = 64
#: Bytes of one sequence in the metadata: six int64 of state, one of the ring.
SEQUENCE_BYTES = 56

# A count that is plainly wrong is refused before anything is computed from it.
_LIMITS = {
    "config_bytes": 1 << 16,
    "means_bytes": 1 << 40,
    "num_sequences": 1 << 24,
    "num_blocks": 1 << 40,
    "num_pages": (1 << 31) - 1,
    "num_filled": (1 << 31) - 1,
    "num_rings": 1 << 24,
    "num_records": 1 << 24,
    "page_bytes": 1 << 40,
    "metadata_bytes": 1 << 42,
    "total_bytes": 1 << 62,
}


class Header(NamedTuple):
    """The fixed header.

    Attributes
    ----------
    kind : {"pages", "sequence", "cache"}
        What the file or stream holds.
    config_digest, codec_digest : bytes
        32 bytes each: `CacheConfig.format_digest`, `codec_digest`.
    config_bytes, means_bytes : int
        Bytes of the configuration's JSON and of the key means.
    num_sequences, num_blocks, num_pages, num_filled, num_rings, num_records : int
        Counts; see `SequenceImage`. ``num_records`` counts sink records.
    page_bytes : int
        Bytes of a slab.
    metadata_bytes : int
        Bytes between the header and the first page.
    total_bytes : int
        Bytes of everything.
    """

    kind: str
    config_digest: bytes
    codec_digest: bytes
    config_bytes: int
    means_bytes: int
    num_sequences: int
    num_blocks: int
    num_pages: int
    num_filled: int
    num_rings: int
    num_records: int
    page_bytes: int
    metadata_bytes: int
    total_bytes: int

    def encode(self) -> bytes:
        """Return the header's bytes, its own CRC32 last."""
        kind = next(number for number, name in KINDS.items() if name == self.kind)
        fixed = _FIXED.pack(MAGIC, WIRE_VERSION, kind, FORMAT_VERSION, *self[1:])
        return fixed + struct.pack("<I", zlib.crc32(fixed))

    @property
    def pages_offset(self) -> int:
        """Where the first page begins."""
        return HEADER_BYTES + self.metadata_bytes

    @property
    def page_stride(self) -> int:
        """Bytes from one page to the next."""
        return self.page_bytes + FOOTER.size

    def field_at(self, offset: int) -> str:
        """Name the part that holds a byte."""
        if offset < self.pages_offset:
            return "metadata" if offset >= HEADER_BYTES else "header"
        index = (offset - self.pages_offset) // self.page_stride
        if index < self.num_filled:
            return f"page {index}"
        return "trailer" if offset >= self.total_bytes - TRAILER_BYTES else "windows"


def metadata_bytes(config: int, means: int, sequences: int, blocks: int) -> int:
    """Return the bytes of metadata: the parts, padding, and a CRC32."""
    parts = config + SEQUENCE_BYTES * sequences + 4 * blocks + means + 4
    return -(-(HEADER_BYTES + parts) // PAGES_ALIGN) * PAGES_ALIGN - HEADER_BYTES


def read_header(source: Source) -> Header:
    """Read and check a header.

    Raises
    ------
    WireTruncated
        If there is less.
    WireVersion
        If it is not this format, or a version that is not known here.
    WireChecksum
        If its CRC32 does not match.
    WireMalformed
        If its counts are out of range or contradict each other.
    """
    raw = bytes(source.take(HEADER_BYTES, "header"))
    magic, version, kind, page_format, *fields = _FIXED.unpack(raw[: _FIXED.size])
    if magic != MAGIC:
        raise WireVersion("magic", 0, f"expected {MAGIC.hex(' ')}, got {magic.hex(' ')}")
    if version != WIRE_VERSION:
        raise WireVersion("version", 8, f"expected {WIRE_VERSION}, got {version}")
    expected, got = zlib.crc32(raw[: _FIXED.size]), int.from_bytes(raw[_FIXED.size :], "little")
    if got != expected:
        raise WireChecksum("header", 0, f"CRC32 is {expected:08x}, the header says {got:08x}")
    if page_format != FORMAT_VERSION:
        raise WireVersion("page_format", 12, f"expected {FORMAT_VERSION}, got {page_format}")
    if kind not in KINDS:
        raise WireMalformed("kind", 10, f"expected one of {sorted(KINDS)}, got {kind}")
    header = Header(KINDS[kind], *fields)
    _check_counts(header)
    return header


def offset_of(field: str) -> int:
    """Return the byte at which an integer field of the header lies."""
    return 80 + 8 * (Header._fields.index(field) - 3)


def _check_counts(header: Header) -> None:
    def refuse(field: str, problem: str) -> None:
        raise WireMalformed(field, offset_of(field), f"{problem}, got {getattr(header, field)}")

    for name, limit in _LIMITS.items():
        if getattr(header, name) > limit:
            refuse(name, f"expected at most {limit}")
    if header.page_bytes == 0:
        refuse("page_bytes", "expected at least 1")
    if header.kind == "sequence" and header.num_sequences != 1:
        refuse("num_sequences", "expected 1 for a sequence")
    if header.kind == "pages" and header.num_filled != header.num_pages:
        refuse("num_filled", f"expected all {header.num_pages} pages to be filled")
    for part, whole in (
        ("num_filled", "num_pages"),
        ("num_pages", "num_blocks"),
        ("num_rings", "num_sequences"),
        ("num_records", "num_sequences"),
    ):
        if header.kind == "pages" and whole != "num_pages":
            whole_count = header.num_pages if part == "num_pages" else 0
        else:
            whole_count = getattr(header, whole)
        if getattr(header, part) > whole_count:
            refuse(part, f"expected at most {whole} {whole_count}")
    if header.kind == "pages" and header.num_sequences + header.num_blocks:
        refuse("num_sequences", "expected no sequences and no blocks beside bare pages")
    expected = metadata_bytes(
        header.config_bytes, header.means_bytes, header.num_sequences, header.num_blocks
    )
    if header.metadata_bytes != expected:
        refuse("metadata_bytes", f"expected {expected}")
    # Rings and sink records have rows, which only the metadata tells; at least they have footers.
    windows = FOOTER.size * (header.num_rings + header.num_records)
    least = header.pages_offset + header.num_filled * header.page_stride + windows + TRAILER_BYTES
    if header.total_bytes < least:
        refuse("total_bytes", f"expected at least {least} for {header.num_filled} pages")
