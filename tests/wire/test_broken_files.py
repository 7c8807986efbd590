"""Bytes that are wrong: each gives a typed error with a field and an offset, and loads nothing."""

from __future__ import annotations

import functools
import tracemalloc

import msgspec
import numpy as np
import pytest
from wire_caches import (
    COUNTS,
    busy_cache,
    frozen,
    one_sequence,
    small_config,
    with_header,
    with_metadata,
    with_page,
)

from pagedtq import PagedKVCache
from pagedtq.errors import (
    ArgumentTypeError,
    WireChecksum,
    WireError,
    WireMalformed,
    WireMismatch,
    WireTruncated,
    WireVersion,
)
from pagedtq.wire import export_sequence, import_sequence, inspect_file, load_cache, save_cache
from pagedtq.wire.header import HEADER_BYTES, TRAILER_BYTES, read_header
from pagedtq.wire.source import MappedSource


@functools.cache
def stream():
    """One sequence as bytes: a page of codes, an open block, a ring, sinks."""
    cache, seq = one_sequence()
    return b"".join(export_sequence(cache, seq))


def header_of(data):
    return read_header(MappedSource(memoryview(data)))


@pytest.fixture(scope="module")
def target():
    cache, _ = one_sequence()
    return cache


@pytest.fixture
def load(tmp_path):
    """Load a cache from bytes by way of a file."""

    def run(data):
        (tmp_path / "cache.ptq").write_bytes(data)
        return load_cache(tmp_path / "cache.ptq")

    return run


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "cache.ptq"
    save_cache(busy_cache(small_config()), path)
    return path.read_bytes()


def refusal(target, data):
    """Import wrong bytes; return the error, and prove that nothing changed."""
    with pytest.raises(WireError) as caught:
        import_sequence(target, [data])
    error = caught.value
    assert error.field and 0 <= error.offset <= len(data)
    assert str(error).startswith(f"{error.field} at byte {error.offset}: ")
    return error


def test_a_stream_cut_at_any_byte_is_refused(target):
    data, before = stream(), frozen(target)
    for size in range(len(data)):
        error = refusal(target, data[:size])
        assert type(error) is WireTruncated
        assert error.offset <= size
    assert frozen(target) == before


def test_a_file_cut_at_any_byte_is_refused(snapshot, load):
    fields = set()
    for size in range(len(snapshot)):
        with pytest.raises(WireTruncated) as caught:
            load(snapshot[:size])
        assert caught.value.offset == (size if size >= HEADER_BYTES else 0)
        fields.add(caught.value.field)
    assert {"header", "metadata", "page 0", "page 3", "windows", "trailer"} <= fields


def test_every_flipped_bit_is_found(target):
    data, before = stream(), frozen(target)
    header = header_of(data)
    for byte in range(len(data)):
        # All bits of header and page; elsewhere, one in turn.
        in_page = header.pages_offset <= byte < header.pages_offset + header.page_stride
        for bit in range(8) if byte < HEADER_BYTES or in_page else (byte % 8,):
            changed = bytearray(data)
            changed[byte] ^= 1 << bit
            error = refusal(target, bytes(changed))
            if in_page:
                assert (type(error), error.field) == (WireChecksum, "page 0")
                assert error.offset == header.pages_offset
            elif HEADER_BYTES <= byte < header.pages_offset:
                assert (type(error), error.field) == (WireChecksum, "metadata")
            elif byte < HEADER_BYTES:
                assert type(error) in (WireChecksum, WireVersion)
    assert frozen(target) == before


def test_every_flipped_bit_of_a_snapshots_header_is_found(snapshot, load):
    for byte in range(HEADER_BYTES):
        for bit in range(8):
            changed = bytearray(snapshot)
            changed[byte] ^= 1 << bit
            with pytest.raises(WireError):
                load(bytes(changed))


def test_a_flipped_bit_anywhere_in_a_snapshot_is_found_by_loading_and_inspecting(
    snapshot, load, tmp_path
):
    for byte in range(0, len(snapshot), 7):
        changed = bytearray(snapshot)
        changed[byte] ^= 1 << byte % 8
        with pytest.raises(WireError) as caught:
            load(bytes(changed))
        report = inspect_file(tmp_path / "cache.ptq")
        assert (report.whole, report.problem) == (False, str(caught.value))
        assert (report.problem_field, report.problem_offset) == (
            caught.value.field,
            caught.value.offset,
        )


def test_bytes_behind_the_end_are_refused(target, snapshot, load):
    data = stream()
    for extra in (b"\0", data):
        error = refusal(target, data + extra)
        assert (type(error), error.field, error.offset) == (WireMalformed, "end", len(data))
    with pytest.raises(WireMalformed, match=rf"end at byte {len(snapshot)}: .*, 1 follow"):
        load(snapshot + b"\0")
    with pytest.raises(WireMalformed):
        import_sequence(target, [data, b"", b"x"])


