// What pages hold, by number.
//
// what      numbers of formats, bytes of rows, which of them lanes can share, single elements
// mapping   a row of codes is shared by 4 lanes (keys: one token) or 8 (values: a token pair)
// bytes     none moved but by the loads themselves
// host twin pagedtq/backends/stream_formats.py
//
// Formats are numbered by what a page holds: 1 to 8, the width of codes; 16, 17 and 32: exact f16,
// bf16 and f32. Widths 2, 3, 4 and f16 are decoded from registers (`tuned`), a word at a time; every
// other format, and head dims whose rows do not divide among the lanes, element by element.
// bf16 and f32 go through f16: magnitudes beyond 65504 saturate.

#pragma once

#include "fragments.cuh"

#define FORMAT_F16 16
#define FORMAT_BF16 17
#define FORMAT_F32 32

// Where the planes of one stream lie in an extent; `codes` is the plane itself for exact streams.
struct StreamPlanes {
    u32 codes, signs, norms;
};

DEVICE constexpr bool is_exact(int format) { return format >= FORMAT_F16; }

// Bits of an element in the main plane.
DEVICE constexpr int plane_bits(int format, int head_dim) {
    return format == FORMAT_BF16 ? 16 : format == 3 && head_dim % 16 == 0 ? 2 : format;
}

// Bytes of a token's row.
DEVICE constexpr int row_bytes(int format, int head_dim) {
    return (head_dim * plane_bits(format, head_dim) + 7) / 8;
}

// Bytes of a token's sign row (width 3): groups of 2 * period code bytes share `period`.
DEVICE constexpr int sign_row_bytes(int head_dim, int period) {
    return (head_dim / 4 + 2 * period - 1) / (2 * period) * period;
}

// What each of `lanes` lanes takes from the end of a row, behind its words: half a word where its
// share of the row is an odd number of them.
DEVICE constexpr int tail_bytes(int row, int lanes) {
    return row % (4 * lanes) == 2 * lanes ? 2 : 0;
}

// The widest load of words that divides the rest of a row among the lanes; 0 if none does.
DEVICE constexpr int load_bytes(int row, int lanes) {
    const int words = row - tail_bytes(row, lanes) * lanes;
    return words <= 0                                   ? 0
           : words % (16 * lanes) == 0 && row % 16 == 0 ? 16
           : words % (8 * lanes) == 0 && row % 8 == 0   ? 8
           : words % (4 * lanes) == 0                   ? 4
                                                        : 0;
}

// Whether `lanes` lanes can share a row. Tails hold fields of 2 bits: the signs of 4-bit keys lie
// anywhere in a word.
DEVICE constexpr bool divides(int format, int row, int lanes) {
    return load_bytes(row, lanes) != 0 && (tail_bytes(row, lanes) == 0 || format <= 3);
}

DEVICE constexpr bool is_tuned(int format, int head_dim) {
    return head_dim % 16 == 0 && ((format >= 2 && format <= 4) || format == FORMAT_F16) &&
           divides(format, row_bytes(format, head_dim), 4) &&
           divides(format, 2 * row_bytes(format, head_dim), 8);
}

DEVICE constexpr int padded_dim(int head_dim) { return (head_dim + 15) / 16 * 16; }

template <int bytes>
DEVICE void load_words(const u8* from, u32* words) {
    if constexpr (bytes == 16) {
        const uint4 v = ldg128(from);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else if constexpr (bytes == 8) {
        const uint2 v = ldg64(from);
        words[0] = v.x, words[1] = v.y;
    } else {
        words[0] = ldg32(from);
    }
}

// One element of an exact plane as f16 bits.
template <int format>
DEVICE u32 exact_at(const u8* row, int element) {
    if constexpr (format == FORMAT_F16) return ldg16(row + 2 * element);
    float x;
    if constexpr (format == FORMAT_BF16) {
        x = bf16_to_f32(ldg16(row + 2 * element));
    } else {
        x = bits_float(ldg32(row + 4 * element));
    }
    // Written so that NaN stays NaN.
    x = x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
    return f32_to_f16(x);
}

// Decoded values of codes: by value for the widths decoded by permutation, else in memory.
struct StreamTable {
    Table words;
    const u16* entries;
};

// f16 bits of a code's value.
DEVICE u32 table_entry(const StreamTable& table, u32 code) { return ldg16(table.entries + code); }
