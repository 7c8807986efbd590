// Copy slabs back into pages: the inverse of gather_slabs.cu.
//
// what      page pages[i] receives slab i (of slab_bytes)
// mapping   grid (pages, layers, pieces), 128 threads (move.cuh)
// bytes     2 page_bytes per page
// host twin PageBytes.scatter (pagedtq/backends/host_pages.py)

#include "move.cuh"

extern "C" __global__ void __launch_bounds__(MOVE_THREADS)
    scatter_slabs(u8* pool, const LayerSpan* layers, const i64* pages, const u8* slabs,
                  i64 slab_bytes) {
    const LayerSpan layer = layers[blockIdx.y];
    move_run(pool + layer.pool_offset + pages[blockIdx.x] * layer.page_stride,
             slabs + blockIdx.x * slab_bytes + layer.slab_offset, layer.bytes);
}
