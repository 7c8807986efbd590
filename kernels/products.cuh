// Products of a tile's keys with query rows.
//
// what      fragments of query rows, as halves or as bytes (KEY_INT8); scores of a tile
// mapping   fragments: rows are tokens, columns query rows
// bytes     a block's query rows, once
// host twin pagedtq/backends/host_attend.py (Rows, PageAttention.tiles)
//
// The macros of a specialisation are explained in attend.cu.

#pragma once

#include "matrix.cuh"
#include "tiles.cuh"

// What keys decode with.
DEVICE StreamTable key_table_of(const AttendShape& shape, const u16* entries) {
#if KEY_INT8
    return {{{0, 0}, {shape.key_bytes[0], shape.key_bytes[1]}}, entries};
#else
    return {shape.key_table, entries};
#endif
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
