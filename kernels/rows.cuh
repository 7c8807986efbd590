// What one lane holds of a row of a page.
//
// what      a lane's share of a row: words, decoded from registers, or where to find its elements
// mapping   a row is shared by 4 lanes (keys: one token) or 8 (values: a token pair)
// bytes     a row once per warp, in loads of 16, 8, 4 or 2 bytes per lane, neighbours side by side;
//           element by element, every byte once per element in it
// host twin pagedtq/backends/page_reader.py (StreamReader)
//
// Rows are decoded section by section. Up to head dim kAheadDim words are loaded a tile ahead, and a
// row is one section. Above, sums of values leave no registers for that: a section is a load or two
// of every lane, made when its turn comes. What is decoded element by element has sections of 32 or
// 64 elements. Loops over sections are not unrolled, so that never more than one is in registers.

#pragma once

#include "formats.cuh"

constexpr int kAheadDim = 256;

// Where one lane finds a stream from some token on; later tokens are constants away.
struct Source {
    const u8 *codes, *signs;
    const u8 *tail, *tail_signs;  // of rows with tails
    int part;
};

// Two rows' tails, or their signs, as one word.
DEVICE u32 join_tails(u32 low, u32 high) { return prmt(low, high, 0x5410u); }

// Which pair of a word of two tails is pair `pair` of the lower or upper one.
template <int format>
DEVICE constexpr int tail_pair(int pair, int half) {
    return format == 3 ? 4 * (pair >> 1) + 2 * half + (pair & 1) : 2 * pair + half;
}

// The codes (and sign) words one lane loads of a row `row` bytes long that `lanes` lanes share.
template <int format, int head_dim, int row, int lanes>
struct LaneWords {
    // A section above kAheadDim is 64 or 128 elements of a key, or channels of a pair, where the row
    // divides so: loads of 8 bytes below width 4, two of 16 for f16.
    static constexpr bool kAhead = head_dim <= kAheadDim;
    static constexpr int kWidest = load_bytes(row, lanes);
    static constexpr int kLoad = !kAhead && format < 4 && kWidest > 8 ? 8 : kWidest;
    static constexpr bool kTail = tail_bytes(row, lanes) != 0;
    static constexpr int kMain = row - tail_bytes(row, lanes) * lanes;
    static constexpr int kChunks = kMain / (kLoad * lanes);
    static constexpr int kPerSection = kAhead ? kChunks : is_exact(format) && kChunks % 2 == 0 ? 2 : 1;
    static constexpr int kSections = kChunks / kPerSection;
    // Of one section. A sign word serves two code words; below 8 bytes a load, two lanes share it.
    static constexpr int kWords = kPerSection * kLoad / 4;
    static constexpr bool kSigns = format == 3;
    static constexpr int kSignWords = kLoad == 4 ? kPerSection : kWords / 2;
    u32 words[kWords], signs[kSignWords];
    u32 tail, tail_signs;  // half-words
    Source sections;       // unless there is but one

    // Byte within the row of a lane's word; the word behind the last is the tail.
    DEVICE static int byte_of(int word, int part) {
        if (kTail && word == kSections * kWords) return kMain + 2 * part;
        return word / (kLoad / 4) * kLoad * lanes + part * kLoad + word % (kLoad / 4) * 4;
    }

    // From the rows of codes and of signs, in bytes from the extent: sums of 32 bits, then one of 64.
    DEVICE static Source source(const u8* extent, u32 codes, u32 sign_row, int part) {
        Source source = {extent + (codes + part * kLoad),
                         extent + (sign_row + (part * (kLoad / 2) & ~3)), nullptr, nullptr, part};
        if constexpr (kTail) {
            source.tail = extent + (codes + (kMain + 2 * part));
            source.tail_signs = extent + (sign_row + (kMain / 2 + (part & ~3) + 2 * (part & 1)));
        }
        return source;
    }

    // `codes` and `sign_row`: bytes from the source.
    DEVICE void load(const Source& source, int codes, int sign_row) {
        if constexpr (kSections == 1) {
            load_codes(source, codes);
        } else {
            sections = {source.codes + codes, source.signs + sign_row, nullptr, nullptr,
                        source.part};
        }
        if constexpr (kTail) tail = ldg16(source.tail + codes);
        if constexpr (kSigns && kSections == 1) load_signs(source, sign_row);
        if constexpr (kSigns && kTail) {
            const u32 pair = ldg16(source.tail_signs + sign_row);
            tail_signs = pair >> (source.part & 2);
        }
    }

    DEVICE void enter(int section) {
        if constexpr (kSections > 1) {
            const int chunk = section * kPerSection;
            load_codes(sections, chunk * kLoad * lanes);
            if constexpr (kSigns) load_signs(sections, chunk * lanes * (kLoad / 2));
        }
    }

    // The words of a section, and their signs.
    DEVICE void load_codes(const Source& source, int codes) {
#pragma unroll
        for (int chunk = 0; chunk < kPerSection; ++chunk) {
            load_words<kLoad>(source.codes + (codes + chunk * kLoad * lanes),
                              words + chunk * kLoad / 4);
        }
    }
    DEVICE void load_signs(const Source& source, int sign_row) {
#pragma unroll
        for (int chunk = 0; chunk < kPerSection; ++chunk) {
            const u8* from = source.signs + (sign_row + chunk * lanes * (kLoad / 2));
            if constexpr (kLoad == 4) {
                signs[chunk] = ldg32(from) >> 2 * (source.part & 1);
            } else {
                load_words<kLoad / 2>(from, signs + chunk * kLoad / 8);
            }
        }
    }

