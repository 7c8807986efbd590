// Decode page slots to dense keys and values, in the original space.
//
// what      out[i] = the decoded token of slots[i]; rows of negative slots become 0
// mapping   grid (ceil(2 ceil(slots / 2) heads / kVectorsPerBlock), 2): y = 0 keys, 1 values;
//           128 threads, kLanes lanes per vector (rotation.cuh)
// bytes     per token and head: the page's bytes per token in, 2 HEAD_DIM elements out
// host twin HostBackend.load (pagedtq/backends/host.py); values by the same float32 operations
//           in the same order, keys in float32 where the host reads them in float64
//
// Prod keys include S^T sign(S r), so that inner products with them are the unbiased estimates.

#include "append.cuh"
#include "decode.cuh"

template <class Form>
DEVICE void load_vector(const Place& place, bool active, const Tables& tables, float qjl_factor,
                        u8* out, int head, int lane, float* scratch) {
    Elements x;
    if constexpr (Form::exact != 0) {
        const u8* row = place.row(Form::codes_at, Form::row);
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
            const int chunk = lane + kLanes * j;
            const bool here = active && chunk < kChunks;
            if (here) {
                read_chunk<Form::exact>(row, chunk, HEAD_DIM, HEAD_DIM % 8 == 0, x[j]);
            }
#pragma unroll
            for (int e = 0; e < 8; ++e) x[j][e] = here ? x[j][e] : 0.0f;
        }
    } else {
        decode<Form>(place, active, Book<Form>{tables.book}, x, lane);
        if constexpr (Form::qjl != QJL_NONE) {
            Elements sketch;
            decode_signs<Form>(place, active, sketch, lane);
            if constexpr (Form::qjl == QJL_GAUSSIAN) {
                const float* matrices = static_cast<const float*>(tables.projection);
                multiply<float, true>(matrices + static_cast<i64>(head) * HEAD_DIM * HEAD_DIM,
                                      sketch, lane, scratch);
            } else {
                unrotate<kDense<Form>>(tables.projection, head, sketch, lane, scratch);
            }
#pragma unroll
            for (int j = 0; j < kSpan; ++j) {
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    x[j][e] = add_rn(x[j][e], mul_rn(sketch[j][e], qjl_factor));
                }
            }
        }
        unrotate<kDense<Form>>(tables.rotation, head, x, lane, scratch);
        if (tables.mean != nullptr) {
            const float* mean = tables.mean + static_cast<i64>(head) * HEAD_DIM;
#pragma unroll
            for (int j = 0; j < kSpan; ++j) {
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const int i = 8 * (lane + kLanes * j) + e;
                    if (active && i < HEAD_DIM) x[j][e] = add_rn(x[j][e], mean[i]);
                }
            }
        }
    }
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
        const int chunk = lane + kLanes * j;
        if (out != nullptr && chunk < kChunks) {
            write_chunk<OUTPUT_DTYPE>(out, chunk, HEAD_DIM, HEAD_DIM % 8 == 0, x[j]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    load(const i64* slots, int num_slots, int num_heads, u8* pool, i64 page_stride,
         i64 head_stride, int page_size, u8* keys, u8* values, const float* key_book,
         const void* key_rotation, const float* key_mean, const void* key_projection,
         float qjl_factor, const float* value_book, const void* value_rotation) {
    __shared__ float scratch[kScratchFloats];
    constexpr int row_bytes = HEAD_DIM * element_bytes<OUTPUT_DTYPE>();
    const Item item = item_of_thread(num_slots, num_heads);
    const i64 slot = item.exists ? slots[item.token] : -1;
    const bool active = slot >= 0;
    const Place place =
        place_of(pool, page_stride, head_stride, page_size, active ? slot : 0, item.head);
    float* mine = scratch + (kScratch ? threadIdx.x / kLanes * HEAD_DIM : 0);
    const i64 row = (static_cast<i64>(item.token) * num_heads + item.head) * row_bytes;
    if (blockIdx.y == 0) {
        const Tables tables = {key_book, key_rotation, key_mean, key_projection};
        load_vector<KeyForm>(place, active, tables, qjl_factor, item.exists ? keys + row : nullptr,
                             item.head, item.lane, mine);
    } else {
        const Tables tables = {value_book, value_rotation, nullptr, nullptr};
        load_vector<ValueForm>(place, active, tables, 0.0f, item.exists ? values + row : nullptr,
                               item.head, item.lane, mine);
    }
}
