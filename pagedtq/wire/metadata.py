"""The metadata behind the header: configuration, sequences, page tables, key means."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..config import CacheConfig
from ..errors import ArgumentError, ConfigError, WireChecksum, WireMalformed, WireMismatch
from ..paging.layout import PageLayout
from ..paging.sequence_image import SequenceImage, check_image
from .digests import codec_digest, sealed_only
from .header import FOOTER, HEADER_BYTES, TRAILER_BYTES, Header, metadata_bytes, offset_of
from .source import Source

Float32 = npt.NDArray[np.float32]


class Metadata(NamedTuple):
    """What the metadata says.

    Attributes
    ----------
    config : CacheConfig
        Configuration of the cache the bytes came from.
    image : SequenceImage
        Sequences and page tables; empty for bare pages.
    key_means : float32[num_layers, num_kv_heads, head_dim] or None
        Key means.
    """

    config: CacheConfig
    image: SequenceImage
    key_means: Float32 | None

    @property
    def num_overlays(self) -> int:
        """Layers that keep the exact window."""
        return sum(self.config.has_overlay(layer) for layer in range(self.config.num_layers))

    @property
    def row_bytes(self) -> int:
        """Bytes of one exact token over all layers and heads."""
        one = PageLayout(self.config.replace(num_pages=2)).window_row_bytes
        return self.num_overlays * self.config.num_kv_heads * one

    @property
    def ring_spans(self) -> list[tuple[int, int]]:
        """Positions ``[begin, end)`` of each ring record."""
        return [(begin, end) for begin, end in self.image.ring_spans().tolist()]

    @property
    def sink_rows(self) -> list[int]:
        """Rows of each sink record, which belong to `SequenceImage.first_pages` in order."""
        # Bare pages have no sinks, and their number is a promise until they have come.
        if not self.config.num_sinks or not len(self.image.states):
            return []
        rows: list[int] = self.image.sink_rows(self.config.page_size).tolist()
        return rows

    @property
    def windows_bytes(self) -> int:
        """Bytes of all ring and sink records."""
        spans, sinks = self.ring_spans, self.sink_rows
        rows = sum(end - begin for begin, end in spans) + sum(sinks)
        return rows * self.row_bytes + FOOTER.size * (len(spans) + len(sinks))


def encode_metadata(metadata: Metadata, kind: str) -> tuple[Header, bytes]:
    """Return the header and the bytes of the metadata.

    Parameters
    ----------
    metadata : Metadata
        What to write.
    kind : {"pages", "sequence", "cache"}
        What it is.
    """
    config, image, key_means = metadata
    text = config.to_json()
    means = b"" if key_means is None else np.ascontiguousarray(key_means, "<f4").tobytes()
    states = np.concatenate((image.states, image.rings[:, None]), axis=1).astype("<i8")
    size = metadata_bytes(len(text), len(means), len(states), image.blocks.size)
    body = b"".join((text, states.tobytes(), image.blocks.astype("<i4").tobytes(), means))
    body += bytes(size - 4 - len(body))
    page_bytes = PageLayout(config.replace(num_pages=2)).page_bytes
    header = Header(
        kind=kind,
        config_digest=config.format_digest(),
        codec_digest=codec_digest(config, key_means),
        config_bytes=len(text),
        means_bytes=len(means),
        num_sequences=len(states),
        num_blocks=image.blocks.size,
        num_pages=image.num_pages,
        num_filled=image.num_filled,
        num_rings=image.num_rings,
        num_records=len(metadata.sink_rows),
        page_bytes=page_bytes,
        metadata_bytes=size,
        total_bytes=0,
    )
    pages = header.num_filled * header.page_stride
    total = header.pages_offset + pages + metadata.windows_bytes + TRAILER_BYTES
    return header._replace(total_bytes=total), body + zlib.crc32(body).to_bytes(4, "little")


def read_metadata(source: Source, header: Header) -> tuple[Metadata, bytes]:
    """Read the metadata that a header announces, and check that both agree.

    Returns
    -------
    Metadata, bytes
        What it says, and its bytes.

    Raises
    ------
    WireTruncated, WireChecksum, WireMalformed
        Naming the field.
    WireMismatch
        If this version of the library would lay the same pages out differently.
    """
    view = source.take(header.metadata_bytes, "metadata")
    raw = bytes(view)
    expected, got = zlib.crc32(raw[:-4]), int.from_bytes(raw[-4:], "little")
    if got != expected:
        raise WireChecksum(
            "metadata", HEADER_BYTES, f"CRC32 is {expected:08x}, the metadata say {got:08x}"
        )
    at = header.config_bytes
    config = _config(raw[:at])
    states_at = HEADER_BYTES + at
    count = header.num_sequences * 7
    states = np.frombuffer(raw, "<i8", count, at).reshape(-1, 7).astype(np.int64)
    at += 8 * count
    blocks = np.frombuffer(raw, "<i4", header.num_blocks, at).astype(np.int32)
    at += 4 * header.num_blocks
    means = np.frombuffer(raw, "<f4", header.means_bytes // 4, at).astype(np.float32)
    if any(raw[at + header.means_bytes : -4]):
        raise WireMalformed("padding", HEADER_BYTES + at + header.means_bytes, "expected zeros")
    if config.format_digest() != header.config_digest:
        raise WireMalformed("config_digest", 16, "it is not that of the configuration")
    key_means = _key_means(means, config, header)
    rings = states[:, 6]
    if rings.size and not (int(rings.min()) >= -1 and int(rings.max()) < header.num_rings):
        raise WireMalformed("sequences", states_at, "a ring number is out of range")
    image = SequenceImage(
        np.ascontiguousarray(states[:, :6]),
        rings.astype(np.int32),
        blocks,
        header.num_pages,
        header.num_filled,
        header.num_rings,
    )
    metadata = Metadata(config, image, key_means)
    if header.kind != "pages":
        window, sinks = config.window_tokens, config.num_sinks
        try:
            check_image(image, config.page_size, window, sinks, sealed_only(config))
        except ArgumentError as error:
            raise WireMalformed("sequences", states_at, str(error)) from error
    _check_sizes(header, metadata)
    return metadata, raw


def _config(text: bytes) -> CacheConfig:
    try:
        return CacheConfig.from_json(text)
    # Deep nesting is a RecursionError of the JSON decoder, bad UTF-8 a ValueError.
    except (ConfigError, ValueError, RecursionError) as error:
        raise WireMalformed("config", HEADER_BYTES, str(error)) from error


def _key_means(means: Float32, config: CacheConfig, header: Header) -> Float32 | None:
    if header.means_bytes == 0:
        return None
    shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    expected = 4 * shape[0] * shape[1] * shape[2]
    if header.means_bytes != expected:
        field = "means_bytes"
        problem = f"expected 0 or {expected}, got {header.means_bytes}"
        raise WireMalformed(field, offset_of(field), problem)
    if not np.isfinite(means).all():
        raise WireMalformed("key_means", HEADER_BYTES, "they must be finite")
    return means.reshape(shape)


def _check_sizes(header: Header, metadata: Metadata) -> None:
    config = metadata.config
    page_bytes = PageLayout(config.replace(num_pages=2)).page_bytes
    if header.page_bytes != page_bytes:
        problem = f"expected {page_bytes} for this configuration, got {header.page_bytes}"
        raise WireMismatch("page_bytes", offset_of("page_bytes"), problem)
    pages = header.num_filled * header.page_stride
    total = header.pages_offset + pages + metadata.windows_bytes + TRAILER_BYTES
    for field, expected in (
        ("num_records", len(metadata.sink_rows)),
        ("total_bytes", total),
    ):
        got = getattr(header, field)
        if got != expected:
            raise WireMalformed(field, offset_of(field), f"expected {expected}, got {got}")
    if header.codec_digest != codec_digest(config, metadata.key_means):
        raise WireMismatch(
            "codec_digest",
            48,
            "codebooks or layout of this version differ from those that wrote it",
        )
