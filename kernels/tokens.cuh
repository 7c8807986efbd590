// Elements of tokens in f16, bf16 or f32: read as float32, rounded to a type, written.
//
// what      chunks of 8 neighbouring elements, the unit in which a lane owns a vector
// mapping   one lane per chunk
// bytes     the chunk
// host twin pagedtq/backends/dtypes.py (widen, round_to, to_storage)

#pragma once

#include "page.cuh"

template <int dtype>
DEVICE constexpr int element_bytes() {
    return dtype == F32 ? 4 : 2;
}

template <int dtype>
DEVICE float widen(u32 bits) {
    if constexpr (dtype == F16) return f16_to_f32(static_cast<u16>(bits));
    if constexpr (dtype == BF16) return bf16_to_f32(static_cast<u16>(bits));
    return bits_float(bits);
}

template <int dtype>
DEVICE u32 narrow(float x) {
    if constexpr (dtype == F16) return f32_to_f16(x);
    if constexpr (dtype == BF16) return f32_to_bf16(x);
    return float_bits(x);
}

// Round to `to`; what rounds to zero keeps its sign.
template <int to>
DEVICE float round_to(float x) {
    if constexpr (to == F32) return x;
    return widen<to>(narrow<to>(x));
}

// Read elements [8 chunk, 8 chunk + 8) of a row; those from `count` on are 0. `aligned`: the row
// starts on 16 bytes and its length is a multiple of 8.
template <int dtype>
DEVICE void read_chunk(const u8* row, int chunk, int count, bool aligned, float* x) {
    constexpr int size = element_bytes<dtype>();
    const u8* at = row + static_cast<i64>(chunk) * 8 * size;
    if (aligned) {
        const uint4 first = ldg128(at);
        if constexpr (dtype == F32) {
            const uint4 second = ldg128(at + 16);
            const u32 words[8] = {first.x,  first.y,  first.z,  first.w,
                                  second.x, second.y, second.z, second.w};
#pragma unroll
            for (int e = 0; e < 8; ++e) x[e] = bits_float(words[e]);
        } else {
            const u32 words[4] = {first.x, first.y, first.z, first.w};
#pragma unroll
            for (int e = 0; e < 8; ++e) x[e] = widen<dtype>(words[e / 2] >> 16 * (e % 2));
        }
        return;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        if (8 * chunk + e >= count) {
            x[e] = 0.0f;
        } else {
            x[e] = dtype == F32 ? bits_float(ldg32(at + 4 * e)) : widen<dtype>(ldg16(at + 2 * e));
        }
    }
}

// Write what `read_chunk` reads, rounded to the type.
template <int dtype>
DEVICE void write_chunk(u8* row, int chunk, int count, bool aligned, const float* x) {
    constexpr int size = element_bytes<dtype>();
    u8* at = row + static_cast<i64>(chunk) * 8 * size;
    u32 bits[8];
#pragma unroll
    for (int e = 0; e < 8; ++e) bits[e] = narrow<dtype>(x[e]);
    if (aligned) {
        if constexpr (dtype == F32) {
            stg128(at, make_uint4(bits[0], bits[1], bits[2], bits[3]));
            stg128(at + 16, make_uint4(bits[4], bits[5], bits[6], bits[7]));
        } else {
            stg128(at, make_uint4(bits[0] | bits[1] << 16, bits[2] | bits[3] << 16,
                                  bits[4] | bits[5] << 16, bits[6] | bits[7] << 16));
        }
        return;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        if (8 * chunk + e < count) {
            if constexpr (dtype == F32) {
                *reinterpret_cast<u32*>(at + 4 * e) = bits[e];
            } else {
                *reinterpret_cast<u16*>(at + 2 * e) = static_cast<u16>(bits[e]);
            }
        }
    }
}

// Whether every row of a tensor may be read 16 bytes at a time.
DEVICE bool rows_aligned(const void* base, i64 row_stride_bytes) {
    return HEAD_DIM % 8 == 0 &&
           ((reinterpret_cast<u64>(base) | static_cast<u64>(row_stride_bytes)) & 15) == 0;
}
