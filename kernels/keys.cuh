// Keys of a page as operands of matrix instructions, whatever the page holds.
//
// what      the pairs of halves (or quads of bytes) a lane's share of a token decodes to, and the
//           element of every pair, which the query must follow
// mapping   lane = 4 g + t: t shares a token's row with three lanes, g numbers the token
// bytes     a row once per warp (rows.cuh)
// host twin pagedtq/backends/page_reader.py (StreamReader)

#pragma once

#include "rows.cuh"

// Pairs of one lane for one token: kSteps times kPairs a section; two feed one matrix instruction.
template <int format, int head_dim, bool tuned = is_tuned(format, head_dim)>
struct Keys : WordRow<format, head_dim, 1, 4> {
    static constexpr int kFormat = format;
    using Words = typename WordRow<format, head_dim, 1, 4>::Words;
    static constexpr int kWordsPerStep = format == FORMAT_F16 ? 2 : 1;
    static constexpr int kPairs = format == FORMAT_F16 ? 2 : format == 4 ? 4 : 8;
    static constexpr int kSteps = Words::kWords / kWordsPerStep;
    static constexpr int kAllSteps = Words::kSections * kSteps;
    static constexpr int kTailPairs = Words::kTail ? 4 : 0;

    DEVICE static void decode_word(u32 word, u32 signs, const StreamTable& table, u32* pairs) {
        if constexpr (format == 4) {
            decode_keys4(word, table.words, pairs);
        } else if constexpr (format == 3) {
            decode_keys3(word, signs, table.words, pairs);
        } else {
            decode_fields2(word, table.words, pairs);
        }
    }

    DEVICE void decode(int step, const StreamTable& table, u32* pairs) const {
        const Words& mine = this->words;
        if constexpr (format == FORMAT_F16) {
            pairs[0] = mine.words[2 * step], pairs[1] = mine.words[2 * step + 1];
        } else {
            decode_word(mine.words[step], mine.sign_of(step), table, pairs);
        }
    }

    // The same codes as bytes (fragments.cuh), four elements a word.
    static constexpr int kQuads = format == 4 ? 2 : 4;
    DEVICE static void decode_word_bytes(u32 word, u32 signs, const StreamTable& table,
                                         u32* quads) {
        if constexpr (format == 4) {
            decode_key_bytes4(word, table.words, quads);
        } else if constexpr (format == 3) {
            decode_key_bytes3(word, signs, table.words, quads);
        } else {
            decode_key_bytes2(word, table.words, quads);
        }
    }
    DEVICE void decode_bytes(int step, const StreamTable& table, u32* quads) const {
        decode_word_bytes(this->words.words[step], this->words.sign_of(step), table, quads);
    }
    static constexpr int kTailQuads = Words::kTail ? 2 : 0;
    DEVICE static void decode_tail_bytes(const Keys& upper, const Keys& lower,
                                         const StreamTable& table, u32* upper_quads,
                                         u32* lower_quads) {
        u32 quads[4];
        decode_word_bytes(Words::joined(upper.words, lower.words),
                          Words::joined_signs(upper.words, lower.words), table, quads);
        upper_quads[0] = quads[0], upper_quads[1] = quads[2];
        lower_quads[0] = quads[1], lower_quads[1] = quads[3];
    }

    // Element of byte i of a lane's quad.
    DEVICE static int quad_element(int quad, int i, int t) {
        const int step = quad / kQuads, n = quad % kQuads * (quad / kQuads == kAllSteps ? 2 : 1);
        const int first = Words::byte_of(step, t) * 8 / plane_bits(format, head_dim);
        return first + (format == 4 ? 4 * n + i : QUAD_ELEMENT(n, i));
    }

    // Element of half 0 or 1 of a lane's pair, counted over all sections.
    DEVICE static int element(int pair, int half, int t) {
        const int step = pair / kPairs;
        const int n = step == kAllSteps ? tail_pair<format>(pair % kPairs, 0) : pair % kPairs;
        if constexpr (format == FORMAT_F16) return Words::byte_of(2 * step + n, t) / 2 + half;
        const int first = Words::byte_of(step, t) * 8 / plane_bits(format, head_dim);
        if constexpr (format == 4) return first + 2 * n + half;
        if constexpr (format == 3) return first + KEY3_ELEMENT(n) + 2 * half;
        return first + KEY2_ELEMENT(n) + 4 * half;
    }
};

template <int format, int head_dim>
struct Keys<format, head_dim, false> : ElementRow<format, head_dim, 1> {
    DEVICE void decode(int step, const StreamTable& table, u32* pairs) const {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int at = 16 * step + 8 * n, rest = 2 * this->part;
            pairs[n] = this->value(table, at, rest, 0) | this->value(table, at, rest + 1, 0) << 16;
        }
    }

    DEVICE static int element(int pair, int half, int t) { return 8 * pair + 2 * t + half; }
};
