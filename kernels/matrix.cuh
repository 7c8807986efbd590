// Products and transposes of fragments that all lanes of a warp hold together.
//
// what      d[16 x 8] += a[16 x 16] b[16 x 8] in halves, and the transpose of 8 x 8 halves
// mapping   fragments of mma.m16n8k16: lane = 4 g + t
// bytes     none moved
// host twin none; tests/simt/simt.h for the instructions
//
// CUDA_CORES computes the same with shuffles and multiply-adds, for devices without matrix
// instructions of this kind (before sm_75). It is right, not fast: 32 shuffles and 64 multiply-adds
// stand for one instruction. From sm_75 on the tensor cores serve a group of one as well: unused
// columns cost nothing but idle multipliers.

#pragma once

#include "device.cuh"

#ifndef CUDA_CORES
#define CUDA_CORES 0
#endif

#if CUDA_CORES

DEVICE void multiply_f16(float* d, const u32* a, u32 b0, u32 b1) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
#pragma unroll
    for (int source = 0; source < 4; ++source) {
        // The words of a's rows g (0, 2) and g + 8 (1, 3) that lane 4 g + source holds.
        float low[4], high[4];
#pragma unroll
        for (int word = 0; word < 4; ++word) {
            const u32 pair = shfl_idx(a[word], 4 * g + source);
            low[word] = h2_lo(pair), high[word] = h2_hi(pair);
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int holder = 4 * (2 * t + c) + source;
            const u32 first = shfl_idx(b0, holder), second = shfl_idx(b1, holder);
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                float& sum = d[2 * row + c];
                sum += low[row] * h2_lo(first) + high[row] * h2_hi(first);
                sum += low[row + 2] * h2_lo(second) + high[row + 2] * h2_hi(second);
            }
        }
    }
}

DEVICE u32 transpose_pairs(u32 x) {
    const int g = lane_id() >> 2, t = lane_id() & 3;
    const u32 first = shfl_idx(x, 8 * t + g / 2), second = shfl_idx(x, 8 * t + 4 + g / 2);
    return prmt(first, second, g & 1 ? 0x7632u : 0x5410u);
}

#else

DEVICE void multiply_f16(float* d, const u32* a, u32 b0, u32 b1) { mma_f16(d, a, b0, b1); }
DEVICE u32 transpose_pairs(u32 x) { return movmatrix_trans(x); }

#endif
