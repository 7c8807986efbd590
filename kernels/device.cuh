// Every PTX instruction and CUDA builtin the kernels use, behind one name each.
//
// what      integer types, lane exchange, matrix instructions, loads, conversions, exact arithmetic
// mapping   none: plain device functions
// bytes     none moved but by the loads and copies themselves
// host twin tests/simt/simt.h: the same names with C++ bodies, so that a C++ compiler runs the
//           kernels' own text on a CPU
//
// No header is needed: half precision travels as bits (u16, two in a u32) and is converted by PTX.
// The *_rn arithmetic is never contracted to a fused multiply-add, whatever the compiler's flags:
// what decides codes and norms is written with it.

#pragma once

typedef unsigned char u8;
typedef signed char s8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define WARP_SIZE 32
#define FULL_WARP 0xffffffffu

#ifndef __CUDACC__
#include "simt.h"
#else

#define DEVICE __device__ __forceinline__

// One kernel's dynamic shared memory, 16-byte aligned.
#define DYNAMIC_SHARED(type, name)                          \
    extern __shared__ __align__(16) u8 dynamic_shared_[];   \
    type* name = reinterpret_cast<type*>(dynamic_shared_)

// ---- bits --------------------------------------------------------------------------------------

// Four bytes picked from {hi, lo} by selector nibbles; bit 3 of a nibble replicates the sign.
DEVICE u32 prmt(u32 lo, u32 hi, u32 selector) {
    u32 r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(lo), "r"(hi), "r"(selector));
    return r;
}

// Any function of three bits: bit i of `table` is its value for a, b, c = bits 2, 1, 0 of i.
template <int table>
DEVICE u32 lop3(u32 a, u32 b, u32 c) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, %4;" : "=r"(r) : "r"(a), "r"(b), "r"(c), "n"(table));
    return r;
}

DEVICE int popcount(u32 x) { return __popc(x); }

// ---- lanes of a warp ---------------------------------------------------------------------------

