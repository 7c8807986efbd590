// Share the tokens of a batch out among blocks: how many parts every sequence is cut into.
//
// what      unit_sequences[u], the sequence of every unit of `attend` (-1: idle), and per sequence
//           its first unit and its number of parts
// mapping   one block of PLAN_THREADS threads
// bytes     44 per sequence in, 8 per sequence and 4 per unit out
// host twin none: the host takes one sequence and KV head per thread
//
// Everything is read on the device, so a captured graph replays it after lengths grew, and one plan
// serves all layers with the same reads. The grid of `attend` is `max_units`, whatever the lengths.
// Parts are as equal as possible: the smallest part length, in tiles, for which all units fit.
// max_units must hold one unit per column tile of every sequence.

#include "device.cuh"

#ifndef PLAN_THREADS
#define PLAN_THREADS 256
#endif

DEVICE i64 block_sum(i64 x, i64* shared) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) x += shfl_xor(x, lanes);
    sync_block();
    if (lane_id() == 0) shared[threadIdx.x / WARP_SIZE] = x;
    sync_block();
    i64 total = 0;
    for (int warp = 0; warp < PLAN_THREADS / WARP_SIZE; ++warp) total += shared[warp];
    return total;
}

// Sum of x over the threads before this one.
DEVICE int block_prefix(int x, int* shared) {
    int sum = x;
#pragma unroll
    for (int lanes = 1; lanes < WARP_SIZE; lanes *= 2) {
        const int other = shfl_up(sum, lanes);
        if (lane_id() >= lanes) sum += other;
    }
    sync_block();
    if (lane_id() == WARP_SIZE - 1) shared[threadIdx.x / WARP_SIZE] = sum;
    sync_block();
    for (int warp = 0; warp < static_cast<int>(threadIdx.x) / WARP_SIZE; ++warp) sum += shared[warp];
    return sum - x;
}

struct Batch {
    const i64* reads;  // [5, batch]: kv_len, first, stop, keep, start
    const int* query_starts;
    int batch, group, columns, tile_tokens;

    DEVICE int column_tiles(int b) const {
        return ((query_starts[b + 1] - query_starts[b]) * group + columns - 1) / columns;
    }
    // Tiles with a readable position: exact enough for sharing out.
    DEVICE int tiles(int b) const {
        const i64 first = reads[batch + b], stop = reads[2 * batch + b];
        const i64 keep = reads[3 * batch + b], start = reads[4 * batch + b];
        i64 tokens = max(stop - first, static_cast<i64>(0));
        if (keep < start) {
            const i64 from = max(keep, first), to = min(start, stop);
            tokens -= max(to - from, static_cast<i64>(0));
        }
        return static_cast<int>((tokens + tile_tokens - 1) / tile_tokens);
    }
    DEVICE int parts(int b, int part_tiles) const {
        return max((tiles(b) + part_tiles - 1) / part_tiles, 1);
    }
};

extern "C" __global__ void __launch_bounds__(PLAN_THREADS)
    plan_splits(const i64* reads, const int* query_starts, int batch, int group, int columns,
                int tile_tokens, int min_part_tiles, int max_units, int* unit_sequences,
                int* first_units, int* splits) {
    __shared__ i64 sums[PLAN_THREADS / WARP_SIZE];
    __shared__ int prefixes[PLAN_THREADS / WARP_SIZE];
    const Batch all = {reads, query_starts, batch, group, columns, tile_tokens};
    const int thread = threadIdx.x;

    int longest = 1;
    for (int b = thread; b < batch; b += PLAN_THREADS) longest = max(longest, all.tiles(b));
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) longest = max(longest, shfl_xor(longest, lanes));
    if (lane_id() == 0) prefixes[thread / WARP_SIZE] = longest;
    sync_block();
    for (int warp = 0; warp < PLAN_THREADS / WARP_SIZE; ++warp) {
        longest = max(longest, prefixes[warp]);
    }

    // All threads bisect alike: the units needed fall as parts grow.
    int low = max(min_part_tiles, 1), high = max(longest, low);
    while (low < high) {
        const int middle = low + (high - low) / 2;
        i64 units = 0;
        for (int b = thread; b < batch; b += PLAN_THREADS) {
            units += static_cast<i64>(all.column_tiles(b)) * all.parts(b, middle);
        }
        if (block_sum(units, sums) <= max_units) high = middle;
        else low = middle + 1;
    }

    int begin = 0;
    for (int base = 0; base < batch; base += PLAN_THREADS) {
        const int b = base + thread;
        const int parts = b < batch ? all.parts(b, low) : 0;
        const int units = b < batch ? all.column_tiles(b) * parts : 0;
        const int first = begin + block_prefix(units, prefixes);
        if (b < batch) {
            splits[b] = parts;
            first_units[b] = first;
            for (int u = first; u < min(first + units, max_units); ++u) unit_sequences[u] = b;
        }
        begin += static_cast<int>(block_sum(units, sums));
    }
    for (int u = begin + thread; u < max_units; u += PLAN_THREADS) unit_sequences[u] = -1;
}
