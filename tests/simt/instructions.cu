// One kernel per wrapper of device.cuh whose result a test can compute another way.

#include "device.cuh"

extern "C" __global__ void lanes(int* y) {
    const int lane = lane_id();
    int* row = y + lane * 8;
    row[0] = shfl_xor(lane, 5);
    row[1] = shfl_idx(lane * 3, (lane + 1) & 31);
    row[2] = shfl_up(lane, 2);
    row[3] = shfl_down(lane, 3);
    row[4] = static_cast<int>(vote_ballot(lane % 3 == 0));
    row[5] = vote_any(lane == 31);
    row[6] = vote_all(lane < 31);
    row[7] = lane < 8 ? shfl_xor(lane, 1, 0xffu) : -1;
}

extern "C" __global__ void bits(const u32* a, const u32* b, const u32* c, u32* y) {
    const int i = threadIdx.x;
    y[4 * i] = prmt(a[i], b[i], c[i]);
    y[4 * i + 1] = lop3<0xf8>(a[i], b[i], c[i]);
    y[4 * i + 2] = lop3<0x96>(a[i], b[i], c[i]);
    y[4 * i + 3] = static_cast<u32>(popcount(a[i]));
}

// c[16, 8] += a[16, 16] b[16, 8] from row-major halves, as any kernel would load the fragments.
extern "C" __global__ void matrix_f16(const u16* a, const u16* b, float* c) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    const auto pair = [](u16 x, u16 y) { return x | static_cast<u32>(y) << 16; };
    u32 left[4];
    for (int i = 0; i < 4; ++i) {
        const u16* at = a + (g + 8 * (i & 1)) * 16 + 2 * t + 8 * (i >> 1);
        left[i] = pair(at[0], at[1]);
    }
    const u16* at = b + 2 * t * 8 + g;
    float sums[4];
    for (int i = 0; i < 4; ++i) sums[i] = c[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)];
    mma_f16(sums, left, pair(at[0], at[8]), pair(at[64], at[72]));
    for (int i = 0; i < 4; ++i) c[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = sums[i];
}

template <class Multiply>
DEVICE void multiply_bytes(const void* a, const void* b, int* c, Multiply multiply) {
    const int g = lane_id() / 4, t = lane_id() % 4;
    const u8 *rows = static_cast<const u8*>(a), *columns = static_cast<const u8*>(b);
    u32 left[4];
    for (int i = 0; i < 4; ++i) {
        left[i] = ldg32(rows + (g + 8 * (i & 1)) * 32 + 4 * t + 16 * (i >> 1));
    }
    u32 right[2] = {0, 0};
    for (int i = 0; i < 8; ++i) {
        const u32 element = columns[(4 * t + i % 4 + 16 * (i / 4)) * 8 + g];
        right[i / 4] |= element << 8 * (i % 4);
    }
    int sums[4] = {0, 0, 0, 0};
    multiply(sums, left, right[0], right[1]);
    for (int i = 0; i < 4; ++i) c[(g + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = sums[i];
}

extern "C" __global__ void matrix_u8s8(const u8* a, const s8* b, int* c) {
    multiply_bytes(a, b, c, mma_u8s8);
}

extern "C" __global__ void matrix_s8u8(const s8* a, const u8* b, int* c) {
    multiply_bytes(a, b, c, mma_s8u8);
}

// Every lane's words through shared memory, in reverse.
extern "C" __global__ void through_shared(const u32* x, u32* y) {
    __shared__ __align__(16) u32 words[128], pairs[64];
    const int lane = lane_id();
    for (int i = 0; i < 4; ++i) words[4 * lane + i] = x[4 * lane + i];
    for (int i = 0; i < 2; ++i) pairs[2 * lane + i] = x[128 + 2 * lane + i];
    sync_block();
    const uint4 v = lds128(words + 4 * (31 - lane));
    const uint2 w = lds64(pairs + 2 * (31 - lane));
    y[4 * lane] = v.x, y[4 * lane + 1] = v.y, y[4 * lane + 2] = v.z, y[4 * lane + 3] = v.w;
    y[128 + 2 * lane] = w.x, y[129 + 2 * lane] = w.y;
}

extern "C" __global__ void transpose(const u32* x, u32* y) {
    y[threadIdx.x] = movmatrix_trans(x[threadIdx.x]);
}

extern "C" __global__ void halves(const float* x, const float* z, u16* y, int count) {
    for (int i = threadIdx.x; i < count; i += 32) {
        const u32 a = h2_from(x[i], z[i]), b = h2_from(z[i], x[i]);
        y[6 * i] = f32_to_f16(x[i]);
        y[6 * i + 1] = f32_to_bf16(x[i]);
        y[6 * i + 2] = static_cast<u16>(h2_mul(a, b));
        y[6 * i + 3] = static_cast<u16>(h2_add(a, b) >> 16);
        y[6 * i + 4] = static_cast<u16>(h2_fma(a, b, a));
        y[6 * i + 5] = f32_to_f16(h2_lo(a) - h2_hi(b));
    }
}
