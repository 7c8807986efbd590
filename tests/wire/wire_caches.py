"""Small caches to save and send, and files that are wrong on purpose but sealed again."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from pagedtq import CacheConfig, KeepFirstLast, PagedKVCache, TurboQuant
from pagedtq.wire.header import FOOTER, HEADER_BYTES, Header, read_header
from pagedtq.wire.source import MappedSource

#: Integer fields of the header, in their order; see docs/wire-format.md.
COUNTS = Header._fields[3:]


def small_config(**changes):
    """Pages of 128 bytes: one layer and head, 2-bit codes."""
    fields = {
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "num_pages": 24,
        "page_size": 16,
        "keys": TurboQuant(bits=2),
        "values": TurboQuant(bits=2),
        "window": 16,
        "sinks": 2,
        "num_window_slots": 6,
        "seed": 3,
    }
    return CacheConfig(**{**fields, **changes})


def append(cache, seq, count, seed=0):
    config = cache.config
    shape = (2, config.num_layers, count, config.num_kv_heads, config.head_dim)
    data = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    cache.append(seq, *data)


def busy_cache(config, **options):
    """Forks, a truncated fork, evicted blocks, an empty sequence, a boundary inside a page."""
    cache = PagedKVCache(config, **options)
    first = cache.open()
    append(cache, first, 75, 1)
    second = cache.fork(first)
    append(cache, second, 3, 2)
    third = cache.fork(second)
    cache.truncate(third, 37)
    cache.open()
    fifth = cache.open()
    append(cache, fifth, 9, 3)
    sixth = cache.fork(fifth)
    cache.truncate(sixth, 0)
    cache.evict(first, KeepFirstLast(5, 30))
    cache.evict(second, [0])
    return cache


def one_sequence(config=None, tokens=21, **options):
    """A cache with a sequence of a coded page, an open block in the ring, and sinks."""
    cache = PagedKVCache(small_config() if config is None else config, **options)
    seq = cache.open()
    append(cache, seq, tokens)
    return cache, seq


def assert_same_sequence(cache, seq, other, twin):
    """State and every readable byte agree, and so does what attention makes of them."""
    assert cache.state(seq) == other.state(twin)
    config = cache.config
    queries = np.random.default_rng(5).standard_normal((1, config.num_kv_heads, config.head_dim))
    for layer in range(config.num_layers):
        for mine, theirs in zip(cache.load(layer, seq), other.load(layer, twin)):
            np.testing.assert_array_equal(mine, theirs)
        if cache.length(seq):
            mine = cache.attend(layer, queries.astype(np.float32), seq)
            theirs = other.attend(layer, queries.astype(np.float32), twin)
            for part, twin_part in zip(mine, theirs):
                np.testing.assert_array_equal(part, twin_part)


def frozen(cache):
    """Everything a failed import must leave alone."""
    tables = cache.tables
    ids = tables.sequence_ids()
    held = tables.block_table(ids)
    pages = np.unique(held[held > 0])
    return (
        ids.tolist(),
        [tables.state(seq) for seq in ids.tolist()],
        held.tolist(),
        tables.pool.free_ids().tolist(),
        tables.windows.free_ids().tolist(),
        tables.windows.sink_record.tolist(),
        cache.backend.pages.gather(pages).tobytes(),
        tables.version,
    )


def with_header(data, **fields):
    """Change fields of the header and make its checksum right again."""
    changed = bytearray(data)
    for name, value in fields.items():
        if name in COUNTS:
            struct.pack_into("<Q", changed, 80 + 8 * COUNTS.index(name), value)
        elif name in ("config_digest", "codec_digest"):
            at = 16 if name == "config_digest" else 48
            changed[at : at + 32] = value
        else:
            at, form = {"version": (8, "<H"), "kind": (10, "<H"), "page_format": (12, "<I")}[name]
            struct.pack_into(form, changed, at, value)
    struct.pack_into("<I", changed, HEADER_BYTES - 4, zlib.crc32(changed[: HEADER_BYTES - 4]))
    return bytes(changed)


def with_metadata(data, change):
    """Let ``change(config text, states, blocks)`` edit the metadata, and seal them again.

    ``states`` is int64 ``[n, 7]``, the ring last; ``blocks`` int32. Both are edited in place.
    """
    header = read_header(MappedSource(memoryview(data)))
    changed = bytearray(data)
    text = slice(HEADER_BYTES, HEADER_BYTES + header.config_bytes)
    states_at, count = text.stop, 7 * header.num_sequences
    states = np.frombuffer(changed, "<i8", count, states_at).reshape(-1, 7)
    blocks = np.frombuffer(changed, "<i4", header.num_blocks, states_at + 8 * count)
    new_text = change(bytes(changed[text]), states, blocks)
    del states, blocks
    if new_text is not None:
        assert len(new_text) == header.config_bytes
        changed[text] = new_text
    end = header.pages_offset - 4
    struct.pack_into("<I", changed, end, zlib.crc32(changed[HEADER_BYTES:end]))
    return bytes(changed)


def with_page(data, index, slab):
    """Replace a slab and make its CRC32 right again (the trailer's digest is not)."""
    header = read_header(MappedSource(memoryview(data)))
    at = header.pages_offset + index * header.page_stride
    changed = bytearray(data)
    changed[at : at + header.page_bytes] = slab
    crc = zlib.crc32(slab, zlib.crc32(index.to_bytes(4, "little")))
    changed[at + header.page_bytes : at + header.page_stride] = FOOTER.pack(index, crc)
    return bytes(changed)
