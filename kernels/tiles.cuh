// Tiles of a layer's pages as one warp reads them.
//
// what      what a launch is told about pages and queries; which positions are read; loads of keys,
//           values and norms of a tile
// mapping   lane = 4 g + t as in keys.cuh and values.cuh; a tile is a multiple of 16 tokens
// bytes     the tile's planes, once
// host twin pagedtq/backends/attend_shape.py (AttendShape), host_attend.py (Span, Rows)
//
// The macros of a specialisation are explained in attend.cu.

#pragma once

#include "keys.cuh"
#include "values.cuh"

#define WARPS 4
#define COLUMNS (8 * COLUMN_TILES)
#define SUBTILES (TILE_TOKENS / 16)
#define PADDED_DIM ((HEAD_DIM + 15) / 16 * 16)
#define OUTPUT_TILES (PADDED_DIM / 16)

typedef Keys<KEY_FORMAT, HEAD_DIM> KeyRow;
typedef Values<VALUE_FORMAT, HEAD_DIM> ValueRow;

// What is not loaded ahead gains nothing from larger tiles.
static_assert(TILE_TOKENS == 16 || (HEAD_DIM <= kAheadDim && is_tuned(KEY_FORMAT, HEAD_DIM) &&
                                    is_tuned(VALUE_FORMAT, HEAD_DIM)),
              "stream_formats.tile_tokens and is_tuned disagree");

constexpr bool kKeyNorms = !is_exact(KEY_FORMAT);
constexpr bool kValueNorms = !is_exact(VALUE_FORMAT);

#define NO_SCORE (-bits_float(0x7f800000u))

// Everything of a launch that is no array.
struct AttendShape {
    i64 page_stride, head_stride;
    StreamPlanes keys, values;
    Table key_table, value_table;  // VALUE_INT8: codes as bytes, in value_table.low
    u32 key_bytes[2];  // KEY_INT8: codes as bytes (fragments.cuh)
    u32 qjl_signs, residual_norms;
    int page_shift;    // log2 of the page size
    int table_stride;  // entries of a row of the page table
    int batch;
    int num_kv_heads;
    int group;         // query heads of a KV head
    int window_left;   // negative: none
    float soft_cap;    // with SOFT_CAP
    float key_unit;    // KEY_INT8: the unit of the key table's half-integers
    float value_unit;  // VALUE_INT8
    int has_offsets;   // key means were subtracted: `offsets` holds sm_scale * q . mean
};

// QJL signs of a token: 16-bit units, pairs of bits eight apart. Sections (rows.cuh) as of words; what
// does not divide into units is read bit by bit, a step at a time.
struct Sketch {
    static constexpr bool kTuned = HEAD_DIM % 64 == 0;
    static constexpr int kUnits = kTuned ? HEAD_DIM / 64 : 1;
    static constexpr int kAllPairs = PADDED_DIM / 8;
    static constexpr int kSections = !kTuned                 ? kAllPairs / 2
                                     : HEAD_DIM <= kAheadDim ? 1
                                                             : kUnits;
    static constexpr int kPairs = kAllPairs / kSections;
    static constexpr int kRow = (HEAD_DIM + 7) / 8;

    u16 units[kSections == 1 ? kUnits : 1];
    const u8* row;
    int part, first;

    DEVICE static const u8* source(const u8* extent, u32 plane, int token, int t) {
        return extent + (plane + token * kRow + (kTuned ? 2 * kUnits * t : 0));
    }

    DEVICE void load(const u8* source, int tokens, int t) {
        row = source + tokens * kRow;
        part = t, first = 0;
        if constexpr (kTuned && kSections == 1) {
#pragma unroll
            for (int i = 0; i < kUnits; ++i) units[i] = ldg16(row + 2 * i);
        }
    }

    DEVICE void enter(int section) {
        if constexpr (kSections > 1) {
            first = section * kPairs;
            if constexpr (kTuned) units[0] = ldg16(row + 2 * section);
        }
    }

    // Plus or minus one in halves; lop3 0x6A is (a & b) ^ c.
    DEVICE u32 pair(int n) const {
        if constexpr (kTuned) {
            const u32 spread = prmt(units[n / 8], 0, 0x4140u);
            return lop3<0x6A>(spread << (15 - n % 8), 0x80008000u, 0xBC00BC00u);
        } else {
            u32 halves = 0;
            for (int half = 0; half < 2; ++half) {
                const int e = element(first + n, half, part);
                if (e < HEAD_DIM) {
                    const u32 bit = ldg8(row + e / 8) >> e % 8 & 1;
                    halves |= (bit ? 0x3C00u : 0xBC00u) << 16 * half;
                }
            }
            return halves;
        }
    }

    // Element of half 0 or 1 of a lane's pair, counted over all sections.
    DEVICE static int element(int n, int half, int t) {
        if constexpr (kTuned) return 16 * (kUnits * t + n / 8) + n % 8 + 8 * half;
        return 8 * n + 2 * t + half;
    }
};

