"""Codes to page rows and back: plain bit rows, key nibbles with moved signs, width-3 planes.

A code is ``sign << (w-1) | magnitude index`` (sign 1 is negative). Three row formats:

plain
    Little-endian bit row: code ``e`` occupies bits ``[e w, (e+1) w)``. Every width, except where
    one of the others applies; those need ``head_dim % 16 == 0``.
keys of width 4
    In each little-endian 32-bit word (elements 0..7) nibble ``n`` keeps its magnitude at bits
    ``4n .. 4n+2``. The sign of elements 0..3 lies at bits 7, 15, 23, 31, that of elements 4..7 at
    bits 3, 11, 19, 27: one mask and one shift give four signs in the top bits of four bytes.
width 3
    A plain 2-bit row of magnitudes (``head_dim / 4`` bytes) and a sign row. Groups of
    ``2 * period`` code bytes share ``period`` sign bytes (period 4 for keys, 2 for values): sign
    byte ``p`` of a group holds the signs of code byte ``p`` at bits 0, 1, 4, 5 and those of code
    byte ``period + p`` at bits 2, 3, 6, 7; code bytes that do not exist give 0.

Values are packed as one token's byte stream; the backend interleaves token pairs. All functions
take any leading axes. Codes are not range-checked.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError

Bytes = npt.NDArray[np.uint8]

MAX_WIDTH = 16
_SIGN_PERIOD = {"key": 4, "value": 2}


class PackedCodes(NamedTuple):
    """Rows of packed codes: ``uint8[..., row]``, and sign rows where width 3 has them."""

    codes: Bytes
    signs: Bytes | None


def row_bytes(width: int, head_dim: int, stream: str) -> tuple[int, int]:
    """Return the bytes of a code row and of a sign row (0 where there is none)."""
    if head_dim % 16 == 0 and width == 3:
        period = _SIGN_PERIOD[stream]
        return head_dim // 4, -(-head_dim // (8 * period)) * period
    return -(-head_dim * width // 8), 0


def pack_codes(codes: Bytes, width: int, stream: str) -> PackedCodes:
    """Pack codes as they lie in pages.

    Parameters
    ----------
    codes : uint8[..., head_dim]
        Codes below ``2**width``.
    width : int
        1 to 8.
    stream : {"key", "value"}
        Which stream's format.
    """
    head_dim = codes.shape[-1]
    if head_dim % 16 == 0 and width == 4 and stream == "key":
        return PackedCodes(_pack_key_nibbles(codes), None)
    if head_dim % 16 == 0 and width == 3:
        return PackedCodes(pack(codes & 3, 2), _pack_sign_rows(codes, _SIGN_PERIOD[stream]))
    return PackedCodes(pack(codes, width), None)


def unpack_codes(packed: PackedCodes, width: int, head_dim: int, stream: str) -> Bytes:
    """Invert `pack_codes`: ``uint8[..., head_dim]``."""
    if head_dim % 16 == 0 and width == 4 and stream == "key":
        return _unpack_key_nibbles(packed.codes)
    if packed.signs is not None:
        magnitudes = unpack(packed.codes, 2, head_dim)
        signs = _unpack_sign_rows(packed.signs, head_dim // 4, _SIGN_PERIOD[stream])
        codes: Bytes = magnitudes | (signs << 2)
        return codes
    return unpack(packed.codes, width, head_dim)


def pack(codes: npt.NDArray[Any], width: int) -> Bytes:
    """Pack codes into plain rows.

    Parameters
    ----------
    codes : uint8[..., n] or uint16[..., n]
        Codes below ``2**width``.
    width : int
        1 to 16; above 8 the codes must be uint16.

    Returns
    -------
    uint8[..., ceil(n * width / 8)]
    """
    _check_width(width)
    count = codes.shape[-1]
    row = -(-count * width // 8)
    if width == 1:
        return np.packbits(codes, axis=-1, bitorder="little")
    if width > 8:
        wide = np.ascontiguousarray(codes, "<u2")[..., None].view(np.uint8)
        bits = np.unpackbits(wide, axis=-1, bitorder="little")[..., :width]
        flat = bits.reshape(*codes.shape[:-1], count * width)
        return np.packbits(flat, axis=-1, bitorder="little")
    if width == 8:
        return np.array(codes, np.uint8)
    if width in (2, 4) and count * width % 8 == 0:
        return _pack_within_bytes(codes, width)
    # Eight codes of w bits are w bytes: squeeze the gaps out of a 64-bit word in three steps.
    words = _words(codes, count, "<u8")
    words = _squeeze(words, 8, width, 0x00FF00FF00FF00FF)
    words = _squeeze(words, 16, 2 * width, 0x0000FFFF0000FFFF)
    words = _squeeze(words, 32, 4 * width, 0x00000000FFFFFFFF)
    packed = words[..., None].view(np.uint8)[..., :width]
    flat = packed.reshape(*codes.shape[:-1], words.shape[-1] * width)
    return np.ascontiguousarray(flat[..., :row])


def unpack(rows: Bytes, width: int, count: int) -> npt.NDArray[Any]:
    """Invert `pack`.

    Parameters
    ----------
    rows : uint8[..., ceil(count * width / 8)]
        Plain rows.
    width : int
        1 to 16.
    count : int
        Codes per row.

    Returns
    -------
    uint8[..., count], or uint16[..., count] above width 8
    """
    _check_width(width)
    if rows.shape[-1] != -(-count * width // 8):
        raise ArgumentError(
            f"rows of {count} codes of {width} bits have {-(-count * width // 8)} bytes, "
            f"got {rows.shape[-1]}"
        )
    lead = rows.shape[:-1]
    if width == 1:
        return np.unpackbits(rows, axis=-1, count=count, bitorder="little")
    if width > 8:
        bits = np.unpackbits(rows, axis=-1, count=count * width, bitorder="little")
        wide = np.packbits(bits.reshape(*lead, count, width), axis=-1, bitorder="little")
        return wide.view("<u2")[..., 0]
    if width == 8:
        return np.array(rows, np.uint8)
    groups = -(-count // 8)
    padded = np.zeros((*lead, groups * width), np.uint8)
    padded[..., : rows.shape[-1]] = rows
    spread = np.zeros((*lead, groups, 8), np.uint8)
    spread[..., :width] = padded.reshape(*lead, groups, width)
    words = spread.view("<u8")[..., 0]
    words = _spread(words, 32, 4 * width, 0x00000000FFFFFFFF)
    words = _spread(words, 16, 2 * width, 0x0000FFFF0000FFFF)
    words = _spread(words, 8, width, 0x00FF00FF00FF00FF)
    codes = words[..., None].view(np.uint8).reshape(*lead, groups * 8)
    return np.ascontiguousarray(codes[..., :count])


def to_canonical(codes: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Turn codes into indices of the sorted table: most negative value first."""
    half = 1 << (width - 1)
    magnitudes = codes & (half - 1)
    return np.where(codes >= half, half - 1 - magnitudes, half + magnitudes).astype(codes.dtype)


