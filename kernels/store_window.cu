// Write new tokens into exact windows: rings and sink records.
//
// what      token t goes to ring row ring_mapping[t] and to sink row sink_mapping[t]; -1: nowhere
// mapping   grid (tokens, 2): y = 0 keys, 1 values; 128 threads walk the token's chunks of 8
//           elements, all heads
// bytes     per token and head: 2 HEAD_DIM elements in, as many of kv_dtype out per row written
// host twin WindowStore.write (pagedtq/backends/host_window.py); rows agree byte for byte
//
// Rings are [slots][heads][keys, values][window_rows][HEAD_DIM] in kv_dtype, sinks alike with
// sink_rows. A row of a mapping is `slot * rows + row`.

#include "rotation.cuh"
#include "tokens.cuh"

DEVICE void put(u8* windows, int rows, i64 row, int num_heads, int head, int stream, int chunk,
                const float* x) {
    const i64 owner = row / rows;
    const i64 plane = (owner * num_heads + head) * 2 + stream;
    u8* at = windows + (plane * rows + row - owner * rows) * HEAD_DIM * element_bytes<KV_DTYPE>();
    write_chunk<KV_DTYPE>(at, chunk, HEAD_DIM, HEAD_DIM % 8 == 0, x);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    store_window(const u8* keys, const u8* values, i64 key_stride, i64 value_stride,
                 const i64* ring_mapping, const i64* sink_mapping, int num_heads, u8* ring,
                 int window_rows, u8* sinks, int sink_rows) {
    const int token = blockIdx.x, stream = blockIdx.y;
    const i64 ring_row = ring_mapping[token], sink_row = sink_mapping[token];
    if (ring_row < 0 && sink_row < 0) return;
    const u8* base = stream == 0 ? keys : values;
    const i64 stride = stream == 0 ? key_stride : value_stride;
    const bool aligned = rows_aligned(base, stride);
    for (int item = threadIdx.x; item < num_heads * kChunks; item += kThreads) {
        const int head = item / kChunks, chunk = item - head * kChunks;
        const u8* row = base + token * stride +
                        static_cast<i64>(head) * HEAD_DIM * element_bytes<INPUT_DTYPE>();
        float x[8];
        read_chunk<INPUT_DTYPE>(row, chunk, HEAD_DIM, aligned, x);
        if constexpr (INPUT_DTYPE != KV_DTYPE) {
#pragma unroll
            for (int e = 0; e < 8; ++e) x[e] = round_to<KV_DTYPE>(x[e]);
        }
        if (ring_row >= 0) put(ring, window_rows, ring_row, num_heads, head, stream, chunk, x);
        if (sink_row >= 0) put(sinks, sink_rows, sink_row, num_heads, head, stream, chunk, x);
    }
}