@pytest.mark.parametrize(
    ("fields", "kind", "field"),
    [
        ({"version": 2}, WireVersion, "version"),
        ({"version": 0}, WireVersion, "version"),
        ({"page_format": 2}, WireVersion, "page_format"),
        ({"kind": 9}, WireMalformed, "kind"),
        ({"codec_digest": bytes(32)}, WireMismatch, "codec_digest"),
        ({"config_digest": bytes(32)}, WireMalformed, "config_digest"),
        ({"page_bytes": 0}, WireMalformed, "page_bytes"),
        ({"num_sequences": 0, "metadata_bytes": 532}, WireMalformed, "num_sequences"),
        ({"num_filled": 3}, WireMalformed, "num_filled"),
        ({"num_pages": 3}, WireMalformed, "num_pages"),
        ({"num_rings": 2}, WireMalformed, "num_rings"),
        ({"num_records": 2}, WireMalformed, "num_records"),
        ({"num_records": 0}, WireMalformed, "num_records"),
        ({"num_rings": 0}, WireMalformed, "sequences"),
        ({"num_pages": 1}, WireMalformed, "sequences"),
        ({"num_filled": 0}, WireMalformed, "sequences"),
        ({"metadata_bytes": 4}, WireMalformed, "metadata_bytes"),
        ({"total_bytes": 100}, WireMalformed, "total_bytes"),
        ({"total_bytes": 1 << 20}, WireMalformed, "total_bytes"),
        ({"means_bytes": 4}, WireMalformed, "means_bytes"),
    ],
)
def test_a_wrong_field_is_named_although_its_checksum_matches(target, fields, kind, field):
    error = refusal(target, with_header(stream(), **fields))
    assert (type(error), error.field) == (kind, field)


def test_another_layout_of_the_same_configuration_is_refused(target, monkeypatch):
    data = stream()
    size = header_of(data).page_bytes
    # As if the writer's extents were padded to another multiple.
    changed = with_header(data, page_bytes=size - 16)
    error = refusal(target, changed)
    assert (type(error), error.field, error.offset) == (WireMismatch, "page_bytes", 144)
    monkeypatch.setattr("pagedtq.wire.digests.codebook", lambda dim, width: FakeBook)
    error = refusal(target, data)
    assert (type(error), error.field) == (WireMismatch, "codec_digest")


class FakeBook:
    table = np.zeros(4, np.float32)
    midpoints = np.zeros(1, np.float32)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [1 << 20, 1 << 32, (1 << 63) - 1, (1 << 64) - 1])
def test_a_count_that_promises_the_sky_is_refused_without_reaching_for_it(
    target, snapshot, load, name, value
):
    tracemalloc.start()
    try:
        error = refusal(target, with_header(stream(), **{name: value}))
        with pytest.raises(WireError):
            load(with_header(snapshot, **{name: value}))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert isinstance(error, WireMalformed)


def test_consistent_promises_of_pages_that_are_not_there_end_with_the_bytes(target, load, snapshot):
    data = stream()
    header = header_of(data)
    many, blocks = 1 << 26, 1 << 26
    size = header.metadata_bytes + 4 * (blocks - header.num_blocks)
    promise = {
        "num_pages": many,
        "num_filled": many,
        "num_blocks": blocks,
        "metadata_bytes": -(-(HEADER_BYTES + size) // 64) * 64 - HEADER_BYTES,
        "total_bytes": 1 << 50,
    }
    tracemalloc.start()
    try:
        assert type(refusal(target, with_header(data, **promise))) is WireTruncated
        promise["kind"] = 3
        with pytest.raises(WireTruncated):
            load(with_header(data, **promise))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    more = with_header(
        snapshot,
        num_filled=7,
        num_pages=7,
        total_bytes=len(snapshot),
    )
    with pytest.raises(WireMalformed):
        load(more)


def edit_state(column, value, row=0):
    def change(text, states, blocks):
        states[row, column] = value

    return change


def edit_block(index, value):
    def change(text, states, blocks):
        blocks[index] = value

    return change


def replace_text(old, new):
    def change(text, states, blocks):
        assert old in text
        return text.replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "field", "problem"),
    [
        (edit_state(0, -1), "sequences", "state outside"),
        (edit_state(0, 1 << 62), "sequences", "state outside"),
        (edit_state(0, 1 << 40), "sequences", "not coded|breaks"),
        (edit_state(0, 20), "total_bytes", "expected"),
        (edit_state(1, 22), "sequences", "r <= c <= L"),
        (edit_state(1, 15), "sequences", "whole block that is not coded"),
        (edit_state(2, 17), "sequences", "r <= c <= L"),
        (edit_state(2, 3), "sequences", "L - r <= W"),
        (edit_state(3, 3), "sequences", "s <= min"),
        (edit_state(4, 1), "sequences", "keep <= start <= r"),
        (edit_state(5, 6), "sequences", "keep <= start <= r"),
        (edit_state(6, -1), "sequences", "no ring"),
        (edit_state(6, 1), "sequences", "ring number"),
        (edit_state(6, -2), "sequences", "ring number"),
        (edit_state(6, 1 << 40), "sequences", "ring number"),
        (edit_block(0, 3), "sequences", "page that is not there"),
        (edit_block(0, -1), "sequences", "page that is not there"),
        (edit_block(0, 0), "sequences", "open or exact block"),
        (edit_block(1, 1), "sequences", "page 1 belongs to no sequence"),
        (replace_text(b'"seed":3', b'"seed":4'), "config_digest", "not that of"),
        (replace_text(b'"seed":3', b'"sead":3'), "config", "sead"),
        (replace_text(b'"seed":3', b'"seed":['), "config", "Expected `int`, got `array`"),
        (replace_text(b'"seed":3', b'"s\xffed":3'), "config", "(?i)utf-8"),
        (replace_text(b'"page_size":16', b'"page_size":17'), "config", "page_size"),
    ],
)
def test_metadata_that_contradict_themselves_are_refused(target, change, field, problem):
    before = frozen(target)
    data = with_metadata(stream(), change)
    with pytest.raises(WireMalformed, match=problem) as caught:
        import_sequence(target, [data])
    assert caught.value.field == field
    assert frozen(target) == before


