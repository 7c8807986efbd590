// The running softmax of one warp.
//
// what      largest scores, the reference they are counted from, sums
// mapping   fragments: columns are query rows, rows channels
// bytes     none moved
// host twin pagedtq/backends/host_attend.py (PageAttention.attend)

#pragma once

#include "products.cuh"

// Sums of channels by tiles of 16; where sections fill up the last, more than the row has.
constexpr int kSumTiles =
    (ValueRow::kSections * ValueRow::kSteps * ValueRow::kPairs + ValueRow::kTailPairs) / 2;

// The running softmax of one warp.
struct State {
    float sums[COLUMN_TILES][kSumTiles][4];
    float reference[COLUMN_TILES][2];  // log2: weights are 2^(score - reference)
    float mass[COLUMN_TILES][2];       // this lane's share
    float weight_bits;                 // 14 - e: the largest score exceeds the reference by this
    u32 norm_limit;                    // f16 bits of 2^(e + 1)
#if VALUE_INT8
    float norms[COLUMN_TILES][2];      // weights times value norms, this lane's share
#endif
};

// Below every score, yet finite, so that weights of what is masked are zero from the first tile on.
#define NO_REFERENCE -1e30f

DEVICE void clear(State& state) {
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int i = 0; i < kSumTiles; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) state.sums[j][i][k] = 0.0f;
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            state.reference[j][c] = NO_REFERENCE;
            state.mass[j][c] = 0.0f;
#if VALUE_INT8
            state.norms[j][c] = 0.0f;
#endif
        }
    }
    state.weight_bits = 14.0f;
    state.norm_limit = 0x4000u;
}

// What a score must be multiplied by to be in log2 units.
DEVICE float score_scale(const Queries& queries, int j, int c) {
    return SOFT_CAP ? 1.0f : queries.scale[j][c];
}

// Follow a tile with a larger score or value norm than any before; `tile_top`: largest score of the
// lane's tokens.
DEVICE void raise_reference(State& state, float (*tile_top)[2], u32 sample) {
    const float bits = state.weight_bits;
    if constexpr (kValueNorms && !VALUE_INT8) {
        while (vote_any((sample & 0xffff) > state.norm_limit || (sample >> 16) > state.norm_limit)) {
            state.norm_limit += 0x0400u;
            state.weight_bits -= 1.0f;
        }
    }
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
        float decay[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float top = tile_top[j][c];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, shfl_xor(top, lanes));
            const float reference =
                fmaxf(top, state.reference[j][c] + bits) - state.weight_bits;
            decay[c] = ex2(state.reference[j][c] - reference);
            state.reference[j][c] = reference;
            state.mass[j][c] *= decay[c];
#if VALUE_INT8
            state.norms[j][c] *= decay[c];
#endif
        }
#pragma unroll
        for (int i = 0; i < kSumTiles; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) state.sums[j][i][k] *= decay[k & 1];
        }
    }
}

// Make the reference follow a tile's scores, and its value norms (`sample`) where weights times norms
// are halves.
template <int subtiles>
DEVICE void follow_tile(State& state, const Queries& queries, const Scores<subtiles>& scores,
                        u32 sample) {
    float tile_top[COLUMN_TILES][2];
    bool raise = false;
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float top = fmaxf(scores.at[0][j][c], scores.at[0][j][c + 2]);
#pragma unroll
            for (int s = 1; s < subtiles; ++s) {
                top = fmaxf(top, fmaxf(scores.at[s][j][c], scores.at[s][j][c + 2]));
            }
            tile_top[j][c] = top * score_scale(queries, j, c);
            raise |= tile_top[j][c] > state.reference[j][c] + state.weight_bits;
        }
    }
    if constexpr (kValueNorms && !VALUE_INT8) {
        const u32 limit = state.norm_limit << 16;
        raise |= sample > (limit | 0xffff) || (sample << 16) > limit;
    }
    if (vote_any(raise)) raise_reference(state, tile_top, sample);
}

// Weights of 16 tokens in column tile j, added to the masses.
DEVICE void weigh(State& state, const Queries& queries, const float* scores, int j,
                  float* weights) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        weights[k] = ex2(scores[k] * score_scale(queries, j, k & 1) - state.reference[j][k & 1]);
        state.mass[j][k & 1] += weights[k];
    }
}
