// Keys of a page as operands of matrix instructions, whatever the page holds.
//
// what      which bytes a lane loads for a token, the pairs of halves (or quads of bytes) they decode
//           to, and the element of every pair, which the query must follow
// mapping   lane = 4 g + t: t shares a token's row with three lanes, g numbers the token
// bytes     a row once per warp
// host twin pagedtq/backends/page_reader.py (StreamReader)

#pragma once

#include "formats.cuh"

// Pairs of one lane for one token: kSteps times kPairs; two pairs feed one matrix instruction.
template <int format, int head_dim, bool tuned = is_tuned(format, head_dim)>
struct Keys {
    static constexpr int kRow = row_bytes(format, head_dim);
    using Words = LaneWords<format, head_dim, kRow, 4>;
    static constexpr int kWordsPerStep = format == FORMAT_F16 ? 2 : 1;
    static constexpr int kPairs = format == FORMAT_F16 ? 2 : format == 4 ? 4 : 8;
    static constexpr int kSteps = Words::kWords / kWordsPerStep;
    static constexpr int kUnroll = kSteps;

    static constexpr int kSignRow = format == 3 ? sign_row_bytes(head_dim, 4) : 0;

    Words words;

    DEVICE static Source source(const u8* extent, const StreamPlanes& planes, int token, int t) {
        return Words::source(extent, planes.codes + token * kRow, planes.signs + token * kSignRow,
                             t);
    }

    DEVICE void load(const Source& source, int tokens) {
        words.load(source, tokens * kRow, tokens * kSignRow);
    }

    DEVICE void decode(int step, const StreamTable& table, u32* pairs) const {
        if constexpr (format == FORMAT_F16) {
            pairs[0] = words.words[2 * step], pairs[1] = words.words[2 * step + 1];
        } else if constexpr (format == 4) {
            decode_keys4(words.words[step], table.words, pairs);
        } else if constexpr (format == 3) {
            decode_keys3(words.words[step], words.sign_of(step), table.words, pairs);
        } else {
            decode_fields2(words.words[step], table.words, pairs);
        }
    }

    // Pairs of two tokens' tails, which share a word; they count behind those of the steps.
    static constexpr int kTailPairs = Words::kTail ? 4 : 0;
    DEVICE static void decode_tails(const Keys& upper, const Keys& lower, const StreamTable& table,
                                    u32* upper_pairs, u32* lower_pairs) {
        u32 pairs[8];
        const u32 word = join_tails(upper.words.tail, lower.words.tail);
        if constexpr (format == 3) {
            const u32 signs = join_tails(upper.words.tail_signs, lower.words.tail_signs);
            decode_keys3(word, signs, table.words, pairs);
        } else {
            decode_fields2(word, table.words, pairs);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            upper_pairs[n] = pairs[tail_pair<format>(n, 0)];
            lower_pairs[n] = pairs[tail_pair<format>(n, 1)];
        }
    }

    // The same codes as bytes (fragments.cuh), four elements a word.
    static constexpr int kQuads = format == 4 ? 2 : 4;
    DEVICE void decode_bytes(int step, const StreamTable& table, u32* quads) const {
        if constexpr (format == 4) {
            decode_key_bytes4(words.words[step], table.words, quads);
        } else if constexpr (format == 3) {
            decode_key_bytes3(words.words[step], words.sign_of(step), table.words, quads);
        } else {
            decode_key_bytes2(words.words[step], table.words, quads);
        }
    }
    static constexpr int kTailQuads = Words::kTail ? 2 : 0;
    DEVICE static void decode_tail_bytes(const Keys& upper, const Keys& lower,
                                         const StreamTable& table, u32* upper_quads,
                                         u32* lower_quads) {
        u32 quads[4];
        const u32 word = join_tails(upper.words.tail, lower.words.tail);
        if constexpr (format == 3) {
            const u32 signs = join_tails(upper.words.tail_signs, lower.words.tail_signs);
            decode_key_bytes3(word, signs, table.words, quads);
        } else {
            decode_key_bytes2(word, table.words, quads);
        }
        upper_quads[0] = quads[0], upper_quads[1] = quads[2];
        lower_quads[0] = quads[1], lower_quads[1] = quads[3];
    }

    // Element of byte i of a lane's quad.
    DEVICE static int quad_element(int quad, int i, int t) {
        const int step = quad / kQuads, n = quad % kQuads * (quad / kQuads == kSteps ? 2 : 1);
        const int first = Words::byte_of(step, t) * 8 / plane_bits(format, head_dim);
        return first + (format == 4 ? 4 * n + i : QUAD_ELEMENT(n, i));
    }

    // Element of half 0 or 1 of a lane's pair.
    DEVICE static int element(int pair, int half, int t) {
        const int step = pair / kPairs;
        const int n = step == kSteps ? tail_pair<format>(pair % kPairs, 0) : pair % kPairs;
        if constexpr (format == FORMAT_F16) return Words::byte_of(2 * step + n, t) / 2 + half;
        const int first = Words::byte_of(step, t) * 8 / plane_bits(format, head_dim);
        if constexpr (format == 4) return first + 2 * n + half;
        if constexpr (format == 3) return first + KEY3_ELEMENT(n) + 2 * half;
        return first + KEY2_ELEMENT(n) + 4 * half;
    }
};

template <int format, int head_dim>
struct Keys<format, head_dim, false> {
    static constexpr int kRow = row_bytes(format, head_dim);
    static constexpr int kPairs = 2, kTailPairs = 0;
    static constexpr int kSteps = padded_dim(head_dim) / 16;
    static constexpr int kUnroll = 1;

    static constexpr int kSignRow = sign_row_bytes(head_dim, 4);

    const u8 *codes, *signs;
    int part;

    DEVICE static Source source(const u8* extent, const StreamPlanes& planes, int token, int t) {
        return {extent + (planes.codes + token * kRow), extent + (planes.signs + token * kSignRow),
                nullptr, nullptr, t};
    }

    DEVICE void load(const Source& source, int tokens) {
        codes = source.codes + tokens * kRow;
        signs = source.signs + tokens * kSignRow;
        part = source.part;
    }

    DEVICE void decode(int step, const StreamTable& table, u32* pairs) const {
        for (int n = 0; n < 2; ++n) {
            u32 halves[2] = {0, 0};
            for (int half = 0; half < 2; ++half) {
                const int e = element(2 * step + n, half, part);
                if (e < head_dim) halves[half] = value(table, e);
            }
            pairs[n] = halves[0] | halves[1] << 16;
        }
    }

    DEVICE u32 value(const StreamTable& table, int e) const {
        if constexpr (is_exact(format)) return exact_at<format>(codes, e);
        else return table_entry(table, code_at<format, head_dim, 1, 4>(codes, signs, e));
    }

    DEVICE static int element(int pair, int half, int t) { return 8 * pair + 2 * t + half; }
};
