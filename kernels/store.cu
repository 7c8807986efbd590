// Encode new tokens into pages: keys and values in one launch.
//
// what      token t's keys and values go to slot_mapping[t]; negative slots are skipped
// mapping   grid (ceil(2 ceil(tokens / 2) heads / kVectorsPerBlock), 2): y = 0 keys, 1 values;
//           128 threads, kLanes lanes per vector (rotation.cuh)
// bytes     per token and head: 2 HEAD_DIM elements in, the page's bytes per token out
// host twin HostBackend.store (pagedtq/backends/host.py); pages agree byte for byte
//
// Slots are distinct and on owned pages, and elements finite and within range: the caller checks.

#include "append.cuh"

extern "C" __global__ void __launch_bounds__(kThreads, kAppendBlocks)
    store(const u8* keys, const u8* values, i64 key_stride, i64 value_stride,
          const i64* slot_mapping, int num_tokens, int num_heads, u8* pool, i64 page_stride,
          i64 head_stride, int page_size, const float* key_book, const void* key_rotation,
          const float* key_mean, const void* key_projection, const float* value_book,
          const void* value_rotation) {
    __shared__ float scratch[kScratchFloats];
    constexpr int row_bytes = HEAD_DIM * element_bytes<INPUT_DTYPE>();
    const Item item = item_of_thread(num_tokens, num_heads);
    const i64 slot = item.exists ? slot_mapping[item.token] : -1;
    Target to;
    to.active = slot >= 0;
    to.joined = is_joined(slot);
    to.place = place_of(pool, page_stride, head_stride, page_size, to.active ? slot : 0, item.head);
    float* mine = scratch + (kScratch ? threadIdx.x / kLanes * HEAD_DIM : 0);
    // Strides are bytes between tokens; the heads of a token lie side by side.
    if (blockIdx.y == 0) {
        const u8* row = keys + item.token * key_stride + static_cast<i64>(item.head) * row_bytes;
        const Tables tables = {key_book, key_rotation, key_mean, key_projection};
        append<KeyForm, INPUT_DTYPE>(row, rows_aligned(keys, key_stride), tables, to, item.head,
                                     item.lane, mine);
    } else {
        const u8* row = values + item.token * value_stride + static_cast<i64>(item.head) * row_bytes;
        const Tables tables = {value_book, value_rotation, nullptr, nullptr};
        append<ValueForm, INPUT_DTYPE>(row, rows_aligned(values, value_stride), tables, to,
                                       item.head, item.lane, mine);
    }
}
