// How many instructions of a kind a multiprocessor completes: the ceilings that decoding has.
//
// what      each thread runs `rounds` times UNROLL steps of CHAINS independent chains of one
//           instruction; chains are long enough to hide the latency with 16 warps
// mapping   128 threads; as many blocks as reside at once
// bytes     one word per thread and one count per block out
// host twin none: the result is a time; tests/gate counts the instructions in the machine code
//
// cycles[block] is what the multiprocessor's own clock counted, so that a rate per clock does not
// depend on what clock the card happened to run at.

#include "device.cuh"

#define CHAINS 8
#define UNROLL 16

#ifdef __CUDACC__
DEVICE i64 clock_now() { return clock64(); }
#else
DEVICE i64 clock_now() { return 0; }
#endif

struct Permute {
    u32 x;
    DEVICE void start(u32 seed) { x = seed; }
    DEVICE void step(u32 a, u32) { x = prmt(x, a, x); }
    DEVICE u32 result() const { return x; }
};

struct Logic {
    u32 x;
    DEVICE void start(u32 seed) { x = seed; }
    DEVICE void step(u32 a, u32 b) { x = lop3<0xd2>(x, a, b); }
    DEVICE u32 result() const { return x; }
};

struct HalfProduct {
    float d[4];
    DEVICE void start(u32 seed) { d[0] = d[1] = d[2] = d[3] = static_cast<float>(seed & 7); }
    DEVICE void step(u32 a, u32 b) {
        const u32 left[4] = {a, b, a, b};
        mma_f16(d, left, a, b);
    }
    DEVICE u32 result() const { return float_bits(d[0] + d[1] + d[2] + d[3]); }
};

struct ByteProduct {
    int d[4];
    DEVICE void start(u32 seed) { d[0] = d[1] = d[2] = d[3] = seed & 7; }
    DEVICE void step(u32 a, u32 b) {
        const u32 left[4] = {a, b, a, b};
        mma_u8s8(d, left, a, b);
    }
    DEVICE u32 result() const { return d[0] + d[1] + d[2] + d[3]; }
};

template <class Chain>
DEVICE void run_chains(int rounds, u32 seed, u32* out, i64* cycles) {
    const u32 mine = seed + blockIdx.x * 128 + threadIdx.x;
    Chain chains[CHAINS];
#pragma unroll
    for (int c = 0; c < CHAINS; ++c) chains[c].start(mine + c);
    sync_block();
    const i64 begin = clock_now();
#pragma unroll 1
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int u = 0; u < UNROLL; ++u) {
#pragma unroll
            for (int c = 0; c < CHAINS; ++c) chains[c].step(mine, seed);
        }
    }
    sync_block();
    if (threadIdx.x == 0) cycles[blockIdx.x] = clock_now() - begin;
    u32 sum = 0;
#pragma unroll
    for (int c = 0; c < CHAINS; ++c) sum += chains[c].result();
    out[blockIdx.x * 128 + threadIdx.x] = sum;
}

extern "C" __global__ void __launch_bounds__(128)
    prmt_rate(int rounds, u32 seed, u32* out, i64* cycles) {
    run_chains<Permute>(rounds, seed, out, cycles);
}

extern "C" __global__ void __launch_bounds__(128)
    lop3_rate(int rounds, u32 seed, u32* out, i64* cycles) {
    run_chains<Logic>(rounds, seed, out, cycles);
}

extern "C" __global__ void __launch_bounds__(128)
    hmma_rate(int rounds, u32 seed, u32* out, i64* cycles) {
    run_chains<HalfProduct>(rounds, seed, out, cycles);
}

extern "C" __global__ void __launch_bounds__(128)
    imma_rate(int rounds, u32 seed, u32* out, i64* cycles) {
    run_chains<ByteProduct>(rounds, seed, out, cycles);
}
