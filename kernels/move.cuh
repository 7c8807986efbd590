// Copying runs of bytes with all threads of a row of blocks.
//
// what      16 bytes per thread and step, blocks along grid.z share one run
// mapping   128 threads; grid.z blocks
// bytes     the run, read and written once
// host twin none: NumPy assignment

#pragma once

#include "device.cuh"

#define MOVE_THREADS 128

// One layer of a pool or of slabs, as a row of a table in memory (all int64).
struct LayerSpan {
    i64 pool_offset;   // of the layer's page 0 in the pool
    i64 page_stride;   // between two pages
    i64 slab_offset;   // of the layer in a slab
    i64 bytes;         // one page's share of the layer, a multiple of 16
};

DEVICE void move_run(u8* target, const u8* source, i64 bytes) {
    const i64 step = static_cast<i64>(gridDim.z) * MOVE_THREADS * 16;
    for (i64 at = (static_cast<i64>(blockIdx.z) * MOVE_THREADS + threadIdx.x) * 16; at < bytes;
         at += step) {
        stg128(target + at, ldg128(source + at));
    }
}
