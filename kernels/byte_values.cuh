// The weighted sum of values, as bytes (VALUE_INT8).
//
// what      weights of a tile as right operands, codes times them into the running sums
// mapping   fragments: columns are query rows, rows channels
// bytes     none moved
// host twin pagedtq/backends/host_attend.py (PageAttention.attend)
//
// A weight times its value norm becomes an integer of 16 bits, 65534 for the largest of a tile and
// column, so that what a tile adds is right to 2^-17 of its largest part whatever came before: halves
// are right to 2^-12 of each part. Scaling weights and norms apart would lose tokens of small norms
// beside those of large ones. Either byte of the integers has a product with the codes of its own
// (mma.m16n8k32): as many matrix instructions as with halves. Codes are signed bytes j or -1 - j for
// the values j + 1/2 or -j - 1/2; the missing half unit is the same for every channel of a column.

#pragma once

#include "softmax.cuh"

static_assert(VALUE_FORMAT >= 2 && VALUE_FORMAT <= 4 && is_tuned(VALUE_FORMAT, HEAD_DIM),
              "VALUE_INT8 takes values of width 2, 3 or 4 whose rows divide among the lanes");

// Bytes of the integers of four tokens each, and what they are multiples of.
template <int subtiles>
struct Weights {
    u32 low[subtiles][COLUMN_TILES], high[subtiles][COLUMN_TILES];
    float unit[COLUMN_TILES][2];
};

// Fold a tile's scores into the state.
template <int subtiles>
DEVICE void weigh_tile(State& state, const Queries& queries, const Scores<subtiles>& scores,
                       const NormTile<subtiles>& norms, Weights<subtiles>& weights) {
    follow_tile(state, queries, scores, 0);
    float parts[subtiles][COLUMN_TILES][4], factor[COLUMN_TILES][2];
#pragma unroll
    for (int s = 0; s < subtiles; ++s) {
        const float upper = f16_to_f32(norms.values[s][0]), lower = f16_to_f32(norms.values[s][1]);
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
            weigh(state, queries, scores.at[s][j], j, parts[s][j]);
            parts[s][j][0] *= upper, parts[s][j][1] *= upper;
            parts[s][j][2] *= lower, parts[s][j][3] *= lower;
#pragma unroll
            for (int k = 0; k < 4; ++k) state.norms[j][k & 1] += parts[s][j][k];
        }
    }
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            // Above zero, and far below what counts beside weights near 1.
            float top = 1e-30f;
#pragma unroll
            for (int s = 0; s < subtiles; ++s) {
                top = fmaxf(top, fmaxf(parts[s][j][c], parts[s][j][c + 2]));
            }
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, shfl_xor(top, lanes));
            factor[j][c] = 65534.0f * reciprocal(top);
            weights.unit[j][c] = top * (1.0f / 65534.0f);
        }
    }
#pragma unroll
    for (int s = 0; s < subtiles; ++s) {
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
            // Adding 2^23 rounds, and leaves the integer in the low bits.
            u32 bits[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                bits[k] = float_bits(fma_rn(parts[s][j][k], factor[j][k & 1], 8388608.0f));
            }
            const u32 upper = transpose_pairs(prmt(bits[0], bits[1], 0x5410u));
            const u32 lower = transpose_pairs(prmt(bits[2], bits[3], 0x5410u));
            weights.low[s][j] = prmt(upper, lower, 0x6420u);
            weights.high[s][j] = prmt(upper, lower, 0x7531u);
        }
    }
}

// Sums of codes times either byte of the weights, for two times 8 channels.
struct ByteSums {
    int low[COLUMN_TILES][4], high[COLUMN_TILES][4];

    // Codes of 32 tokens: those of tokens and those of 16 further ones (or none, zeros).
    template <int subtiles>
    DEVICE void add(const u32* left, const Weights<subtiles>& weights, int s) {
        constexpr int more = subtiles > 1;
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
            const u32 low_rest = more ? weights.low[s + more][j] : 0;
            const u32 high_rest = more ? weights.high[s + more][j] : 0;
            mma_s8u8(low[j], left, weights.low[s][j], low_rest);
            mma_s8u8(high[j], left, weights.high[s][j], high_rest);
        }
    }

    template <int subtiles>
    DEVICE void fold(State& state, const Weights<subtiles>& weights, int tile) const {
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                // 64 tokens of 65534 times 128 stay below 2^30.
                const float whole = static_cast<float>(high[j][k] * 256 + low[j][k]);
                state.sums[j][tile][k] += whole * weights.unit[j][k & 1];
            }
        }
    }
};

// Add weighted values. Norms of what a mask excludes are zero, and codes are finite.
template <bool cut, int subtiles>
DEVICE void add_values(State& state, const ValueTile<subtiles>& values,
                       const NormTile<subtiles>&, const StreamTable& table,
                       const Weights<subtiles>& weights, const u32 (*)[2]) {
    typedef typename ValueTile<subtiles>::Row Row;
    constexpr int more = subtiles > 1;
    static_assert(subtiles == 1 || subtiles % 2 == 0, "instructions take 32 tokens");
#pragma unroll
    for (int step = 0; step < Row::kSteps; ++step) {
#pragma unroll
        for (int turn = 0; turn < Row::kTurns; ++turn) {
            ByteSums sums[2] = {};
#pragma unroll
            for (int s = 0; s < subtiles; s += 1 + more) {
                u32 left[2][4] = {};
#pragma unroll
                for (int next = 0; next <= more; ++next) {
                    u32 first[2], second[2];
                    values.rows[s + next][0].decode_bytes(step, turn, table, first);
                    values.rows[s + next][1].decode_bytes(step, turn, table, second);
#pragma unroll
                    for (int half = 0; half < 2; ++half) {
                        join_tokens(first[half], second[half], left[half][2 * next],
                                    left[half][2 * next + 1]);
                    }
                }
                sums[0].add(left[0], weights, s);
                sums[1].add(left[1], weights, s);
            }
            const int tile = 2 * (step * Row::kTurns + turn);
            sums[0].fold(state, weights, tile);
            sums[1].fold(state, weights, tile + 1);
        }
    }
    if constexpr (Row::kTailPairs > 0) {
#pragma unroll
        for (int turn = 0; turn < Row::kTurns; ++turn) {
            ByteSums sums = {};
#pragma unroll
            for (int s = 0; s < subtiles; s += 1 + more) {
                u32 left[4] = {};
#pragma unroll
                for (int next = 0; next <= more; ++next) {
                    u32 bytes[2];
                    Row::decode_tail_bytes(values.rows[s + next][0], values.rows[s + next][1], turn,
                                           table, bytes);
                    join_tokens(bytes[0], bytes[1], left[2 * next], left[2 * next + 1]);
                }
                sums.add(left, weights, s);
            }
            sums.fold(state, weights, 2 * Row::kSteps * Row::kTurns + turn);
        }
    }
}

// What the sums lack: half a unit per value. Sums are then in units of the value table.
DEVICE void complete(State& state) {
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float half = 0.5f * state.norms[j][c];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) half += shfl_xor(half, lanes);
#pragma unroll
            for (int i = 0; i < OUTPUT_TILES; ++i) {
                state.sums[j][i][c] += half, state.sums[j][i][c + 2] += half;
            }
        }
    }
}
