// Keys and values of a page as operands of matrix instructions, whatever the page holds.
//
// what      per stream: which bytes a lane loads for a token (pair), and the pairs of halves they
//           decode to; the element of every pair, which the query (or the output) must follow
// mapping   lane = 4 g + t. Keys: t shares a token's row with three lanes, g numbers the token.
//           Values: g shares a token pair's row with seven lanes, t numbers the pair
// bytes     a row once per warp, in loads of 16, 8 or 4 bytes per lane, neighbours side by side
// host twin pagedtq/backends/page_reader.py (StreamReader)
//
// Formats are numbered by what a page holds: 1 to 8, the width of codes; 16, 17 and 32: exact f16,
// bf16 and f32. Widths 2, 3, 4 and f16 load ahead into registers (`tuned`); every other format, and
// head dims whose rows do not divide among the lanes, decode element by element when used.
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

// The widest load that divides `bytes` among `lanes`; 0 if none does.
DEVICE constexpr int load_bytes(int bytes, int lanes) {
    return bytes % (16 * lanes) == 0  ? 16
           : bytes % (8 * lanes) == 0 ? 8
           : bytes % (4 * lanes) == 0 ? 4
                                      : 0;
}

// Whether `lanes` lanes can share a row. Sign words (width 3) follow the code words only where a
// lane has one run of them, or runs of 16 bytes.
DEVICE constexpr bool divides(int format, int bytes, int lanes) {
    const int load = load_bytes(bytes, lanes);
    return load != 0 && (format != 3 || load == 16 || bytes == load * lanes);
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

// The codes (and sign) words one lane loads of a row `row` bytes long that `lanes` lanes share.
template <int format, int head_dim, int row, int lanes>
struct LaneWords {
    static constexpr int kLoad = load_bytes(row, lanes);
    static constexpr int kChunks = row / (kLoad * lanes);
    static constexpr int kWords = kChunks * kLoad / 4;
    // A sign word serves two code words; below 8 bytes a load, a lane has half of one.
    static constexpr bool kSigns = format == 3;
    static constexpr int kSignWords = kSigns ? (kWords + 1) / 2 : 1;
    u32 words[kWords], signs[kSignWords];

    // Byte within the row of a lane's word.
    DEVICE static int byte_of(int word, int part) {
        return word / (kLoad / 4) * kLoad * lanes + part * kLoad + word % (kLoad / 4) * 4;
    }

    // From where a lane's first word and the sign word that serves it lie.
    DEVICE void load(const u8* codes, const u8* sign_row, int part) {
#pragma unroll
        for (int chunk = 0; chunk < kChunks; ++chunk) {
            load_words<kLoad>(codes + chunk * kLoad * lanes, words + chunk * kLoad / 4);
        }
        if constexpr (kSigns) {
            static_assert(kChunks == 1 || kLoad == 16, "sign words follow the code words");
            if constexpr (kLoad == 4) {
                signs[0] = ldg32(sign_row) >> 2 * (part & 1);
            } else {
#pragma unroll
                for (int chunk = 0; chunk < kChunks; ++chunk) {
                    load_words<kLoad / 2>(sign_row + chunk * lanes * (kLoad / 2),
                                          signs + chunk * kLoad / 8);
                }
            }
        }
    }

    // Offsets of a lane's first word and of its sign word.
    DEVICE static int code_offset(int part) { return part * kLoad; }
    DEVICE static int sign_offset(int part) { return part * (kLoad / 2) & ~3; }

    DEVICE u32 sign_of(int word) const {
        return word & 1 ? signs[word / 2] >> 2 : signs[word / 2];
    }
};

// Where one lane finds a stream from some token on; later tokens are constants away.
struct Source {
    const u8 *codes, *signs;
    int part;
};

// f16 bits of a code's value.
DEVICE u32 table_entry(const StreamTable& table, u32 code) { return ldg16(table.entries + code); }

// ---- keys --------------------------------------------------------------------------------------

// Pairs of one lane for one token: kSteps times kPairs; two pairs feed one matrix instruction.
template <int format, int head_dim, bool tuned = is_tuned(format, head_dim)>
struct Keys {
    static constexpr int kRow = row_bytes(format, head_dim);
    using Words = LaneWords<format, head_dim, kRow, 4>;
    static constexpr int kWordsPerStep = format == FORMAT_F16 ? 2 : 1;
    static constexpr int kPairs = format == FORMAT_F16 ? 2 : format == 4 ? 4 : 8;
    static constexpr int kSteps = Words::kWords / kWordsPerStep;

    static constexpr int kSignRow = format == 3 ? sign_row_bytes(head_dim, 4) : 0;

    Words words;

    DEVICE static Source source(const u8* extent, const StreamPlanes& planes, int token, int t) {
        return {extent + (planes.codes + token * kRow + Words::code_offset(t)),
                extent + (planes.signs + token * kSignRow + Words::sign_offset(t)), t};
    }

    DEVICE void load(const Source& source, int tokens) {
        words.load(source.codes + tokens * kRow, source.signs + tokens * kSignRow, source.part);
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

    // Element of byte i of a lane's quad.
    DEVICE static int quad_element(int quad, int i, int t) {
        const int step = quad / kQuads, n = quad % kQuads;
        const int first = Words::byte_of(step, t) * 8 / plane_bits(format, head_dim);
        return first + (format == 4 ? 4 * n + i : QUAD_ELEMENT(n, i));
    }

    // Element of half 0 or 1 of a lane's pair.
    DEVICE static int element(int pair, int half, int t) {
        const int step = pair / kPairs, n = pair % kPairs;
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
    static constexpr int kPairs = 2;
    static constexpr int kSteps = padded_dim(head_dim) / 16;

    static constexpr int kSignRow = sign_row_bytes(head_dim, 4);

    const u8 *codes, *signs;
    int part;

    DEVICE static Source source(const u8* extent, const StreamPlanes& planes, int token, int t) {
        return {extent + (planes.codes + token * kRow), extent + (planes.signs + token * kSignRow),
                t};
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

// ---- values ------------------------------------------------------------------------------------

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
        return {extent + (planes.codes + token * kRow + Words::code_offset(g)),
                extent + (planes.signs + token * kSignRow + Words::sign_offset(g)), g};
    }

    DEVICE void load(const Source& source, int tokens) {
        words.load(source.codes + tokens * kRow, source.signs + tokens * kSignRow, source.part);
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

    DEVICE static int channel(int pair, int g) {
        const int step = pair / kPairs, n = pair % kPairs;
        const int first = Words::byte_of(step, g) / 2 * 8 / plane_bits(format, head_dim);
        if constexpr (format == 4) return first + n;
        if constexpr (format == 3) return first + VALUE3_ELEMENT(n);
        return first + VALUE2_ELEMENT(n);
    }
};

// Exact values are token rows, not interleaved: two rows, paired by permutation.
template <int head_dim>
struct Values<FORMAT_F16, head_dim, true> {
    static constexpr int kRow = 2 * head_dim;
    using Words = LaneWords<FORMAT_F16, head_dim, kRow, 8>;
    static constexpr int kPairs = 2;
    static constexpr int kSteps = Words::kWords;

    Words even, odd;

    DEVICE static Source source(const u8* extent, const StreamPlanes& planes, int token, int g) {
        return {extent + (planes.codes + token * kRow + Words::code_offset(g)), nullptr, g};
    }

    DEVICE void load(const Source& source, int tokens) {
        const u8* row = source.codes + tokens * kRow;
        even.load(row, nullptr, source.part);
        odd.load(row + kRow, nullptr, source.part);
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
    static constexpr int kPairs = 2;
    static constexpr int kSteps = padded_dim(head_dim) / 16;

    static constexpr int kSignRow = sign_row_bytes(head_dim, 2);

    const u8 *codes, *signs;
    int part;

    DEVICE static Source source(const u8* extent, const StreamPlanes& planes, int token, int g) {
        return {extent + (planes.codes + token * kRow), extent + (planes.signs + token * kSignRow),
                g};
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
