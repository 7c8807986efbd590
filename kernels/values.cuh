// Values of a page as operands of matrix instructions, whatever the page holds.
//
// what      the pairs of halves (two tokens of a channel) a lane's share of a token pair decodes to,
//           and the channel of every pair, which the output must follow
// mapping   lane = 4 g + t: g shares a token pair's row with seven lanes, t numbers the pair
// bytes     a row once per warp (rows.cuh)
// host twin pagedtq/backends/page_reader.py (StreamReader)

#pragma once

#include "rows.cuh"

// Pairs (two tokens of a channel) of one lane for one token pair: kSteps times kPairs channels a
// section.
template <int format, int head_dim, bool tuned = is_tuned(format, head_dim)>
struct Values : WordRow<format, head_dim, 2, 8> {
    static constexpr int kFormat = format;
    using Words = typename WordRow<format, head_dim, 2, 8>::Words;
    static constexpr int kPairs = format == 4 ? 4 : 8;
    static constexpr int kSteps = Words::kWords;
    static constexpr int kAllSteps = Words::kSections * kSteps;
    static constexpr int kTailPairs = Words::kTail ? 4 : 0;

    DEVICE static void decode_word(u32 word, u32 signs, const StreamTable& table, u32* pairs) {
        if constexpr (format == 4) {
            decode_values4(word, table.words, pairs);
        } else if constexpr (format == 3) {
            decode_values3(word, signs, table.words, pairs);
        } else {
            decode_fields2(word, table.words, pairs);
        }
    }

    DEVICE void decode(int step, const StreamTable& table, u32* pairs) const {
        decode_word(this->words.words[step], this->words.sign_of(step), table, pairs);
    }

    // The same codes as bytes (fragments.cuh): a word has kTurns turns of two times two channels.
    static constexpr int kTurns = format == 4 ? 1 : 2;
    DEVICE static void decode_word_bytes(u32 word, u32 signs, int turn, const StreamTable& table,
                                         u32* bytes) {
        if constexpr (format == 4) {
            decode_value_bytes4(word, table.words, bytes);
        } else {
            decode_value_bytes3(word, format == 3 ? 0x44444444u : 0, signs, turn, table.words,
                                bytes);
        }
    }
    DEVICE void decode_bytes(int step, int turn, const StreamTable& table, u32* bytes) const {
        decode_word_bytes(this->words.words[step], this->words.sign_of(step), turn, table, bytes);
    }
    // Tails of both rows: bytes of the first, then of the second.
    DEVICE static void decode_tail_bytes(const Values& first, const Values& second, int turn,
                                         const StreamTable& table, u32* bytes) {
        decode_word_bytes(Words::joined(first.words, second.words),
                          Words::joined_signs(first.words, second.words), turn, table, bytes);
    }

    // Channel of a lane's pair, counted over all sections.
    DEVICE static int channel(int pair, int g) {
        // Bytes of width 2 follow the order of width 3.
        constexpr int order = VALUE_INT8 && format == 2 ? 3 : format;
        const int step = pair / kPairs;
        const int n = step == kAllSteps ? tail_pair<order>(pair % kPairs, 0) : pair % kPairs;
        const int first = Words::byte_of(step, g) / 2 * 8 / plane_bits(format, head_dim);
        if constexpr (order == 4) return first + n;
        if constexpr (order == 3) return first + VALUE3_ELEMENT(n);
        return first + VALUE2_ELEMENT(n);
    }
};

// Exact values are token rows, not interleaved: two rows, paired by permutation.
template <int head_dim>
struct Values<FORMAT_F16, head_dim, true> {
    using Half = WordRow<FORMAT_F16, head_dim, 1, 8>;
    static constexpr int kPairs = 2, kTailPairs = 0;
    static constexpr int kSections = Half::kSections, kSteps = Half::Words::kWords;
    static constexpr int kAllSteps = kSections * kSteps;

    Half even, odd;

    DEVICE static Source source(const u8* extent, const StreamPlanes& planes, int token, int g) {
        return Half::source(extent, planes, token, g);
    }

    DEVICE void load(const Source& source, int tokens) {
        even.load(source, tokens), odd.load(source, tokens + 1);
    }

    DEVICE void enter(int section) { even.enter(section), odd.enter(section); }

    DEVICE void decode(int step, const StreamTable&, u32* pairs) const {
        pairs[0] = prmt(even.words.words[step], odd.words.words[step], 0x5410u);
        pairs[1] = prmt(even.words.words[step], odd.words.words[step], 0x7632u);
    }

    DEVICE static int channel(int pair, int g) {
        return Half::Words::byte_of(pair / 2, g) / 2 + pair % 2;
    }
};

template <int format, int head_dim>
struct Values<format, head_dim, false> : ElementRow<format, head_dim, 2> {
    DEVICE void decode(int step, const StreamTable& table, u32* pairs) const {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int at = 16 * step + 8 * n, rest = this->part;
            pairs[n] = this->value(table, at, rest, 0) | this->value(table, at, rest, 1) << 16;
        }
    }

    DEVICE static int channel(int pair, int g) { return 8 * pair + g; }
};
