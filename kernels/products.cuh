// Products of a tile's keys with query rows.
//
// what      scores of a tile, from keys as halves or as bytes (KEY_INT8)
// mapping   fragments: rows are tokens, columns query rows
// bytes     none moved
// host twin pagedtq/backends/host_attend.py (PageAttention.tiles)
//
// The macros of a specialisation are explained in attend.cu.

#pragma once

#include "queries.cuh"

// Scores of a tile, fragment by fragment: rows are tokens, columns query rows.
template <int n>
struct Scores {
    float at[n][COLUMN_TILES][4];
};

// Sums of products: exact integers of both terms of a query row, or halves' in f32.
struct Products {
#if KEY_INT8
    int high[COLUMN_TILES][4], low[COLUMN_TILES][4];
#else
    float sums[COLUMN_TILES][4];
#endif

    // `count` words of either row's elements, from query step `step` on.
    template <int count>
    DEVICE void add(const u32* upper, const u32* lower, const Queries& queries, int step) {
#pragma unroll
        for (int n = 0; n < count; n += 2) {
            const u32 left[4] = {upper[n], lower[n], upper[n + 1], lower[n + 1]};
            u32 right[STEP_WORDS];
            queries.words.get(step + n / 2, right);
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; ++j) {
#if KEY_INT8
                mma_u8s8(high[j], left, right[4 * j], right[4 * j + 1]);
                mma_u8s8(low[j], left, right[4 * j + 2], right[4 * j + 3]);
#else
                multiply_f16(sums[j], left, right[2 * j], right[2 * j + 1]);
#endif
            }
        }
    }
};

// Products of 16 tokens' codes with the query rows, norms and scales left out.
template <class Row>
DEVICE void multiply_keys(const Row& upper_row, const Row& lower_row, const Queries& queries,
                          const StreamTable& table, float (*products)[4]) {
    Products sums = {};
#if KEY_INT8
#pragma unroll
    for (int step = 0; step < Row::kSteps; ++step) {
        u32 upper[Row::kQuads], lower[Row::kQuads];
        upper_row.decode_bytes(step, table, upper);
        lower_row.decode_bytes(step, table, lower);
        sums.add<Row::kQuads>(upper, lower, queries, step * Row::kQuads / 2);
    }
    if constexpr (Row::kTailQuads > 0) {
        u32 upper[Row::kTailQuads], lower[Row::kTailQuads];
        Row::decode_tail_bytes(upper_row, lower_row, table, upper, lower);
        sums.add<Row::kTailQuads>(upper, lower, queries, Row::kSteps * Row::kQuads / 2);
    }
    // Integer sums are exact; the shift takes 127.5 off every byte.
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            products[j][k] = static_cast<float>(sums.high[j][k] * 128 + sums.low[j][k]) +
                             queries.shift_of(j, k & 1);
        }
    }
#else
    static_assert(kQueriesShared || Row::kSections == 1, "registers have no indices at run time");
#pragma unroll 1
    for (int section = 0; section < Row::kSections; ++section) {
        const Row upper_part = section_of(upper_row, section);
        const Row lower_part = section_of(lower_row, section);
#pragma unroll
        for (int step = 0; step < Row::kSteps; ++step) {
            if (beyond<Row>(section, step)) break;
            u32 upper[Row::kPairs], lower[Row::kPairs];
            upper_part.decode(step, table, upper);
            lower_part.decode(step, table, lower);
            sums.add<Row::kPairs>(upper, lower, queries,
                                  (section * Row::kSteps + step) * Row::kPairs / 2);
        }
    }
    if constexpr (Row::kTailPairs > 0) {
        u32 upper[Row::kTailPairs], lower[Row::kTailPairs];
        decode_tails(upper_row, lower_row, table, upper, lower);
        sums.add<Row::kTailPairs>(upper, lower, queries, Row::kAllSteps * Row::kPairs / 2);
    }
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) products[j][k] = sums.sums[j][k];
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
#pragma unroll 1
        for (int section = 0; section < Sketch::kSections; ++section) {
            const Sketch upper = section_of(keys.sketches[s][0], section);
            const Sketch lower = section_of(keys.sketches[s][1], section);
#pragma unroll
            for (int n = 0; n < Sketch::kPairs; n += 2) {
                const u32 left[4] = {upper.pair(n), lower.pair(n), upper.pair(n + 1),
                                     lower.pair(n + 1)};
                u32 right[SKETCH_WORDS];
                queries.sketch.get((section * Sketch::kPairs + n) / 2, right);
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; ++j) {
                    multiply_f16(residual[j], left, right[2 * j], right[2 * j + 1]);
                }
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
