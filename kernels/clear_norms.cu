// Zero the norm planes (and key bounds) of pages, so that no stale norm is ever NaN.
//
// what      every plane of norms in pages[i], all layers and heads
// mapping   grid (pages, planes), 128 threads walk the heads' bytes of one plane
// bytes     the planes, written once: 4 bytes per token, head and layer, more with Prod or bounds
// host twin PageBytes.clear_norms (pagedtq/backends/host_pages.py)

#include "device.cuh"

#define CLEAR_THREADS 128

// One plane of norms of one layer, as a row of a table in memory (all int64).
struct NormSpan {
    i64 pool_offset;  // of the plane in page 0, head 0 of its layer
    i64 page_stride;
    i64 head_stride;
    i64 bytes;  // in one extent, a multiple of 4
};

extern "C" __global__ void __launch_bounds__(CLEAR_THREADS)
    clear_norms(u8* pool, const NormSpan* planes, const i64* pages, int num_heads) {
    const NormSpan plane = planes[blockIdx.y];
    u8* page = pool + plane.pool_offset + pages[blockIdx.x] * plane.page_stride;
    const int words = static_cast<int>(plane.bytes / 4);
    for (int item = threadIdx.x; item < words * num_heads; item += CLEAR_THREADS) {
        const int head = item / words;
        *reinterpret_cast<u32*>(page + head * plane.head_stride + (item - head * words) * 4) = 0;
    }
}
