// Tiles of a layer's pages as one warp reads them, and their scores.
//
// what      what a launch is told about pages and queries; which positions are read; loads of keys,
//           values and norms of a tile; products of keys and query rows
// mapping   lane = 4 g + t as in streams.cuh; a tile is a multiple of 16 tokens
// bytes     the tile's planes, once
// host twin pagedtq/backends/attend_arguments.py (AttendShape), host_attend.py (Span, Rows)
//
// The macros of a specialisation are explained in attend.cu.

#pragma once

#include "matrix.cuh"
#include "streams.cuh"

#define WARPS 4
#define COLUMNS (8 * COLUMN_TILES)
#define SUBTILES (TILE_TOKENS / 16)
#define PADDED_DIM ((HEAD_DIM + 15) / 16 * 16)
#define OUTPUT_TILES (PADDED_DIM / 16)

typedef Keys<KEY_FORMAT, HEAD_DIM> KeyRow;
typedef Values<VALUE_FORMAT, HEAD_DIM> ValueRow;

// What is decoded element by element gains nothing from larger tiles.
static_assert(TILE_TOKENS == 16 ||
                  (is_tuned(KEY_FORMAT, HEAD_DIM) && is_tuned(VALUE_FORMAT, HEAD_DIM)),
              "attend_arguments.tile_tokens and is_tuned disagree");

constexpr bool kKeyNorms = !is_exact(KEY_FORMAT);
constexpr bool kValueNorms = !is_exact(VALUE_FORMAT);

#define NO_SCORE (-bits_float(0x7f800000u))

// Everything of a launch that is no array.
struct AttendShape {
    i64 page_stride, head_stride;
    StreamPlanes keys, values;
    Table key_table, value_table;
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
    int has_offsets;   // key means were subtracted: `offsets` holds sm_scale * q . mean
};

// What keys decode with.
DEVICE StreamTable key_table_of(const AttendShape& shape, const u16* entries) {
#if KEY_INT8
    return {{{0, 0}, {shape.key_bytes[0], shape.key_bytes[1]}}, entries};
#else
    return {shape.key_table, entries};
#endif
}

// QJL signs of a token: 16-bit units, pairs of bits eight apart.
struct Sketch {
    static constexpr bool kTuned = HEAD_DIM % 64 == 0;
    static constexpr int kUnits = PADDED_DIM / 64 > 0 ? PADDED_DIM / 64 : 1;
    static constexpr int kPairs = PADDED_DIM / 8;
    static constexpr int kRow = (HEAD_DIM + 7) / 8;

    u16 units[kUnits];
    const u8* row;
    int part;

    DEVICE static const u8* source(const u8* extent, u32 plane, int token, int t) {
        return extent + (plane + token * kRow + (kTuned ? 2 * kUnits * t : 0));
    }

    DEVICE void load(const u8* source, int tokens, int t) {
        row = source + tokens * kRow;
        part = t;
        if constexpr (kTuned) {
#pragma unroll
            for (int i = 0; i < kUnits; ++i) units[i] = ldg16(row + 2 * i);
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
                const int e = element(n, half, part);
                if (e < HEAD_DIM) {
                    const u32 bit = ldg8(row + e / 8) >> e % 8 & 1;
                    halves |= (bit ? 0x3C00u : 0xBC00u) << 16 * half;
                }
            }
            return halves;
        }
    }

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

#if KEY_INT8
static_assert(KEY_FORMAT >= 2 && KEY_FORMAT <= 4 && is_tuned(KEY_FORMAT, HEAD_DIM) && !KEY_PROD,
              "KEY_INT8 takes keys of width 2, 3 or 4 whose rows divide among the lanes");
// Sums of 255 * 2^14 * HEAD_DIM fit in 32 bits.
static_assert(HEAD_DIM <= 256, "KEY_INT8 takes head dims up to 256");
// Query rows are at most 2^10, which rounding to halves may reach (rotate_queries.cu). Times this
// they are integers 128 a + b with a in [-127, 127] and b in [-64, 63].
#define BYTE_QUERY_SCALE 15.875f
#endif

