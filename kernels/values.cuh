// Values of a page as operands of matrix instructions, whatever the page holds.
//
// what      which bytes a lane loads for a token pair, the pairs of halves they decode to (two tokens
//           of a channel), and the channel of every pair, which the output must follow
// mapping   lane = 4 g + t: g shares a token pair's row with seven lanes, t numbers the pair
// bytes     a row once per warp
// host twin pagedtq/backends/page_reader.py (StreamReader)

#pragma once

#include "formats.cuh"

// Pairs (two tokens of a channel) of one lane for one token pair: kSteps times kPairs channels.
template <int format, int head_dim, bool tuned = is_tuned(format, head_dim)>
struct Values {
    static constexpr int kRow = row_bytes(format, head_dim);
    using Words = LaneWords<format, head_dim, 2 * kRow, 8>;
    static constexpr int kPairs = format == 4 ? 4 : 8;
    static constexpr int kSteps = Words::kWords;

    static constexpr int kSignRow = format == 3 ? sign_row_bytes(head_dim, 2) : 0;

    Words words;

    DEVICE static Source source(const u8* extent, const StreamPlanes& planes, int token, int g) {
        return Words::source(extent, planes.codes + token * kRow, planes.signs + token * kSignRow,
                             g);
    }

    DEVICE void load(const Source& source, int tokens) {
        words.load(source, tokens * kRow, tokens * kSignRow);
    }

    DEVICE void decode(int step, const StreamTable& table, u32* pairs) const {
        if constexpr (format == 4) {
            decode_values4(words.words[step], table.words, pairs);
        } else if constexpr (format == 3) {
            decode_values3(words.words[step], words.sign_of(step), table.words, pairs);
        } else {
            decode_fields2(words.words[step], table.words, pairs);
        }
    }

    // Pairs of two rows' tails, which share a word; they count behind those of the steps.
    static constexpr int kTailPairs = Words::kTail ? 4 : 0;
    DEVICE static void decode_tails(const Values& first, const Values& second,
                                    const StreamTable& table, u32* first_pairs,
                                    u32* second_pairs) {
        u32 pairs[8];
        const u32 word = join_tails(first.words.tail, second.words.tail);
        if constexpr (format == 3) {
            const u32 signs = join_tails(first.words.tail_signs, second.words.tail_signs);
            decode_values3(word, signs, table.words, pairs);
        } else {
            decode_fields2(word, table.words, pairs);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            first_pairs[n] = pairs[tail_pair<format>(n, 0)];
            second_pairs[n] = pairs[tail_pair<format>(n, 1)];
        }
    }

    // The same codes as bytes (fragments.cuh): a word has kTurns turns of two times two channels.
    static constexpr int kTurns = format == 4 ? 1 : 2;
    DEVICE void decode_bytes(int step, int turn, const StreamTable& table, u32* bytes) const {
        if constexpr (format == 4) {
            decode_value_bytes4(words.words[step], table.words, bytes);
        } else if constexpr (format == 3) {
            decode_value_bytes3(words.words[step], 0x44444444u, words.sign_of(step), turn,
                                table.words, bytes);
        } else {
            decode_value_bytes3(words.words[step], 0, 0, turn, table.words, bytes);
        }
    }
    // Tails of both rows: bytes of the first, then of the second.
    DEVICE static void decode_tail_bytes(const Values& first, const Values& second, int turn,
                                         const StreamTable& table, u32* bytes) {
        const u32 word = join_tails(first.words.tail, second.words.tail);
        if constexpr (format == 3) {
            const u32 signs = join_tails(first.words.tail_signs, second.words.tail_signs);
            decode_value_bytes3(word, 0x44444444u, signs, turn, table.words, bytes);
        } else {
            decode_value_bytes3(word, 0, 0, turn, table.words, bytes);
        }
    }

    DEVICE static int channel(int pair, int g) {
        // Bytes of width 2 follow the order of width 3.
        constexpr int order = VALUE_INT8 && format == 2 ? 3 : format;
        const int step = pair / kPairs;
        const int n = step == kSteps ? tail_pair<order>(pair % kPairs, 0) : pair % kPairs;
        const int first = Words::byte_of(step, g) / 2 * 8 / plane_bits(format, head_dim);
        if constexpr (order == 4) return first + n;
        if constexpr (order == 3) return first + VALUE3_ELEMENT(n);
        return first + VALUE2_ELEMENT(n);
    }
};

// Exact values are token rows, not interleaved: two rows, paired by permutation.
template <int head_dim>
struct Values<FORMAT_F16, head_dim, true> {
    static constexpr int kRow = 2 * head_dim;
    using Words = LaneWords<FORMAT_F16, head_dim, kRow, 8>;
    static constexpr int kPairs = 2, kTailPairs = 0;
    static constexpr int kSteps = Words::kWords;

    Words even, odd;

    DEVICE static Source source(const u8* extent, const StreamPlanes& planes, int token, int g) {
        return Words::source(extent, planes.codes + token * kRow, 0, g);
    }

    DEVICE void load(const Source& source, int tokens) {
        even.load(source, tokens * kRow, 0);
        odd.load(source, (tokens + 1) * kRow, 0);
    }

    DEVICE void decode(int step, const StreamTable&, u32* pairs) const {
        pairs[0] = prmt(even.words[step], odd.words[step], 0x5410u);
        pairs[1] = prmt(even.words[step], odd.words[step], 0x7632u);
    }

    DEVICE static int channel(int pair, int g) {
        return Words::byte_of(pair / 2, g) / 2 + pair % 2;
    }
};

template <int format, int head_dim>
struct Values<format, head_dim, false> {
    static constexpr int kRow = row_bytes(format, head_dim);
    static constexpr int kPairs = 2, kTailPairs = 0;
    static constexpr int kSteps = padded_dim(head_dim) / 16;

    static constexpr int kSignRow = sign_row_bytes(head_dim, 2);

    const u8 *codes, *signs;
    int part;

    DEVICE static Source source(const u8* extent, const StreamPlanes& planes, int token, int g) {
        return {extent + (planes.codes + token * kRow), extent + (planes.signs + token * kSignRow),
                nullptr, nullptr, g};
    }

    DEVICE void load(const Source& source, int tokens) {
        codes = source.codes + tokens * kRow;
        signs = source.signs + tokens * kSignRow;
        part = source.part;
    }

    DEVICE void decode(int step, const StreamTable& table, u32* pairs) const {
        for (int n = 0; n < 2; ++n) {
            const int c = channel(2 * step + n, part);
            pairs[n] = c < head_dim ? value(table, c, 0) | value(table, c, 1) << 16 : 0;
        }
    }

    DEVICE u32 value(const StreamTable& table, int c, int token) const {
        if constexpr (is_exact(format)) {
            return exact_at<format>(codes + token * kRow, c);
        } else {
            const u32 code = code_at<format, head_dim, 2, 2>(codes + token, signs + token, c);
            return table_entry(table, code);
        }
    }

    DEVICE static int channel(int pair, int g) { return 8 * pair + g; }
};