    // Signs that belong to a word of the section, 0 where codes hold their own.
    DEVICE u32 sign_of(int word) const {
        if constexpr (!kSigns) return 0;
        if constexpr (kLoad == 4) return signs[word];
        return word & 1 ? signs[word / 2] >> 2 : signs[word / 2];
    }

    // The tails of two rows as one word, and their signs.
    DEVICE static u32 joined(const LaneWords& low, const LaneWords& high) {
        return join_tails(low.tail, high.tail);
    }
    DEVICE static u32 joined_signs(const LaneWords& low, const LaneWords& high) {
        if constexpr (!kSigns) return 0;
        return join_tails(low.tail_signs, high.tail_signs);
    }
};

// A row (or `rows` interleaved ones) decoded from registers.
template <int format, int head_dim, int rows, int lanes>
struct WordRow {
    static constexpr int kRow = row_bytes(format, head_dim);
    static constexpr int kSignRow = format == 3 ? sign_row_bytes(head_dim, 4 / rows) : 0;
    using Words = LaneWords<format, head_dim, rows * kRow, lanes>;
    static constexpr int kSections = Words::kSections;

    Words words;

    // `part` numbers the lane among those that share the row.
    DEVICE static Source source(const u8* extent, const StreamPlanes& planes, int token, int part) {
        return Words::source(extent, planes.codes + token * kRow, planes.signs + token * kSignRow,
                             part);
    }

    DEVICE void load(const Source& source, int tokens) {
        words.load(source, tokens * kRow, tokens * kSignRow);
    }

    DEVICE void enter(int section) { words.enter(section); }
};

// A row (or one of `rows` interleaved ones) decoded element by element.
template <int format, int head_dim, int rows>
struct ElementRow {
    static constexpr int kRow = row_bytes(format, head_dim);
    static constexpr int kSignRow = sign_row_bytes(head_dim, 4 / rows);
    static constexpr int kPairs = 2, kTailPairs = 0;
    static constexpr int kAllSteps = padded_dim(head_dim) / 16;
    static constexpr int kMost = head_dim * COLUMN_TILES <= 256 ? 4 : 2;
    static constexpr int kSteps = kAllSteps < kMost ? kAllSteps : kMost;
    static constexpr int kSections = (kAllSteps + kSteps - 1) / kSteps;

    const u8 *codes, *signs;
    int part, first;

    DEVICE static Source source(const u8* extent, const StreamPlanes& planes, int token, int part) {
        return {extent + (planes.codes + token * kRow), extent + (planes.signs + token * kSignRow),
                nullptr, nullptr, part};
    }

    DEVICE void load(const Source& source, int tokens) {
        codes = source.codes + tokens * kRow;
        signs = source.signs + tokens * kSignRow;
        part = source.part, first = 0;
    }

    // Sections of 32 or 64 elements are whole bytes of every format, and whole groups of signs.
    DEVICE void enter(int section) {
        if constexpr (kSections > 1) {
            first = 16 * kSteps * section;
            codes += first / 8 * (plane_bits(format, head_dim) * (is_exact(format) ? 1 : rows));
            signs += first / 8 * rows;
        }
    }

    // f16 bits of element `at` + `rest` of the section, `at` a multiple of 8 and `rest` below 8; 0
    // beyond the row. `token`: which of a pair's rows.
    DEVICE u32 value(const StreamTable& table, int at, int rest, int token) const {
        if (head_dim % 16 != 0 && first + at + rest >= head_dim) return 0;
        if constexpr (is_exact(format)) {
            return exact_at<format>(codes + token * kRow, at + rest);
        } else {
            return table_entry(table, code_at<format, head_dim, rows, 4 / rows>(
                                          codes + token, signs + token, at, rest));
        }
    }
};

// A row with one of its sections ready to be decoded.
template <class Row>
DEVICE Row section_of(const Row& row, int section) {
    Row part = row;
    part.enter(section);
    return part;
}

// Whether step `step` of a section lies beyond the row: sections of elements fill up the last.
template <class Row>
DEVICE bool beyond(int section, int step) {
    return Row::kSections * Row::kSteps > Row::kAllSteps &&
           section * Row::kSteps + step >= Row::kAllSteps;
}

// Pairs of two rows' tails, which share a word; they count behind those of the steps.
template <class Row>
DEVICE void decode_tails(const Row& first, const Row& second, const StreamTable& table,
                         u32* first_pairs, u32* second_pairs) {
    typedef typename Row::Words Words;
    u32 pairs[8];
    Row::decode_word(Words::joined(first.words, second.words),
                     Words::joined_signs(first.words, second.words), table, pairs);
#pragma unroll
    for (int n = 0; n < Row::kTailPairs; ++n) {
        first_pairs[n] = pairs[tail_pair<Row::kFormat>(n, 0)];
        second_pairs[n] = pairs[tail_pair<Row::kFormat>(n, 1)];
    }
}
