// Kernels with one defect each, for the tests of the harness; never shipped.

#include "device.cuh"

extern "C" __global__ void reverse(const int* x, int* y, int count) {
    DYNAMIC_SHARED(int, row);
    const int i = threadIdx.x;
    if (i < count) row[i] = x[i];
    sync_block();
    if (i < count) y[i] = row[count - 1 - i];
}

extern "C" __global__ void reverse_without_barrier(const int* x, int* y, int count) {
    DYNAMIC_SHARED(int, row);
    const int i = threadIdx.x;
    row[i] = x[i];
    vote_any(false);
    y[i] = row[count - 1 - i];
}

extern "C" __global__ void read_static_shared(u32* y) {
    __shared__ u32 unwritten[32];
    y[threadIdx.x] = unwritten[threadIdx.x];
}

extern "C" __global__ void write_outside(int* y, int index) {
    if (threadIdx.x == 0) y[index] = 1;
}

extern "C" __global__ void read_outside(const int* x, int* y, int index) { y[0] = x[index]; }

extern "C" __global__ void write_outside_shared(int index) {
    DYNAMIC_SHARED(int, row);
    row[index] = 1;
}

extern "C" __global__ void diverge() {
    if (threadIdx.x % 2) {
        shfl_xor(1, 1);
    } else {
        vote_any(true);
    }
}

extern "C" __global__ void leave_before_shuffle(int* y) {
    if (threadIdx.x == 7) return;
    y[threadIdx.x] = shfl_xor(1, 1);
}

extern "C" __global__ void half_a_barrier() {
    if (threadIdx.x < 40) {
        sync_block();
    } else if (threadIdx.x < 64) {
        sync_warp();
    }
}

extern "C" __global__ void misaligned(const u8* x, u32* y) {
    y[0] = *reinterpret_cast<const u32*>(x + threadIdx.x);
}

extern "C" __global__ void copy_async(const uint4* x, uint4* y, int wait) {
    DYNAMIC_SHARED(uint4, row);
    cp_async16(row + threadIdx.x, x + threadIdx.x);
    cp_async_commit();
    if (wait) cp_async_wait<0>();
    sync_warp();
    y[threadIdx.x] = row[threadIdx.x];
}

extern "C" __global__ void wait_for_lane(volatile int* flag) {
    if (threadIdx.x == 0) {
        while (*flag == 0) {
        }
    } else {
        *flag = 1;
    }
}

extern "C" __global__ void write_outside_static(int* y, int index) {
    __shared__ int row[8];
    row[index] = 1;
    y[0] = row[7];
}

// Within a warp: the neighbour's element is read without a barrier between.
extern "C" __global__ void shift(const int* x, int* y, int wait) {
    DYNAMIC_SHARED(int, row);
    const int lane = threadIdx.x;
    row[lane] = x[lane];
    if (wait) sync_warp();
    y[lane] = row[(lane + 1) % 32];
}

// Every block adds to what the one before it wrote: an order that no device promises.
extern "C" __global__ void follow_blocks(int* y) {
    if (threadIdx.x == 0) y[blockIdx.x] = blockIdx.x == 0 ? 1 : y[blockIdx.x - 1] + 1;
}

extern "C" __global__ void uneven_barriers() {
    for (u32 i = 0; i < 1 + threadIdx.x / 32; ++i) sync_block();
    sync_warp(threadIdx.x < 32 ? 0xffffu : FULL_WARP);
}
