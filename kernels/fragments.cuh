// Codes to half precision in registers: words of a page in, pairs of halves out, nothing in memory.
//
// what      lookup tables held in registers, and a function per word layout (docs/page-format.md)
// mapping   none: one call decodes one 32-bit word of one lane
// bytes     none moved
// host twin pagedtq/backends/page_reader.py (StreamReader.tile)
//
// A half is two bytes, looked up apart by PRMT (a byte permutation with run-time selectors: eight
// entries addressed by three bits) and interleaved by a second PRMT. Key words hold elements of one
// token, and a pair is two of them; value words hold two tokens of the same channels, byte by byte,
// and a pair is the two tokens of one channel. *_ELEMENT gives the element (or channel) of a pair
// relative to the first of its word.

#pragma once

#include "device.cuh"

// Eight halves: their high bytes, then their low bytes; four halves use words 0 and 2 alone. Kernels
// take tables by value: from the constant bank one operand of a permutation costs no register.
struct Table {
    u32 high[2], low[2];
};

// Interleave low and high bytes to halves: of neighbouring bytes (0 1, 2 3), or of bytes two apart
// (0 2, 1 3), as key and value words need.
#define PAIR_BYTES_01 0x5140u
#define PAIR_BYTES_23 0x7362u
#define PAIR_BYTES_02 0x6240u
#define PAIR_BYTES_13 0x7351u

// ---- width 4: eight nibbles in a word, four pairs out ------------------------------------------

// Signs of the first four elements at the top of the bytes of `signs`, those of the others in
// `more_signs`; lop3 0xEA is a & b | c.
DEVICE void decode_nibbles(u32 word, u32 signs, u32 more_signs, const Table& table, u32 first,
                           u32 second, u32* pairs) {
    const u32 index = word & 0x77777777u;
    u32 high = lop3<0xEA>(signs, 0x80808080u, prmt(table.high[0], table.high[1], index));
    u32 low = prmt(table.low[0], table.low[1], index);
    pairs[0] = prmt(low, high, first);
    pairs[1] = prmt(low, high, second);
    const u32 rest = index >> 16;
    high = lop3<0xEA>(more_signs, 0x80808080u, prmt(table.high[0], table.high[1], rest));
    low = prmt(table.low[0], table.low[1], rest);
    pairs[2] = prmt(low, high, first);
    pairs[3] = prmt(low, high, second);
}

// Moved signs: one mask finds those of four elements. Pairs of elements 0 1, 2 3, 4 5, 6 7.
DEVICE void decode_keys4(u32 word, const Table& table, u32* pairs) {
    decode_nibbles(word, word, word << 4, table, PAIR_BYTES_01, PAIR_BYTES_23, pairs);
}

// Plain nibbles: PRMT's sign-replicate mode spreads bit 7 of a byte. Channels 0, 1, 2, 3.
DEVICE void decode_values4(u32 word, const Table& table, u32* pairs) {
    const u32 left = word << 4;
    decode_nibbles(word, prmt(left, word, 0xD9C8u), prmt(left, word, 0xFBEAu), table,
                   PAIR_BYTES_02, PAIR_BYTES_13, pairs);
}

// ---- width 3: sixteen 2-bit magnitudes in a word, signs in another, eight pairs out ------------

// `signs`: bits 0, 1, 4, 5 of its bytes belong to this word. Nibble selectors of the even and of
// the odd fields come from one mask and one merge each; lop3 0xF8 is a | b & c.
DEVICE void decode_signed_fields(u32 word, u32 signs, const Table& table, u32 first, u32 second,
                                 u32* pairs) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
        const u32 fields = (word >> 2 * odd) & 0x33333333u;
        u32 index = lop3<0xF8>(fields, signs << (2 - odd), 0x44444444u);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const u32 high = prmt(table.high[0], table.high[1], index);
            const u32 low = prmt(table.low[0], table.low[1], index);
            pairs[4 * odd + 2 * half] = prmt(low, high, first);
            pairs[4 * odd + 2 * half + 1] = prmt(low, high, second);
            index >>= 16;
        }
    }
}

// Elements of pair n: KEY3_ELEMENT(n) and two behind it.
#define KEY3_ELEMENT(n) (4 * ((n) & 3) + ((n) >> 2))
DEVICE void decode_keys3(u32 word, u32 signs, const Table& table, u32* pairs) {
    decode_signed_fields(word, signs, table, PAIR_BYTES_01, PAIR_BYTES_23, pairs);
}

#define VALUE3_ELEMENT(n) (2 * ((n) & 3) + ((n) >> 2))
DEVICE void decode_values3(u32 word, u32 signs, const Table& table, u32* pairs) {
    decode_signed_fields(word, signs, table, PAIR_BYTES_02, PAIR_BYTES_13, pairs);
}

// ---- width 2: sixteen codes in a word, eight pairs out -----------------------------------------

// Four entries leave room for both bytes of a half in one permutation: a selector byte is the code
// twice, plus 4 in the upper nibble, where the high bytes begin. Multiplying spreads the code.
DEVICE void decode_fields2(u32 word, const Table& table, u32* pairs) {
#pragma unroll
    for (int field = 0; field < 4; ++field) {
        const u32 selector = ((word >> 2 * field) & 0x03030303u) * 0x11u + 0x40404040u;
        pairs[2 * field] = prmt(table.low[0], table.high[0], selector);
        pairs[2 * field + 1] = prmt(table.low[0], table.high[0], selector >> 16);
    }
}

