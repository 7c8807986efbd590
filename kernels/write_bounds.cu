// Key bounds of full pages: minimum and maximum of every rotated channel, for query-aware eviction.
//
// what      f16 [2][HEAD_DIM] per head of pages[i], rounded outwards so that bounds stay bounds
// mapping   grid (pages, heads), 128 threads: kGroups groups of threads take every kGroups-th
//           token, a thread one chunk of 8 channels
// bytes     the page's key codes and norms in, 4 HEAD_DIM bytes per head out
// host twin HostBackend.write_bounds (pagedtq/backends/host.py)

#include "append.cuh"
#include "decode.cuh"

constexpr int kGroups = kChunks >= kThreads ? 1 : kThreads / kChunks;
constexpr int kColumns = 8 * kChunks;

// The neighbour of a half in the direction of `up`.
DEVICE u16 next_half(u16 bits, bool up) {
    if ((bits & 0x7fffu) == 0) return up ? 0x0001 : 0x8001;
    const bool away = (bits >> 15 == 0) == up;
    return static_cast<u16>(away ? bits + 1 : bits - 1);
}

DEVICE u16 round_outwards(float x, bool up) {
    const u16 nearest = f32_to_f16(x);
    const float rounded = f16_to_f32(nearest);
    return (up ? rounded < x : rounded > x) ? next_half(nearest, up) : nearest;
}

extern "C" __global__ void __launch_bounds__(kThreads)
    write_bounds(const i64* pages, u8* pool, i64 page_stride, i64 head_stride, int page_size,
                 const float* key_book) {
    __shared__ float lowest[kGroups * kColumns], highest[kGroups * kColumns];
    const Book<KeyForm> book = {key_book};
    Place place = place_of(pool, page_stride, head_stride, page_size,
                           pages[blockIdx.x] * page_size, blockIdx.y);
    for (int item = threadIdx.x; item < kGroups * kChunks; item += kThreads) {
        const int group = item / kChunks, chunk = item - group * kChunks;
        float low[8] = {}, high[8] = {};
        for (int token = group; token < page_size; token += kGroups) {
            float x[8];
            place.offset = token;
            decode_chunk<KeyForm>(place, chunk, stored_norm_of<KeyForm>(place), book, x);
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                low[e] = token == group || x[e] < low[e] ? x[e] : low[e];
                high[e] = token == group || x[e] > high[e] ? x[e] : high[e];
            }
        }
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            lowest[group * kColumns + 8 * chunk + e] = low[e];
            highest[group * kColumns + 8 * chunk + e] = high[e];
        }
    }
    sync_block();
    u16* bounds =
        reinterpret_cast<u16*>(place.extent + static_cast<i64>(KEY_BOUNDS_AT) * page_size);
    // With fewer tokens than groups the last groups have seen none.
    const int groups = min(kGroups, page_size);
    for (int i = threadIdx.x; i < HEAD_DIM; i += kThreads) {
        float low = lowest[i], high = highest[i];
        for (int group = 1; group < groups; ++group) {
            low = min(low, lowest[group * kColumns + i]);
            high = max(high, highest[group * kColumns + i]);
        }
        bounds[i] = round_outwards(low, false);
        bounds[HEAD_DIM + i] = round_outwards(high, true);
    }
}