// A lane's fragments of query rows: elements in the order of the key stream.
struct Queries {
#if KEY_INT8
    u32 high[COLUMN_TILES][HEAD_DIM / 16], low[COLUMN_TILES][HEAD_DIM / 16];
    // -127.5 times the sum of a row's integers. Width 2 has no registers left for it.
#if KEY_FORMAT == 2
    const float* shift;  // in shared memory
    DEVICE float shift_of(int j, int c) const { return shift[8 * j + c]; }
#else
    float shift[COLUMN_TILES][2];
    DEVICE float shift_of(int j, int c) const { return shift[j][c]; }
#endif
#else
    u32 keys[COLUMN_TILES][PADDED_DIM / 8];
#endif
#if KEY_PROD
    u32 sketch[COLUMN_TILES][PADDED_DIM / 8];
#endif
    float scale[COLUMN_TILES][2];
#if SOFT_CAP
    float offset[COLUMN_TILES][2];
#endif
};

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
    ValueRow rows[n][2];

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
    u32 values[n][2];     // of token pairs
    u32 sample;           // value norms of two tokens, all tokens over the warp

    // `norms`: two bytes per token further than the extent.
    DEVICE void load_keys(const u8* norms, const AttendShape& shape, int g, int t) {
        sample = 0;
        if constexpr (kValueNorms) {
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
    DEVICE void load_values(const u8* norms, const AttendShape& shape, int t) {
        const u8* value_plane = norms + (shape.values.norms + 4 * t);
#pragma unroll
        for (int s = 0; s < n; ++s) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if constexpr (kValueNorms) {
                    values[s][half] = ldg32(value_plane + 2 * (16 * s + 8 * half));
                }
            }
        }
    }
};

// Scores of a tile, fragment by fragment: rows are tokens, columns query rows.
template <int n>
struct Scores {
    float at[n][COLUMN_TILES][4];
};

// Products of 16 tokens' codes with the query rows, norms and scales left out.
DEVICE void multiply_keys(const KeyRow& upper_row, const KeyRow& lower_row, const Queries& queries,
                          const StreamTable& table, float (*products)[4]) {
#if KEY_INT8
    int high[COLUMN_TILES][4] = {}, low[COLUMN_TILES][4] = {};
#pragma unroll
    for (int step = 0; step < KeyRow::kSteps; ++step) {
        u32 upper[KeyRow::kQuads], lower[KeyRow::kQuads];
        upper_row.decode_bytes(step, table, upper);
        lower_row.decode_bytes(step, table, lower);
#pragma unroll
        for (int n = 0; n < KeyRow::kQuads; n += 2) {
            const u32 left[4] = {upper[n], lower[n], upper[n + 1], lower[n + 1]};
            const int quad = step * KeyRow::kQuads + n;
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; ++j) {
                mma_u8s8(high[j], left, queries.high[j][quad], queries.high[j][quad + 1]);
                mma_u8s8(low[j], left, queries.low[j][quad], queries.low[j][quad + 1]);
            }
        }
    }
    // Integer sums are exact; the shift takes 127.5 off every byte.
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            products[j][k] =
                static_cast<float>(high[j][k] * 128 + low[j][k]) + queries.shift_of(j, k & 1);
        }
    }
#else
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) products[j][k] = 0.0f;
    }
#pragma unroll
    for (int step = 0; step < KeyRow::kSteps; ++step) {
        u32 upper[KeyRow::kPairs], lower[KeyRow::kPairs];
        upper_row.decode(step, table, upper);
        lower_row.decode(step, table, lower);
#pragma unroll
        for (int n = 0; n < KeyRow::kPairs; n += 2) {
            const u32 left[4] = {upper[n], lower[n], upper[n + 1], lower[n + 1]};
            const int pair = step * KeyRow::kPairs + n;
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; ++j) {
                multiply_f16(products[j], left, queries.keys[j][pair], queries.keys[j][pair + 1]);
            }
        }
    }
#endif
}

template <int subtiles>
DEVICE void score_tile(const KeyTile<subtiles>& keys, const NormTile<subtiles>& norms,
                       const Queries& queries, const StreamTable& table, float soft_cap,
                       Scores<subtiles>& scores) {
#pragma unroll
    for (int s = 0; s < subtiles; ++s) {
        float products[COLUMN_TILES][4];
        multiply_keys(keys.rows[s][0], keys.rows[s][1], queries, table, products);
        if constexpr (kKeyNorms) {
            const float upper = f16_to_f32(norms.keys[s][0]), lower = f16_to_f32(norms.keys[s][1]);
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; ++j) {
                products[j][0] *= upper, products[j][1] *= upper;
                products[j][2] *= lower, products[j][3] *= lower;
            }
        }
#if KEY_PROD
        float residual[COLUMN_TILES][4] = {};
#pragma unroll
        for (int n = 0; n < Sketch::kPairs; n += 2) {
            const Sketch &upper = keys.sketches[s][0], &lower = keys.sketches[s][1];
            const u32 left[4] = {upper.pair(n), lower.pair(n), upper.pair(n + 1),
                                 lower.pair(n + 1)};
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; ++j) {
                multiply_f16(residual[j], left, queries.sketch[j][n], queries.sketch[j][n + 1]);
            }
        }
        const float upper_norm = f16_to_f32(norms.residuals[s][0]);
        const float lower_norm = f16_to_f32(norms.residuals[s][1]);
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                products[j][k] += residual[j][k] * (k < 2 ? upper_norm : lower_norm);
            }
        }