DEVICE int lane_id() { return threadIdx.x & (WARP_SIZE - 1); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp(u32 members = FULL_WARP) { __syncwarp(members); }

template <class T>
DEVICE T shfl_xor(T value, int lane_mask, u32 members = FULL_WARP) {
    return __shfl_xor_sync(members, value, lane_mask);
}
template <class T>
DEVICE T shfl_idx(T value, int lane, u32 members = FULL_WARP) {
    return __shfl_sync(members, value, lane);
}
template <class T>
DEVICE T shfl_up(T value, int delta, u32 members = FULL_WARP) {
    return __shfl_up_sync(members, value, delta);
}
template <class T>
DEVICE T shfl_down(T value, int delta, u32 members = FULL_WARP) {
    return __shfl_down_sync(members, value, delta);
}
DEVICE u32 vote_ballot(bool x, u32 members = FULL_WARP) { return __ballot_sync(members, x); }
DEVICE bool vote_any(bool x, u32 members = FULL_WARP) { return __any_sync(members, x); }
DEVICE bool vote_all(bool x, u32 members = FULL_WARP) { return __all_sync(members, x); }

// ---- matrices (all lanes of a warp together) ---------------------------------------------------

// d[16 x 8] += a[16 x 16] b[16 x 8]: f16 in, f32 sums. sm_75 has the instruction for half the depth.
DEVICE void mma_f16(float* d, const u32* a, u32 b0, u32 b1) {
#if __CUDA_ARCH__ < 800
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        asm volatile(
            "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(half ? b1 : b0));
    }
#else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// d[16 x 8] += a[16 x 32] b[32 x 8]: u8 times s8, s32 sums. sm_80 and newer.
DEVICE void mma_u8s8(int* d, const u32* a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with s8 times u8.
DEVICE void mma_s8u8(int* d, const u32* a, u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Transpose an 8 x 8 matrix of 16-bit elements, lane l holding elements 2 (l % 4) and the next of
// row l / 4.
DEVICE u32 movmatrix_trans(u32 x) {
    u32 r;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
    return r;
}

// ---- memory ------------------------------------------------------------------------------------

// Loads of memory that the kernel does not write; the address is a multiple of the size.
DEVICE uint4 ldg128(const void* p) {
    uint4 v;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(p));
    return v;
}
DEVICE uint2 ldg64(const void* p) {
    uint2 v;
    asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}
DEVICE u32 ldg32(const void* p) {
    u32 v;
    asm("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(p));
    return v;
}
DEVICE u16 ldg16(const void* p) {
    u16 v;
    asm("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(p));
    return v;
}
DEVICE u8 ldg8(const void* p) {
    u32 v;
    asm("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(p));
    return static_cast<u8>(v);
}
// Loads of shared memory that are not hoisted out of loops: what they bring is not to hold registers.
DEVICE u32 shared_address(const void* p) {
    u32 at;
    asm("{ .reg .u64 t; cvta.to.shared.u64 t, %1; cvt.u32.u64 %0, t; }" : "=r"(at) : "l"(p));
    return at;
}
DEVICE uint4 lds128(const void* p) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(shared_address(p)));
    return v;
}
DEVICE uint2 lds64(const void* p) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "r"(shared_address(p)));
    return v;
}
DEVICE void stg128(void* p, uint4 v) { *static_cast<uint4*>(p) = v; }

// Copy 16 bytes to shared memory behind the thread's back; visible after a wait and a barrier.
DEVICE void cp_async16(void* shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(global)
                 : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until at most `pending` of the thread's newest groups are still on their way.
template <int pending>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

DEVICE int atomic_add(int* p, int x) { return atomicAdd(p, x); }
DEVICE u32 atomic_add(u32* p, u32 x) { return atomicAdd(p, x); }
DEVICE float atomic_add(float* p, float x) { return atomicAdd(p, x); }
DEVICE int atomic_max(int* p, int x) { return atomicMax(p, x); }
DEVICE void fence_device() { __threadfence(); }

// ---- arithmetic --------------------------------------------------------------------------------

// IEEE single operations, rounded to nearest even, never fused. Subnormals are kept as long as no
// compiler option flushes them; those of kernel_source.py do not.
DEVICE float add_rn(float a, float b) { return __fadd_rn(a, b); }
DEVICE float sub_rn(float a, float b) { return __fsub_rn(a, b); }
DEVICE float mul_rn(float a, float b) { return __fmul_rn(a, b); }
DEVICE float div_rn(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float sqrt_rn(float a) { return __fsqrt_rn(a); }
DEVICE float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE double add_rn(double a, double b) { return __dadd_rn(a, b); }
DEVICE double mul_rn(double a, double b) { return __dmul_rn(a, b); }

// 2^x and log2(x), a few units in the last place; ex2(-inf) is 0.
DEVICE float ex2(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEVICE float reciprocal(float x) {
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
DEVICE float lg2(float x) {
    float r;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// 1 where a >= b, else 0.
DEVICE float set_ge(float a, float b) {
    float r;
    asm("set.ge.f32.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}
// To the nearest integer, ties to even; |x| below 2^31.
DEVICE int round_to_int(float x) {
    int r;
    asm("cvt.rni.s32.f32 %0, %1;" : "=r"(r) : "f"(x));
    return r;
}
DEVICE u32 float_bits(float x) { return __float_as_uint(x); }
DEVICE float bits_float(u32 x) { return __uint_as_float(x); }

// ---- half precision, as bits -------------------------------------------------------------------

DEVICE float f16_to_f32(u16 h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
// To nearest, ties to even; beyond 65520 infinity.
DEVICE u16 f32_to_f16(float f) {
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
}
// Two halves in a word, `lo` in the low bits.
DEVICE u32 h2_from(float lo, float hi) {
#if __CUDA_ARCH__ < 800
    return f32_to_f16(lo) | static_cast<u32>(f32_to_f16(hi)) << 16;
#else
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
#endif
}
DEVICE u32 h2_mul(u32 a, u32 b) {
    u32 r;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
DEVICE u32 h2_add(u32 a, u32 b) {
    u32 r;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
DEVICE u32 h2_fma(u32 a, u32 b, u32 c) {
    u32 r;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
}

#endif  // __CUDACC__

DEVICE float h2_lo(u32 pair) { return f16_to_f32(static_cast<u16>(pair)); }
DEVICE float h2_hi(u32 pair) { return f16_to_f32(static_cast<u16>(pair >> 16)); }

DEVICE float bf16_to_f32(u16 h) { return bits_float(static_cast<u32>(h) << 16); }
// To nearest, ties to even; finite input.
DEVICE u16 f32_to_bf16(float f) {
    const u32 bits = float_bits(f);
    return static_cast<u16>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
