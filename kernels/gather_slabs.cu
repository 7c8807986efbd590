// Copy pages into slabs: one page's layers side by side, for swapping, snapshots and transfer.
//
// what      slab i (of slab_bytes) receives page pages[i]
// mapping   grid (pages, layers, pieces), 128 threads (move.cuh)
// bytes     2 page_bytes per page
// host twin PageBytes.gather (pagedtq/backends/host_pages.py)

#include "move.cuh"

extern "C" __global__ void __launch_bounds__(MOVE_THREADS)
    gather_slabs(const u8* pool, const LayerSpan* layers, const i64* pages, u8* slabs,
                 i64 slab_bytes) {
    const LayerSpan layer = layers[blockIdx.y];
    move_run(slabs + blockIdx.x * slab_bytes + layer.slab_offset,
             pool + layer.pool_offset + pages[blockIdx.x] * layer.page_stride, layer.bytes);
}
