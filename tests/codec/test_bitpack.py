"""Rows of codes: every width and dimension comes back, and every bit lies where the format says."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedtq.codec.bitpack import (
    PackedCodes,
    from_canonical,
    pack,
    pack_codes,
    row_bytes,
    to_canonical,
    unpack,
    unpack_codes,
)
from pagedtq.codec.codebook import codebook
from pagedtq.errors import ArgumentError
from pagedtq.paging.layout import code_rows

DIMS = (3, 5, 8, 10, 16, 48, 64, 72, 80, 96, 100, 112, 128, 160, 192, 256)


def draw(width, *shape):
    rng = np.random.default_rng(width)
    return rng.integers(0, 1 << width, shape).astype(np.uint8 if width <= 8 else np.uint16)


def bit(rows, index):
    return rows[..., index // 8] >> (index % 8) & 1


@given(width=st.integers(1, 16), count=st.integers(1, 70), data=st.data())
def test_plain_rows_are_one_little_endian_number(width, count, data):
    values = data.draw(st.lists(st.integers(0, 2**width - 1), min_size=count, max_size=count))
    codes = np.array(values, np.uint8 if width <= 8 else np.uint16)
    row = pack(codes, width)
    number = sum(value << (width * e) for e, value in enumerate(values))
    assert row.tobytes() == number.to_bytes(-(-count * width // 8), "little")
    assert np.array_equal(unpack(row, width, count), codes)


@pytest.mark.parametrize("stream", ["key", "value"])
@pytest.mark.parametrize("width", range(1, 9))
def test_page_rows_come_back_and_have_the_bytes_of_the_layout(width, stream):
    for head_dim in DIMS:
        codes = draw(width, 3, 2, head_dim)
        packed = pack_codes(codes, width, stream)
        expected = code_rows(width, head_dim, stream)
        assert row_bytes(width, head_dim, stream) == tuple(expected)
        assert packed.codes.shape == (3, 2, expected.codes)
        assert (0 if packed.signs is None else packed.signs.shape[-1]) == expected.signs
        assert np.array_equal(unpack_codes(packed, width, head_dim, stream), codes)


@pytest.mark.parametrize("stream", ["key", "value"])
@pytest.mark.parametrize("width", range(1, 9))
def test_no_tokens_give_no_rows(width, stream):
    for head_dim in (16, 100):
        packed = pack_codes(np.empty((0, 2, head_dim), np.uint8), width, stream)
        assert packed.codes.shape == (0, 2, row_bytes(width, head_dim, stream)[0])
        assert unpack_codes(packed, width, head_dim, stream).shape == (0, 2, head_dim)


def test_strided_codes_pack_like_contiguous_ones():
    for width in range(1, 9):
        wide = draw(width, 4, 2, 64)
        for stream in ("key", "value"):
            view = pack_codes(wide[::2, :, ::2], width, stream)
            copy = pack_codes(wide[::2, :, ::2].copy(), width, stream)
            assert np.array_equal(view.codes, copy.codes)


def test_key_nibbles_hold_their_magnitude_and_the_signs_of_others():
    codes = draw(4, 50, 32)
    rows = pack_codes(codes, 4, "key").codes
    sign_bits = (7, 15, 23, 31, 3, 11, 19, 27)
    for e in range(32):
        word, n = 32 * (e // 8), e % 8
        for b in range(3):
            assert np.array_equal(bit(rows, word + 4 * n + b), codes[:, e] >> b & 1)
        assert np.array_equal(bit(rows, word + sign_bits[n]), codes[:, e] >> 3)


@pytest.mark.parametrize(("stream", "period"), [("key", 4), ("value", 2)])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 112, 128])
def test_width_three_keeps_signs_in_their_own_row(stream, period, head_dim):
    codes = draw(3, 20, head_dim)
    packed = pack_codes(codes, 3, stream)
    assert np.array_equal(packed.codes, pack(codes & 3, 2))
    used = np.zeros(packed.signs.shape[-1] * 8, bool)
    for e in range(head_dim):
        group, inside = divmod(e // 4, 2 * period)
        half, p = divmod(inside, period)
        index = 8 * (group * period + p) + (0, 1, 4, 5)[e % 4] + 2 * half
        assert np.array_equal(bit(packed.signs, index), codes[:, e] >> 2)
        used[index] = True
    assert not np.unpackbits(packed.signs, axis=-1, bitorder="little")[:, ~used].any()


@pytest.mark.parametrize("width", range(1, 17))
def test_canonical_indices_sort_the_table_and_come_back(width):
    codes = np.arange(1 << width).astype(np.uint8 if width <= 8 else np.uint16)
    indices = to_canonical(codes, width)
    assert indices.dtype == codes.dtype
    assert np.array_equal(np.sort(indices), codes)
    assert np.array_equal(from_canonical(indices, width), codes)
    if width <= 8:
        table = codebook(64, width).table
        assert np.array_equal(np.sort(table), table[np.argsort(indices)])


def test_wrong_widths_and_row_sizes_are_refused():
    for width in (0, 17):
        with pytest.raises(ArgumentError, match="width"):
            pack(np.zeros(8, np.uint8), width)
    with pytest.raises(ArgumentError, match="have 5 bytes, got 4"):
        unpack(np.zeros(4, np.uint8), 5, 8)
    with pytest.raises(ArgumentError, match="have 64 bytes, got 63"):
        unpack_codes(PackedCodes(np.zeros(63, np.uint8), None), 4, 128, "value")
