// Per-page maximum and mass of scores, for eviction policies.
//
// what      maximum[h, i], the largest score of query head h in page i of those that hold a readable
//           position, and mass[h, i], the sum of exp(sm_scale * (score - the sequence's largest))
// mapping   grid (sequences, query heads), 128 threads: a warp takes every fourth block, lanes its
//           positions
// bytes     4 per score, twice (the second time mostly from cache); 8 per page out
// host twin page_stats (pagedtq/backends/host_score.py)
//
// Reads what score.cu wrote, in the same ragged order.

#include "device.cuh"

#define WARPS 4
#define MINUS_INFINITY (-bits_float(0x7f800000u))

// scores f32[num_q_heads, sequence_starts[batch]]; sequence_starts i64[batch + 1] and block_starts
// i64[batch, table_stride] as for `score`. page_numbers i32[batch, table_stride]: a block's column
// in the results f32[num_q_heads, num_pages], -1 where nothing of it is readable.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    page_stats(const float* scores, const i64* sequence_starts, const i64* block_starts,
               const int* page_numbers, int batch, int table_stride, int num_pages, float* maximum,
               float* mass, float sm_scale) {
    __shared__ float tops[WARPS];
    const int sequence = blockIdx.x, head = blockIdx.y;
    const int warp = threadIdx.x / WARP_SIZE, lane = lane_id();
    const i64 begin = sequence_starts[sequence];
    const i64 count = sequence_starts[sequence + 1] - begin;
    const float* row = scores + head * sequence_starts[batch] + begin;
    const i64* starts = block_starts + static_cast<i64>(sequence) * table_stride;
    const int* numbers = page_numbers + static_cast<i64>(sequence) * table_stride;
    maximum += static_cast<i64>(head) * num_pages;
    mass += static_cast<i64>(head) * num_pages;

    float largest = MINUS_INFINITY;
    for (int block = warp; block < table_stride; block += WARPS) {
        if (numbers[block] < 0) continue;
        const i64 end = block + 1 < table_stride ? starts[block + 1] : count;
        float top = MINUS_INFINITY;
        for (i64 i = starts[block] + lane; i < end; i += WARP_SIZE) top = fmaxf(top, row[i]);
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) top = fmaxf(top, shfl_xor(top, lanes));
        if (lane == 0) maximum[numbers[block]] = top;
        largest = fmaxf(largest, top);
    }
    if (lane == 0) tops[warp] = largest;
    sync_block();
#pragma unroll
    for (int other = 0; other < WARPS; ++other) largest = fmaxf(largest, tops[other]);
    for (int block = warp; block < table_stride; block += WARPS) {
        if (numbers[block] < 0) continue;
        const i64 end = block + 1 < table_stride ? starts[block + 1] : count;
        float sum = 0.0f;
        for (i64 i = starts[block] + lane; i < end; i += WARP_SIZE) {
            sum += ex2((row[i] - largest) * (sm_scale * 1.44269504f));
        }
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) sum += shfl_xor(sum, lanes);
        if (lane == 0) mass[numbers[block]] = sum;
    }
}
