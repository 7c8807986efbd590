// Encode tokens of exact windows into pages: whole blocks, from the rings.
//
// what      the token in ring row ring_rows[t] goes to slot_mapping[t]; negative slots are skipped
// mapping   as store.cu
// bytes     per token and head: 2 HEAD_DIM elements of kv_dtype in, the page's bytes per token out
// host twin HostBackend.seal (pagedtq/backends/host.py); pages agree byte for byte
//
// A ring is [slots][heads][keys, values][window_rows][HEAD_DIM] in kv_dtype; row r of the mapping is
// row r % window_rows of slot r / window_rows.

#include "append.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, kAppendBlocks)
    seal(const u8* ring, const i64* ring_rows, int window_rows, const i64* slot_mapping,
         int num_tokens, int num_heads, u8* pool, i64 page_stride, i64 head_stride, int page_size,
         const float* key_book, const void* key_rotation, const float* key_mean,
         const void* key_projection, const float* value_book, const void* value_rotation) {
    __shared__ float scratch[kScratchFloats];
    constexpr int row_bytes = HEAD_DIM * element_bytes<KV_DTYPE>();
    const Item item = item_of_thread(num_tokens, num_heads);
    const i64 slot = item.exists ? slot_mapping[item.token] : -1;
    Target to;
    to.active = slot >= 0;
    to.joined = is_joined(slot);
    to.place = place_of(pool, page_stride, head_stride, page_size, to.active ? slot : 0, item.head);
    float* mine = scratch + (kScratch ? threadIdx.x / kLanes * HEAD_DIM : 0);
    const i64 from = to.active ? ring_rows[item.token] : 0;
    const i64 owner = from / window_rows;
    const i64 plane = (owner * num_heads + item.head) * 2 + blockIdx.y;
    const u8* row = ring + (plane * window_rows + from - owner * window_rows) * row_bytes;
    const bool aligned = rows_aligned(ring, row_bytes);
    if (blockIdx.y == 0) {
        const Tables tables = {key_book, key_rotation, key_mean, key_projection};
        append<KeyForm, KV_DTYPE>(row, aligned, tables, to, item.head, item.lane, mine);
    } else {
        const Tables tables = {value_book, value_rotation, nullptr, nullptr};
        append<ValueForm, KV_DTYPE>(row, aligned, tables, to, item.head, item.lane, mine);
    }
}
