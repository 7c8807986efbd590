// What plain decode loads and multiplies: instructions of its own, page rows, products.
//
// what      16-byte loads of keys and values, one pass ahead, and both products over them
// mapping   lane = 4 g + t, fragments of mma.m16n8k16; keys and values are the left operand
// bytes     2 * HEAD_DIM * (KV_FP8 ? 1 : 2) per token
// host twin float64 attention in tests/simt/test_plain_decode.py
//
// The order of channels in a product is free, so both operands are taken as 16-byte loads bring
// them, and nothing is exchanged between lanes. e4m3 becomes f16, which holds it exactly: sm_90 has
// no 8-bit float product of this shape.

#pragma once

#include "device.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 128
#endif
#ifndef KV_FP8
#define KV_FP8 0
#endif

#define WARPS 4
#define COLUMNS 8
#define NOTHING (-bits_float(0x7f800000u))

constexpr int kElement = KV_FP8 ? 1 : 2;
// Groups of 16 tokens in a pass: as many bytes in flight for either type.
constexpr int kGroups = KV_FP8 ? 2 : 1;
constexpr int kPass = 16 * kGroups;
constexpr int kTiles = HEAD_DIM / 16;
// Words a lane holds of a key row (four lanes share it) and of a value row (eight lanes do).
constexpr int kKeyWords = HEAD_DIM * kElement / 16;
constexpr int kValueWords = HEAD_DIM * kElement / 32;
constexpr int kPadded = HEAD_DIM + 4;

// ---- instructions that kernels/device.cuh lacks ------------------------------------------------

#ifdef __CUDACC__

DEVICE void mma_bf16(float* d, const u32* a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
DEVICE u32 bf16_pair(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}
// Two e4m3 in the low half of a word to two f16.
DEVICE u32 e4m3_pair(u32 x) {
    u32 r;
    asm("{ .reg .b16 h; cvt.u16.u32 h, %1; cvt.rn.f16x2.e4m3x2 %0, h; }" : "=r"(r) : "r"(x));
    return r;
}

#else

DEVICE void mma_bf16(float* d, const u32* a, u32 b0, u32 b1) {
    simt::Fragments<float> mine = {d, a, {b0, b1}};
    simt::rendezvous(simt::kMmaF16, FULL_WARP, &mine, [](simt::Fiber* lanes) {
        const auto part = [](u32 word, int i) -> double { return bits_float(word >> 16 * i << 16); };
        simt::multiply<float, double, 2>(lanes, part, part);
    });
}
DEVICE u32 bf16_pair(float lo, float hi) {
    return f32_to_bf16(lo) | static_cast<u32>(f32_to_bf16(hi)) << 16;
}
DEVICE u32 e4m3_pair(u32 x) {
    u32 pair = 0;
    for (int i = 0; i < 2; ++i) {
        const int code = x >> 8 * i & 0xff, exponent = code >> 3 & 15, mantissa = code & 7;
        const float size = exponent ? std::ldexp(8.0f + mantissa, exponent - 10)
                                    : std::ldexp(static_cast<float>(mantissa), -9);
        const float value = (code & 127) == 127 ? NAN : size;
        pair |= static_cast<u32>(f32_to_f16(code & 128 ? -value : value)) << 16 * i;
    }
    return pair;
}

#endif

DEVICE void multiply(float* d, const u32* a, u32 b0, u32 b1) {
#if KV_FP8
    mma_f16(d, a, b0, b1);
#else
    mma_bf16(d, a, b0, b1);
#endif
}
DEVICE u32 weight_pair(float lo, float hi) { return KV_FP8 ? h2_from(lo, hi) : bf16_pair(lo, hi); }

// ---- a pass: loads, scores, weights, sums -------------------------------------------------------

struct Pages {
    const u8* keys;
    const u8* values;
    const int* table;  // of the sequence
    int page_shift;
    i64 page_stride, head_offset;  // bytes

    // Offset of the row of a token that exists.
    DEVICE i64 row(int token) const {
        const int slot = token & ((1 << page_shift) - 1);
        return table[token >> page_shift] * page_stride + head_offset +
               static_cast<i64>(slot) * (HEAD_DIM * kElement);
    }
};

// Keys of tokens g and g + 8 of each group; values of tokens 2 t, 2 t + 1, 2 t + 8 and 2 t + 9.
struct Pass {
    u32 keys[kGroups][2][kKeyWords];
    u32 values[kGroups][4][kValueWords];
};

DEVICE void load_keys(Pass& pass, const Pages& pages, int begin, int last, int g, int t) {
#pragma unroll
    for (int r = 0; r < kGroups; ++r) {
        // Groups lie in one page; rows beyond the last token are read, and masked later.
        const u8* rows = pages.keys + pages.row(min(begin + 16 * r, last & ~15)) + 16 * t;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < kKeyWords / 4; ++i) {
                const uint4 v = ldg128(rows + (g + 8 * half) * HEAD_DIM * kElement + 64 * i);
                u32* into = pass.keys[r][half] + 4 * i;
                into[0] = v.x, into[1] = v.y, into[2] = v.z, into[3] = v.w;
            }
        }
    }
}

