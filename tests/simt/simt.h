// The names of kernels/device.cuh with C++ bodies, for kernels compiled by a C++ compiler.
//
// Matrix instructions sum in float64 and round once: a device rounds in an order of its own, so
// results agree with one to a tolerance, while everything written with *_rn agrees to the bit.

#pragma once

#include <cmath>

#include "launch.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __constant__ static const
#define __align__(n) __attribute__((aligned(n)))
// In one section, so that every block starts with poison there. Not inside inline functions.
#define __shared__ static __attribute__((section("simt_shared")))
#define DEVICE inline
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(simt::machine.shared)

#define threadIdx (simt::current->thread)
#define blockIdx (simt::machine.block_index)
#define blockDim (simt::machine.block)
#define gridDim (simt::machine.grid)

struct alignas(8) uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct alignas(8) int2 {
    int x, y;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
struct alignas(8) float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <class T>
T min(T a, T b) {
    return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
    return a < b ? b : a;
}

// ---- bits --------------------------------------------------------------------------------------

inline u32 prmt(u32 lo, u32 hi, u32 selector) {
    const u64 bytes = static_cast<u64>(hi) << 32 | lo;
    u32 result = 0;
    for (int i = 0; i < 4; ++i) {
        const u32 nibble = selector >> 4 * i & 15;
        u32 byte = static_cast<u32>(bytes >> 8 * (nibble & 7)) & 0xff;
        if (nibble & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << 8 * i;
    }
    return result;
}

template <int table>
u32 lop3(u32 a, u32 b, u32 c) {
    u32 result = 0;
    for (int i = 0; i < 8; ++i) {
        if (table >> i & 1) {
            result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
        }
    }
    return result;
}

inline int popcount(u32 x) { return __builtin_popcount(x); }

// ---- lanes of a warp ---------------------------------------------------------------------------

namespace simt {

struct Exchange {
    u64 value;
    unsigned source;
    u64 result;
};

template <class T>
T exchange(T value, int source, u32 members) {
    static_assert(sizeof(T) <= 8, "shuffles move at most 8 bytes");
    Exchange mine = {0, static_cast<unsigned>(source), 0};
    memcpy(&mine.value, &value, sizeof(T));
    rendezvous(kShuffle, members, &mine, [members](Fiber* lanes) {
        for (unsigned rest = members; rest != 0; rest &= rest - 1) {
            Exchange& to = *static_cast<Exchange*>(lanes[__builtin_ctz(rest)].operand);
            // What a lane outside the members holds is undefined.
            to.result = ~0ull;
            if (members >> to.source & 1) {
                to.result = static_cast<Exchange*>(lanes[to.source].operand)->value;
            }
        }
    });
    memcpy(&value, &mine.result, sizeof(T));
    return value;
}

}  // namespace simt

inline int lane_id() { return static_cast<int>(simt::current->lane); }
inline void sync_block() { simt::block_barrier(); }
inline void sync_warp(u32 members = FULL_WARP) {
    simt::rendezvous(simt::kSyncWarp, members, nullptr, [](simt::Fiber*) {});
}
template <class T>
T shfl_xor(T value, int lane_mask, u32 members = FULL_WARP) {
    return simt::exchange(value, (lane_id() ^ lane_mask) & 31, members);
}
template <class T>
T shfl_idx(T value, int lane, u32 members = FULL_WARP) {
    return simt::exchange(value, lane & 31, members);
}
template <class T>
T shfl_up(T value, int delta, u32 members = FULL_WARP) {
    const int source = lane_id() - delta;
    return simt::exchange(value, source < 0 ? lane_id() : source, members);
}
template <class T>
T shfl_down(T value, int delta, u32 members = FULL_WARP) {
    const int source = lane_id() + delta;
    return simt::exchange(value, source > 31 ? lane_id() : source, members);
}
inline u32 vote_ballot(bool x, u32 members = FULL_WARP) {
    u64 vote = x;
    simt::rendezvous(simt::kVote, members, &vote, [members](simt::Fiber* lanes) {
        u32 votes = 0;
        for (u32 rest = members; rest != 0; rest &= rest - 1) {
            const int lane = __builtin_ctz(rest);
            votes |= static_cast<u32>(*static_cast<u64*>(lanes[lane].operand)) << lane;
        }
        for (u32 rest = members; rest != 0; rest &= rest - 1) {
            *static_cast<u64*>(lanes[__builtin_ctz(rest)].operand) = votes;
        }
    });
    return static_cast<u32>(vote);
}
inline bool vote_any(bool x, u32 members = FULL_WARP) { return vote_ballot(x, members) != 0; }
inline bool vote_all(bool x, u32 members = FULL_WARP) {
    return vote_ballot(x, members) == members;
}

// ---- half precision, as bits -------------------------------------------------------------------

inline u32 float_bits(float x) {
    u32 bits;
    memcpy(&bits, &x, 4);
    return bits;
}
inline float bits_float(u32 bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
inline float f16_to_f32(u16 bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return half;
}
template <class T>
u16 round_to_f16(T x) {
    const _Float16 half = static_cast<_Float16>(x);
    u16 bits;
    memcpy(&bits, &half, 2);
    return bits;
}
inline u16 f32_to_f16(float x) { return round_to_f16(x); }
inline u32 h2_from(float lo, float hi) {
    return f32_to_f16(lo) | static_cast<u32>(f32_to_f16(hi)) << 16;
}

namespace simt {

// Products and sums of halves are exact in float64, or nearly: one rounding, as on a device.
template <class F>
u32 on_halves(F f) {
    return round_to_f16(f(0)) | static_cast<u32>(round_to_f16(f(16))) << 16;
}
inline double half_at(u32 pair, int shift) { return f16_to_f32(static_cast<u16>(pair >> shift)); }

}  // namespace simt

inline u32 h2_mul(u32 a, u32 b) {
    return simt::on_halves([=](int s) { return simt::half_at(a, s) * simt::half_at(b, s); });
}
inline u32 h2_add(u32 a, u32 b) {
    return simt::on_halves([=](int s) { return simt::half_at(a, s) + simt::half_at(b, s); });
}
inline u32 h2_fma(u32 a, u32 b, u32 c) {
    return simt::on_halves([=](int s) {
        return simt::half_at(a, s) * simt::half_at(b, s) + simt::half_at(c, s);
    });
}

// ---- matrices ----------------------------------------------------------------------------------

namespace simt {

template <class Sum>
struct Fragments {
    Sum* d;
    const u32* a;
    u32 b[2];
};

// Fragment layout of m16n8 with `per` elements in a word: row g = lane / 4 (and g + 8), column
// words t = lane % 4 (and t + 4).
template <class Sum, class Total, int per, class Left, class Right>
void multiply(Fiber* lanes, Left left, Right right) {
    constexpr int depth = 8 * per;
    static Total a[16][depth], b[8][depth];
    for (int lane = 0; lane < 32; ++lane) {
        const auto& f = *static_cast<Fragments<Sum>*>(lanes[lane].operand);
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < per; ++i) {
            for (int word = 0; word < 4; ++word) {
                a[g + 8 * (word & 1)][per * (t + 4 * (word >> 1)) + i] = left(f.a[word], i);
            }
            for (int word = 0; word < 2; ++word) {
                b[g][per * (t + 4 * word) + i] = right(f.b[word], i);
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        auto& f = *static_cast<Fragments<Sum>*>(lanes[lane].operand);
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + 8 * (i >> 1), column = 2 * (lane % 4) + (i & 1);
            Total total = 0;
            for (int k = 0; k < depth; ++k) total += a[row][k] * b[column][k];
            f.d[i] = static_cast<Sum>(f.d[i] + total);
        }
    }
}

}  // namespace simt

inline void mma_f16(float* d, const u32* a, u32 b0, u32 b1) {
    simt::Fragments<float> mine = {d, a, {b0, b1}};
    simt::rendezvous(simt::kMmaF16, FULL_WARP, &mine, [](simt::Fiber* lanes) {
        const auto half = [](u32 word, int i) { return simt::half_at(word, 16 * i); };
        simt::multiply<float, double, 2>(lanes, half, half);
    });
}
inline void mma_u8s8(int* d, const u32* a, u32 b0, u32 b1) {
    simt::Fragments<int> mine = {d, a, {b0, b1}};
    simt::rendezvous(simt::kMmaU8S8, FULL_WARP, &mine, [](simt::Fiber* lanes) {
        simt::multiply<int, int, 4>(
            lanes, [](u32 word, int i) { return static_cast<int>(word >> 8 * i & 0xff); },
            [](u32 word, int i) { return static_cast<int>(static_cast<s8>(word >> 8 * i)); });
    });
}
inline void mma_s8u8(int* d, const u32* a, u32 b0, u32 b1) {
    simt::Fragments<int> mine = {d, a, {b0, b1}};
    simt::rendezvous(simt::kMmaS8U8, FULL_WARP, &mine, [](simt::Fiber* lanes) {
        simt::multiply<int, int, 4>(
            lanes, [](u32 word, int i) { return static_cast<int>(static_cast<s8>(word >> 8 * i)); },
            [](u32 word, int i) { return static_cast<int>(word >> 8 * i & 0xff); });
    });
}
inline u32 movmatrix_trans(u32 x) {
    u32 word = x;
    simt::rendezvous(simt::kMovmatrix, FULL_WARP, &word, [](simt::Fiber* lanes) {
        u16 element[8][8];
        const auto at = [lanes](int lane) { return static_cast<u32*>(lanes[lane].operand); };
        for (int lane = 0; lane < 32; ++lane) memcpy(&element[lane / 4][2 * (lane % 4)], at(lane), 4);
        for (int lane = 0; lane < 32; ++lane) {
            const int row = lane / 4, column = 2 * (lane % 4);
            *at(lane) = element[column][row] | static_cast<u32>(element[column + 1][row]) << 16;
        }
    });
    return word;
}

// ---- memory ------------------------------------------------------------------------------------

namespace simt {

template <class T>
T load(const void* p) {
    if (reinterpret_cast<size_t>(p) % sizeof(T)) fail("misaligned load of %zu bytes at %p", sizeof(T), p);
    return *static_cast<const T*>(p);
}

}  // namespace simt

inline uint4 ldg128(const void* p) { return simt::load<uint4>(p); }
inline uint2 ldg64(const void* p) { return simt::load<uint2>(p); }
inline u32 ldg32(const void* p) { return simt::load<u32>(p); }
inline u16 ldg16(const void* p) { return simt::load<u16>(p); }
inline u8 ldg8(const void* p) { return simt::load<u8>(p); }
inline uint4 lds128(const void* p) { return simt::load<uint4>(p); }
inline uint2 lds64(const void* p) { return simt::load<uint2>(p); }
inline void stg128(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// Copies happen at the wait, so that reading without one finds poison or stale bytes.
inline void cp_async16(void* shared, const void* global) {
    if ((reinterpret_cast<size_t>(shared) | reinterpret_cast<size_t>(global)) % 16) {
        simt::fail("misaligned cp_async16 from %p to %p", global, shared);
    }
    simt::Fiber& self = *simt::current;
    self.copies.push_back({shared, global, 16, self.groups});
}
inline void cp_async_commit() { ++simt::current->groups; }
template <int pending>
void cp_async_wait() {
    simt::Fiber& self = *simt::current;
    auto& copies = self.copies;
    size_t kept = 0;
    for (const simt::AsyncCopy& copy : copies) {
        if (copy.group + pending < self.groups) {
            memcpy(copy.target, copy.source, copy.bytes);
        } else {
            copies[kept++] = copy;
        }
    }
    copies.resize(kept);
}

template <class T>
T atomic_add(T* p, T x) {
    const T old = *p;
    *p = old + x;
    return old;
}
inline int atomic_max(int* p, int x) {
    const int old = *p;
    *p = max(old, x);
    return old;
}
inline void fence_device() {}

// ---- arithmetic (no contraction: compiled with -ffp-contract=off) ------------------------------

inline float add_rn(float a, float b) { return a + b; }
inline float sub_rn(float a, float b) { return a - b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float div_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float a) { return std::sqrt(a); }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline int round_to_int(float x) { return static_cast<int>(std::nearbyint(x)); }
inline float set_ge(float a, float b) { return a >= b ? 1.0f : 0.0f; }
inline double add_rn(double a, double b) { return a + b; }
inline double mul_rn(double a, double b) { return a * b; }
inline float ex2(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }
inline float lg2(float x) { return std::log2(x); }