// Elements of pair n of a key word: KEY2_ELEMENT(n) and four behind it.
#define KEY2_ELEMENT(n) (8 * ((n) & 1) + ((n) >> 1))
#define VALUE2_ELEMENT(n) (4 * ((n) & 1) + ((n) >> 1))

// ---- bytes instead of halves: left operands of mma.m16n8k32 -------------------------------------

// Tables of widths 2 to 4 are half-integers j + 1/2, j <= 127, in a unit of their own. A code becomes
// the byte 128 + j, or its complement 127 - j where the sign is negative: the value is
// byte - 127.5 units. One permutation then decodes four codes, from the words `low` of a table that
// holds those bytes (width 4: of the magnitudes alone). A quad is four elements of one token.

DEVICE void decode_byte_fields(u32 word, u32 sign_mask, u32 signs, const Table& table, u32* quads) {
#pragma unroll
    for (int odd = 0; odd < 2; ++odd) {
        u32 index = (word >> 2 * odd) & 0x33333333u;
        index = lop3<0xF8>(index, signs << (2 - odd), sign_mask);
        quads[2 * odd] = prmt(table.low[0], table.low[1], index);
        quads[2 * odd + 1] = prmt(table.low[0], table.low[1], index >> 16);
    }
}

// Widths 2 and 3: element i of quad n.
#define QUAD_ELEMENT(n, i) (((n) >> 1) + 8 * ((n) & 1) + 2 * (i))
DEVICE void decode_key_bytes2(u32 word, const Table& table, u32* quads) {
    decode_byte_fields(word, 0, 0, table, quads);
}
DEVICE void decode_key_bytes3(u32 word, u32 signs, const Table& table, u32* quads) {
    decode_byte_fields(word, 0x44444444u, signs, table, quads);
}

// Values: four tokens of a channel make a quad, which come from two words, each of two tokens. Bytes
// of one word are token 0 and 1 of channel a and of channel b, in the order 0a 0b 1a 1b; tables hold
// the code less 128, a signed byte j or -1 - j, so that what is 1/2 too little is small beside it.
DEVICE void join_tokens(u32 first, u32 second, u32& quad_a, u32& quad_b) {
    quad_a = prmt(first, second, 0x6420u);
    quad_b = prmt(first, second, 0x7531u);
}

// Channels a and b are `odd` and `odd` + 2 of the word, and four behind them. Width 2: no signs.
DEVICE void decode_value_bytes3(u32 word, u32 sign_mask, u32 signs, int odd, const Table& table,
                                u32* bytes) {
    u32 index = (word >> 2 * odd) & 0x33333333u;
    index = lop3<0xF8>(index, signs << (2 - odd), sign_mask);
    bytes[0] = prmt(table.low[0], table.low[1], index);
    bytes[1] = prmt(table.low[0], table.low[1], index >> 16);
}

// Width 4: channels 0 and 1 of the word, and 2 and 3.
DEVICE void decode_value_bytes4(u32 word, const Table& table, u32* bytes) {
    const u32 index = word & 0x77777777u, left = word << 4;
    bytes[0] = prmt(table.low[0], table.low[1], index) ^ prmt(left, word, 0xD9C8u);
    bytes[1] = prmt(table.low[0], table.low[1], index >> 16) ^ prmt(left, word, 0xFBEAu);
}

// Width 4: quads of elements 0 to 3 and 4 to 7; moved signs become masks in sign-replicate mode.
DEVICE void decode_key_bytes4(u32 word, const Table& table, u32* quads) {
    const u32 index = word & 0x77777777u;
    quads[0] = prmt(table.low[0], table.low[1], index) ^ prmt(word, word, 0xBA98u);
    quads[1] = prmt(table.low[0], table.low[1], index >> 16) ^ prmt(word << 4, word, 0xBA98u);
}

// ---- any width, element by element -------------------------------------------------------------

// Code of element `at` + `rest` of a row whose bytes lie `step` apart (2 in interleaved planes), by the
// format's rules for `width` in rows of `head_dim`. `period`: sign bytes of a group (width 3). `at` is
// a multiple of 8, so that no byte it counts is shared: where the bytes of `rest`, below 8, lie is
// the same for every `at`.
template <int width, int head_dim, int step, int period>
DEVICE u32 code_at(const u8* codes, const u8* signs, int at, int rest) {
    if constexpr (width == 3 && head_dim % 16 == 0) {
        const int byte = at / 4, group = byte / (2 * period), place = byte % (2 * period);
        const u32 index = ldg8(codes + step * (rest >> 2) + step * byte) >> 2 * (rest & 3) & 3;
        const int bit = (rest & 1) + 4 * (rest >> 1 & 1) + 2 * (place / period);
        const u32 sign =
            ldg8(signs + step * (rest >> 2) + step * (group * period + place % period));
        return index | (sign >> bit & 1) << 2;
    } else if constexpr (width == 4 && head_dim % 16 == 0 && step == 1) {
        const u32 index = ldg8(codes + (rest >> 1) + at / 2) >> 4 * (rest & 1) & 7;
        const u32 sign = ldg8(codes + (rest & 3) + at / 2) >> (rest < 4 ? 7 : 3) & 1;
        return index | sign << 3;
    } else {
        const int bit = rest * width, shift = bit & 7;
        const u8* from = codes + step * (bit >> 3);
        const int byte = at / 8 * width;
        u32 window = ldg8(from + step * byte);
        if (shift + width > 8) window |= static_cast<u32>(ldg8(from + step * (byte + 1))) << 8;
        return window >> shift & ((1u << width) - 1);
    }
}