DEVICE void load_values(Pass& pass, const Pages& pages, int begin, int last, int g, int t) {
#pragma unroll
    for (int r = 0; r < kGroups; ++r) {
        const u8* rows = pages.values + pages.row(min(begin + 16 * r, last & ~15));
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            const u8* row = rows + (2 * t + (k & 1) + 8 * (k >> 1)) * HEAD_DIM * kElement;
            u32* into = pass.values[r][k];
            if constexpr (kValueWords == 2) {
                const uint2 v = ldg64(row + 8 * g);
                into[0] = v.x, into[1] = v.y;
            } else {
#pragma unroll
                for (int i = 0; i < kValueWords / 4; ++i) {
                    const uint4 v = ldg128(row + 16 * g + 128 * i);
                    into[4 * i] = v.x, into[4 * i + 1] = v.y;
                    into[4 * i + 2] = v.z, into[4 * i + 3] = v.w;
                }
            }
        }
    }
}

// The channel of row g (half 0) or g + 8 (half 1) of value tile i.
DEVICE int channel(int i, int half, int g) {
    if (KV_FP8) return HEAD_DIM / 8 * g + 2 * i + half;
    return 64 * (i >> 2) + 8 * g + 2 * (i & 3) + half;
}

// Query words for step s of the key product, as the keys' loads order the channels.
DEVICE void load_queries(u32 (*words)[2], const u16* row, int t) {
#pragma unroll
    for (int s = 0; s < kTiles; ++s) {
#pragma unroll
        for (int w = 0; w < 2; ++w) {
            const int at = KV_FP8 ? 64 * (s >> 2) + 16 * t + 4 * (s & 3) + 2 * w
                                  : 32 * (s >> 1) + 8 * t + 4 * (s & 1) + 2 * w;
            const u32 pair = row == nullptr ? 0 : ldg32(row + at);
            words[s][w] = KV_FP8 ? h2_from(bits_float(pair << 16), bits_float(pair & 0xffff0000u))
                                 : pair;
        }
    }
}

DEVICE void score_group(float* scores, const u32 (*keys)[kKeyWords], const u32 (*queries)[2]) {
#pragma unroll
    for (int s = 0; s < kTiles; ++s) {
        u32 a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#if KV_FP8
            a[half] = e4m3_pair(keys[half][s]);
            a[half + 2] = e4m3_pair(keys[half][s] >> 16);
#else
            a[half] = keys[half][2 * s];
            a[half + 2] = keys[half][2 * s + 1];
#endif
        }
        multiply(scores, a, queries[s][0], queries[s][1]);
    }
}

DEVICE void add_values(float (*sums)[4], const u32 (*values)[kValueWords], u32 b0, u32 b1) {
#pragma unroll
    for (int w = 0; w < kValueWords; ++w) {
#if KV_FP8
#pragma unroll
        for (int odd = 0; odd < 2; ++odd) {
            u32 a[4];
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const u32 mixed = prmt(values[2 * k][w], values[2 * k + 1][w], odd ? 0x7362u : 0x5140u);
                a[2 * k] = e4m3_pair(mixed);
                a[2 * k + 1] = e4m3_pair(mixed >> 16);
            }
            multiply(sums[2 * w + odd], a, b0, b1);
        }
#else
        u32 a[4];
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            a[2 * k] = prmt(values[2 * k][w], values[2 * k + 1][w], 0x5410u);
            a[2 * k + 1] = prmt(values[2 * k][w], values[2 * k + 1][w], 0x7632u);
        }
        multiply(sums[w], a, b0, b1);
#endif
    }
}
