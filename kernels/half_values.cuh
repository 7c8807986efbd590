// The weighted sum of values, as halves.
//
// what      weights of a tile as right operands, values times them into the running sums
// mapping   fragments: columns are query rows, rows channels
// bytes     none moved
// host twin pagedtq/backends/host_attend.py (PageAttention.attend)

#pragma once

#include "softmax.cuh"

// Halves of two tokens each.
template <int subtiles>
struct Weights {
    u32 at[subtiles][COLUMN_TILES][2];
};

// Fold a tile's scores into the state.
template <int subtiles>
DEVICE void weigh_tile(State& state, const Queries& queries, const Scores<subtiles>& scores,
                       const NormTile<subtiles>& norms, Weights<subtiles>& weights) {
    follow_tile(state, queries, scores, norms.sample);
#pragma unroll
    for (int s = 0; s < subtiles; ++s) {
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
            float weight[4];
            weigh(state, queries, scores.at[s][j], j, weight);
            weights.at[s][j][0] = transpose_pairs(h2_from(weight[0], weight[1]));
            weights.at[s][j][1] = transpose_pairs(h2_from(weight[2], weight[3]));
        }
    }
}

// Add `count` channels' values of four tokens a lane to the sums from `tile` on.
template <bool cut, int count>
DEVICE void add_pairs(State& state, const u32* first, const u32* second, u32 (*weights)[2],
                      const u32 (*readable)[2], int subtile, int tile) {
#pragma unroll
    for (int n = 0; n < count; n += 2) {
        u32 left[4] = {first[n], first[n + 1], second[n], second[n + 1]};
        if constexpr (cut && !kValueNorms) {
            left[0] &= readable[subtile][0], left[1] &= readable[subtile][0];
            left[2] &= readable[subtile][1], left[3] &= readable[subtile][1];
        }
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
            multiply_f16(state.sums[j][tile + n / 2], left, weights[j][0], weights[j][1]);
        }
    }
}

// Bring the sums of the next `tiles` tiles to the front, which a loop that is not unrolled finds there.
// After all sections they are where they were.
template <int tiles>
DEVICE void turn_sums(State& state) {
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
        float front[tiles][4];
#pragma unroll
        for (int i = 0; i < kSumTiles; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (i < tiles) front[i][k] = state.sums[j][i][k];
                state.sums[j][i][k] = i + tiles < kSumTiles ? state.sums[j][i + tiles][k]
                                                            : front[i + tiles - kSumTiles][k];
            }
        }
    }
}

// Add weighted values; `readable` masks token pairs of tiles that are not readable throughout.
template <bool cut, int subtiles>
DEVICE void add_values(State& state, const ValueTile<subtiles>& values,
                       const NormTile<subtiles>& norms, const StreamTable& table,
                       Weights<subtiles>& weights, const u32 (*readable)[2]) {
    typedef typename ValueTile<subtiles>::Row Row;
#pragma unroll
    for (int s = 0; s < subtiles; ++s) {
        if constexpr (kValueNorms) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 pair = norms.values[s][half];
                if (cut) pair &= readable[s][half];
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; ++j) {
                    weights.at[s][j][half] = h2_mul(weights.at[s][j][half], pair);
                }
            }
        }
#pragma unroll 1
        for (int section = 0; section < Row::kSections; ++section) {
            const Row upper = section_of(values.rows[s][0], section);
            const Row lower = section_of(values.rows[s][1], section);
#pragma unroll
            for (int step = 0; step < Row::kSteps; ++step) {
                if (beyond<Row>(section, step)) break;
                u32 first[Row::kPairs], second[Row::kPairs];
                upper.decode(step, table, first);
                lower.decode(step, table, second);
                add_pairs<cut, Row::kPairs>(state, first, second, weights.at[s], readable, s,
                                            step * Row::kPairs / 2);
            }
            if constexpr (Row::kSections > 1) turn_sums<Row::kSteps * Row::kPairs / 2>(state);
        }
        if constexpr (Row::kTailPairs > 0) {
            u32 first[Row::kTailPairs], second[Row::kTailPairs];
            decode_tails(values.rows[s][0], values.rows[s][1], table, first, second);
            add_pairs<cut, Row::kTailPairs>(state, first, second, weights.at[s], readable, s,
                                            Row::kSections > 1 ? 0 : Row::kSteps * Row::kPairs / 2);
            if constexpr (Row::kSections > 1) turn_sums<Row::kTailPairs / 2>(state);
        }
    }
}

// What the sums lack: nothing.
DEVICE void complete(State&) {}