// The readable positions of a unit, and its runs of tiles; in shared memory, so that the hot loop
// need not carry them.
struct Reach {
    int low, high;    // positions [low, high) ...
    int keep, start;  // ... below keep or from start on
    struct {
        int begin, end;              // tiles of this part
        int whole_begin, whole_end;  // those of them that every row reads throughout
    } runs[2];

    DEVICE bool allows(int position) const {
        return position >= low && position < high && (position < keep || position >= start);
    }
};

// Cut the readable positions into runs of tiles, one on either side of the hole, and take part
// `part` of `parts`. Every row reads positions [floor_all, last_all]. A tile that holds ends of
// both runs belongs to the first.
DEVICE void cut_runs(Reach& reach, int floor_all, int last_all, int part, int parts) {
    const bool hole = reach.keep < reach.start;
    const int low[2] = {reach.low, max(reach.low, reach.start)};
    const int high[2] = {hole ? min(reach.high, reach.keep) : reach.high, reach.high};
    int begin[2], count[2];
    begin[0] = low[0] / TILE_TOKENS;
    count[0] = high[0] > low[0] ? (high[0] + TILE_TOKENS - 1) / TILE_TOKENS - begin[0] : 0;
    begin[1] = max(low[1] / TILE_TOKENS, count[0] > 0 ? begin[0] + count[0] : 0);
    count[1] = (high[1] + TILE_TOKENS - 1) / TILE_TOKENS - begin[1];
    if (!hole || high[1] <= low[1] || count[1] < 0) count[1] = 0;
    const i64 total = count[0] + count[1];
    const int share_begin = static_cast<int>(total * part / parts);
    const int share_end = static_cast<int>(total * (part + 1) / parts);
    for (int i = 0; i < 2; ++i) {
        auto& run = reach.runs[i];
        const int before = i ? count[0] : 0;
        run.begin = begin[i] + max(share_begin - before, 0);
        run.end = begin[i] + min(share_end - before, count[i]);
        const int inner_low = max(low[i], floor_all), inner_high = min(high[i], last_all + 1);
        run.whole_begin = min(max((inner_low + TILE_TOKENS - 1) / TILE_TOKENS, run.begin), run.end);
        run.whole_end = max(min(inner_high / TILE_TOKENS, run.end), run.whole_begin);
    }
}

// What the loads of `n` times 16 tokens leave in registers.
template <int n>
struct KeyTile {
    KeyRow rows[n][2];
#if KEY_PROD
    Sketch sketches[n][2];
#endif

    DEVICE void load(const u8* extent, const AttendShape& shape, int first, int g, int t) {
        const Source source = KeyRow::source(extent, shape.keys, first + g, t);
#if KEY_PROD
        const u8* sketch_plane = Sketch::source(extent, shape.qjl_signs, first + g, t);
#endif
#pragma unroll
        for (int s = 0; s < n; ++s) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = 16 * s + 8 * half;
                rows[s][half].load(source, token);
#if KEY_PROD
                sketches[s][half].load(sketch_plane, token, t);
#endif
            }
        }
    }
};

template <int n>
struct ValueTile {
    typedef ValueRow Row;
    Row rows[n][2];

    DEVICE void load(const u8* extent, const AttendShape& shape, int first, int g, int t) {
        const Source source = ValueRow::source(extent, shape.values, first + 2 * t, g);
#pragma unroll
        for (int s = 0; s < n; ++s) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = 16 * s + 8 * half;
                rows[s][half].load(source, token);
            }
        }
    }
};

// Norms of the same tokens. They are needed late in a tile: loading them ahead would only hold
// registers.
template <int n>
struct NormTile {
    u16 keys[n][2];
    u16 residuals[n][2];  // with KEY_PROD
    u32 values[n][2];     // of token pairs; VALUE_INT8: of tokens, as keys
    u32 sample;           // value norms of two tokens, all tokens over the warp

    // `norms`: two bytes per token further than the extent.
    DEVICE void load_keys(const u8* norms, const AttendShape& shape, int g, int t) {
        sample = 0;
        if constexpr (kValueNorms && !VALUE_INT8) {
            sample = ldg32(norms + (shape.values.norms + (4 * (4 * g + t) & (32 * n - 1))));
        }
        const u8* key_plane = norms + (shape.keys.norms + 2 * g);
        const u8* residual_plane = norms + (shape.residual_norms + 2 * g);
#pragma unroll
        for (int s = 0; s < n; ++s) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = 16 * s + 8 * half;
                if constexpr (kKeyNorms) keys[s][half] = ldg16(key_plane + 2 * token);
                if constexpr (KEY_PROD) residuals[s][half] = ldg16(residual_plane + 2 * token);
            }
        }
    }
    DEVICE void load_values(const u8* norms, const AttendShape& shape, int g, int t) {
        const u8* value_plane = norms + (shape.values.norms + (VALUE_INT8 ? 2 * g : 4 * t));
#pragma unroll
        for (int s = 0; s < n; ++s) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const u8* from = value_plane + 2 * (16 * s + 8 * half);
                if constexpr (VALUE_INT8) {
                    values[s][half] = ldg16(from);
                } else if constexpr (kValueNorms) {
                    values[s][half] = ldg32(from);
                }
            }
        }
    }
};