#endif
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                float x = products[j][k];
#if SOFT_CAP
                // cap tanh(x / cap) = cap (1 - 2 / (1 + exp(2 x / cap))), in log2 units throughout.
                x = x * queries.scale[j][k & 1] + queries.offset[j][k & 1];
                x = 1.0f - 2.0f * ex2(-lg2(1.0f + ex2(x * (2.0f / soft_cap))));
                x *= soft_cap * 1.44269504f;
#endif
                scores.at[s][j][k] = x;
            }
        }
    }
}

// A pair of halves of a query row; elements beyond head_dim are zero.
DEVICE u32 query_pair(const u16* row, int first, int second) {
    const u32 low = first < HEAD_DIM ? row[first] : 0, high = second < HEAD_DIM ? row[second] : 0;
    return low | high << 16;
}

#if KEY_INT8
// A row's bytes for quad n, and the sum of their integers.
DEVICE int query_quad(const u16* row, int n, int t, u32& high, u32& low) {
    int sum = 0;
    high = low = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float x = f16_to_f32(row[KeyRow::quad_element(n, i, t)]);
        const int whole = round_to_int(x * BYTE_QUERY_SCALE), upper = (whole + 64) >> 7;
        high |= (static_cast<u32>(upper) & 255u) << 8 * i;
        low |= (static_cast<u32>(whole - upper * 128) & 255u) << 8 * i;
        sum += whole;
    }
    return sum;
}
#endif

// Fragments and scales of a block's rows, whose indices lie in shared memory, as do `shifts`
// (KEY_INT8). All threads of the block call it.
DEVICE void load_queries(Queries& queries, const AttendShape& shape, const u16* rows,
                         const float* scales, const u16* sketches, const int* row_index,
                         float* shifts, int g, int t) {
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
        const u16* row = rows + static_cast<i64>(row_index[8 * j + g]) * HEAD_DIM;
#pragma unroll
        for (int c = 0; c < 2; ++c) queries.scale[j][c] = scales[row_index[8 * j + 2 * t + c]];
#if KEY_INT8
        int sum = 0;
#pragma unroll
        for (int n = 0; n < HEAD_DIM / 16; ++n) {
            sum += query_quad(row, n, t, queries.high[j][n], queries.low[j][n]);
        }
        // Lanes 4 g to 4 g + 3 share row g, which is column g of the products.
        sum += shfl_xor(sum, 1);
        sum += shfl_xor(sum, 2);
#if KEY_FORMAT == 2
        if (threadIdx.x < WARP_SIZE && t == 0) shifts[8 * j + g] = -127.5f * static_cast<float>(sum);
#endif
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#if KEY_FORMAT != 2
            queries.shift[j][c] = -127.5f * static_cast<float>(shfl_idx(sum, 4 * (2 * t + c)));
#endif
            queries.scale[j][c] *= shape.key_unit * (1.0f / BYTE_QUERY_SCALE);
        }
#else
#pragma unroll
        for (int n = 0; n < PADDED_DIM / 8; ++n) {
            queries.keys[j][n] = query_pair(row, KeyRow::element(n, 0, t), KeyRow::element(n, 1, t));
        }
#endif
#if KEY_PROD
        const u16* sketch = sketches + static_cast<i64>(row_index[8 * j + g]) * HEAD_DIM;
#pragma unroll
        for (int n = 0; n < PADDED_DIM / 8; ++n) {
            queries.sketch[j][n] =
                query_pair(sketch, Sketch::element(n, 0, t), Sketch::element(n, 1, t));
        }
#endif
    }
#if KEY_INT8 && KEY_FORMAT == 2
    queries.shift = shifts + 2 * t;
    sync_block();
#endif
}