def from_canonical(indices: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """Invert `to_canonical`."""
    half = 1 << (width - 1)
    codes = np.where(indices >= half, indices - half, 2 * half - 1 - indices)
    return codes.astype(indices.dtype)


def _check_width(width: int) -> None:
    if not 1 <= width <= MAX_WIDTH:
        raise ArgumentError(f"code width must be in [1, {MAX_WIDTH}], got {width}")


def _words(codes: npt.NDArray[Any], count: int, dtype: str) -> npt.NDArray[Any]:
    """View rows of byte codes as little-endian words, zero codes filling the last one."""
    size = np.dtype(dtype).itemsize
    if count % size:
        padded = np.zeros((*codes.shape[:-1], -(-count // size) * size), np.uint8)
        padded[..., :count] = codes
        codes = padded
    return np.ascontiguousarray(codes, np.uint8).view(dtype)


def _squeeze(words: npt.NDArray[Any], pitch: int, width: int, mask: int) -> npt.NDArray[Any]:
    """Join neighbours: fields of ``width`` bits at pitch ``pitch`` become twice as wide."""
    even = np.uint64(mask)
    high = (words >> np.uint64(pitch)) & even
    high <<= np.uint64(width)
    high |= words & even
    return high


def _spread(words: npt.NDArray[Any], pitch: int, width: int, mask: int) -> npt.NDArray[Any]:
    """Invert `_squeeze`."""
    field = np.uint64(((1 << width) - 1) * (mask // ((1 << pitch) - 1)))
    return (words & field) | ((words >> np.uint64(width)) & field) << np.uint64(pitch)


def _pack_within_bytes(codes: npt.NDArray[Any], width: int) -> Bytes:
    # Codes that never cross a byte: fold a small word onto its lowest byte.
    if width == 4:
        words = _words(codes, codes.shape[-1], "<u2")
        words = words | words >> np.uint16(4)
    else:
        words = _words(codes, codes.shape[-1], "<u4")
        words = words | words >> np.uint32(6)
        words = words | words >> np.uint32(12)
    packed: Bytes = words.astype(np.uint8)
    return packed


def _pack_key_nibbles(codes: Bytes) -> Bytes:
    words = _words(codes, codes.shape[-1], "<u8")
    magnitudes = words & np.uint64(0x0707070707070707)
    rows = _pack_within_bytes(magnitudes.view(np.uint8), 4)
    halves = _words(codes, codes.shape[-1], "<u4")
    signs = halves & np.uint32(0x08080808)
    # Bit 3 of byte n is the sign of element n: elements 0..3 move up by 4, elements 4..7 stay.
    packed = rows.view("<u4")
    packed |= signs[..., 0::2] << np.uint32(4)
    packed |= signs[..., 1::2]
    return rows


def _unpack_key_nibbles(rows: Bytes) -> Bytes:
    words = np.ascontiguousarray(rows).view("<u4")
    codes = unpack((words & np.uint32(0x77777777)).view(np.uint8), 4, rows.shape[-1] * 2)
    halves = codes.view("<u4")
    halves[..., 0::2] |= (words >> np.uint32(4)) & np.uint32(0x08080808)
    halves[..., 1::2] |= words & np.uint32(0x08080808)
    return codes


def _pack_sign_rows(codes: Bytes, period: int) -> Bytes:
    quads = _words(codes, codes.shape[-1], "<u4")
    # Bit 2 of each of the four code bytes goes to bits 0, 1, 4 and 5.
    nibbles = quads >> np.uint32(2) & np.uint32(1)
    for shift, bit in ((9, 2), (14, 16), (21, 32)):
        nibbles |= quads >> np.uint32(shift) & np.uint32(bit)
    lead, count = codes.shape[:-1], codes.shape[-1] // 4
    groups = -(-count // (2 * period))
    halves = np.zeros((*lead, groups * 2 * period), np.uint8)
    halves[..., :count] = nibbles
    halves = halves.reshape(*lead, groups, 2, period)
    rows: Bytes = halves[..., 0, :] | halves[..., 1, :] << 2
    return rows.reshape(*lead, groups * period)


def _unpack_sign_rows(rows: Bytes, count: int, period: int) -> Bytes:
    lead = rows.shape[:-1]
    groups = rows.reshape(*lead, rows.shape[-1] // period, 1, period)
    nibbles = np.concatenate((groups, groups >> 2), axis=-2)
    nibbles = nibbles.reshape(*lead, 2 * rows.shape[-1])[..., :count]
    bits = np.array([0, 1, 4, 5], np.uint8)
    signs: Bytes = nibbles[..., None] >> bits & np.uint8(1)
    return signs.reshape(*lead, count * 4)