def test_forks_that_share_what_forks_cannot_share_are_refused(snapshot, load):
    header = header_of(snapshot)
    assert (header.num_sequences, header.num_rings) == (6, 3)

    def swap_blocks(text, states, blocks):
        blocks[[0, 1]] = blocks[[1, 0]]

    def other_ring(text, states, blocks):
        # The fifth sequence, of other pages, on the ring of the first.
        states[4, 6] = states[0, 6]

    for change in (swap_blocks, other_ring):
        with pytest.raises(WireMalformed, match="sequences at byte"):
            load(with_metadata(snapshot, change))


def test_deeply_nested_configuration_is_refused(target):
    def nest(text, states, blocks):
        return b"[" * len(text)

    assert refusal(target, with_metadata(stream(), nest)).field == "config"


def test_padding_must_be_zero(target):
    header = header_of(stream())
    assert header.metadata_bytes - 4 > header.config_bytes + 56 + 8

    def mark(text, states, blocks):
        blocks.base  # noqa: B018

    changed = bytearray(with_metadata(stream(), mark))
    changed[header.pages_offset - 5] = 1
    resealed = with_metadata(bytes(changed), mark)
    assert refusal(target, resealed).field == "padding"


def test_means_must_be_finite():
    means = np.ones((1, 1, 8), np.float32)
    cache, seq = one_sequence(key_means=means)
    data = bytearray(b"".join(export_sequence(cache, seq)))
    header = header_of(bytes(data))
    at = HEADER_BYTES + header.config_bytes + 56 + 4 * header.num_blocks
    assert data[at : at + 32] == means.tobytes()
    data[at : at + 4] = np.array([np.inf], "<f4").tobytes()
    broken = with_metadata(bytes(data), lambda *_: None)
    assert refusal(cache, broken).field == "key_means"


def test_a_page_that_was_exchanged_with_its_checksum_fails_the_digest(target):
    data = stream()
    changed = with_page(data, 0, bytes(header_of(data).page_bytes))
    error = refusal(target, changed)
    assert (type(error), error.field) == (WireChecksum, "trailer")
    assert error.offset == len(data) - TRAILER_BYTES


def test_records_in_another_order_are_refused(snapshot, load):
    header = header_of(snapshot)
    first = header.pages_offset
    second, third = first + header.page_stride, first + 2 * header.page_stride
    swapped = snapshot[:first] + snapshot[second:third] + snapshot[first:second] + snapshot[third:]
    with pytest.raises(WireMalformed, match=f"page 0 at byte {first}: expected record 0, got rec"):
        load(swapped)


def test_text_and_other_formats_are_not_mistaken_for_this_one(target):
    for data in (b"\x93NUMPY" + bytes(400), b"{}" * 200, b"PK\x03\x04" * 100):
        error = refusal(target, data)
        assert (type(error), error.field, error.offset) == (WireVersion, "magic", 0)


def test_kinds_are_not_mistaken_for_each_other(target, snapshot, load):
    error = refusal(target, snapshot)
    assert (type(error), error.field) == (WireMismatch, "kind")
    with pytest.raises(WireMismatch, match="expected cache, got sequence"):
        load(stream())


def test_an_empty_file_is_refused(load):
    with pytest.raises(WireTruncated, match="the file is empty"):
        load(b"")


def test_chunks_that_are_no_bytes_are_refused(target):
    with pytest.raises(ArgumentTypeError, match="chunks must be bytes, got str"):
        import_sequence(target, ["text"])


def test_a_configuration_of_the_future_is_named(snapshot, load):
    text = msgspec.json.decode(PagedKVCache(small_config()).config.to_json())
    assert text["keys"]["kind"] == "turboquant"
    with pytest.raises(WireMalformed, match=r"config at byte 172: .*turboquanx"):
        load(with_metadata(snapshot, replace_text(b'"turboquant"', b'"turboquanx"')))
