// Copy whole pages inside a pool, all layers and heads: copy-on-write.
//
// what      page dst[i] becomes page src[i]; no page is both source and destination
// mapping   grid (pages, layers, pieces), 128 threads (move.cuh)
// bytes     2 page_bytes per page
// host twin PageBytes.copy (pagedtq/backends/host_pages.py)
//
// Rings could be copied as the pages of a pool of one layer; the backend copies rings and sink records
// by array indexing instead (CudaWindow.copy_slots, copy_records).

#include "move.cuh"

extern "C" __global__ void __launch_bounds__(MOVE_THREADS)
    copy_pages(u8* pool, const LayerSpan* layers, const i64* src, const i64* dst) {
    const LayerSpan layer = layers[blockIdx.y];
    u8* base = pool + layer.pool_offset;
    move_run(base + dst[blockIdx.x] * layer.page_stride, base + src[blockIdx.x] * layer.page_stride,
             layer.bytes);
}
