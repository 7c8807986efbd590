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
