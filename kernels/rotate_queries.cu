// Bring query rows into the space of the stored keys, as halves the attention kernels multiply.
//
// what      rows[i] = f16(2^p R q), with p such that the largest element lies in [2^9, 2^10);
//           scales[i] turns products with them into log2 units; Prod: sketches[i] = f16(2^p a S R q);
//           offsets[i] = sm_scale q . mean
// mapping   128 threads, kLanes lanes per row (rotation.cuh)
// bytes     per row: HEAD_DIM elements in, 2 HEAD_DIM (Prod: 4 HEAD_DIM) + 8 bytes out
// host twin prepare_queries (pagedtq/backends/queries.py)
//
// Rows are [tokens, num_q_heads]; query head h belongs to KV head h / group. Once per step and
// layer: nothing here is on the path of a key.

#include "decode.cuh"

DEVICE float largest(const Elements& x) {
    float top = 0.0f;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) top = fmaxf(top, fabsf(x[j][e]));
    }
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) top = fmaxf(top, shfl_xor(top, lanes));
    return top;
}

DEVICE void scale_by(Elements& x, float factor) {
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) x[j][e] *= factor;
    }
}

DEVICE void write_halves(u16* row, const Elements& x, int lane) {
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int i = 8 * (lane + kLanes * j) + e;
            if (i < HEAD_DIM) row[i] = f32_to_f16(x[j][e]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    rotate_queries(const u8* queries, int num_rows, int num_q_heads, int group, float sm_scale,
                   const void* key_rotation, const float* key_mean, const void* key_projection,
                   float qjl_factor, u16* rows, float* scales, u16* sketches, float* offsets) {
    __shared__ float scratch[kVectorsPerBlock * HEAD_DIM];
    const int index = blockIdx.x * kVectorsPerBlock + threadIdx.x / kLanes;
    const int lane = threadIdx.x % kLanes;
    constexpr int row_bytes = HEAD_DIM * element_bytes<INPUT_DTYPE>();
    float* mine = scratch + threadIdx.x / kLanes * HEAD_DIM;
    // Lanes without a row follow the others through the exchanges.
    const bool exists = index < num_rows;
    const i64 at = exists ? index : 0;
    const int head = static_cast<int>(at % num_q_heads) / group;

    Elements x;
    float shift = 0.0f;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
        const int chunk = lane + kLanes * j;
        if (chunk < kChunks) {
            const bool aligned = rows_aligned(queries, row_bytes);
            read_chunk<INPUT_DTYPE>(queries + at * row_bytes, chunk, HEAD_DIM, aligned, x[j]);
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e) x[j][e] = 0.0f;
        }
        if (key_mean != nullptr) {
            const float* mean = key_mean + static_cast<i64>(head) * HEAD_DIM;
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int i = 8 * chunk + e;
                if (i < HEAD_DIM) shift += x[j][e] * mean[i];
            }
        }
    }
#pragma unroll
    for (int lanes = 1; lanes < kLanes; lanes *= 2) shift += shfl_xor(shift, lanes);

    if constexpr (KeyForm::exact == 0) {
        rotate<kDense<KeyForm>>(key_rotation, head, x, lane, mine);
        scale_by(x, bits_float(INVERSE_ROOT_BITS));
    }
    float top = largest(x);
    Elements sketch;
    if constexpr (KeyForm::qjl != QJL_NONE) {
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
#pragma unroll
            for (int e = 0; e < 8; ++e) sketch[j][e] = x[j][e];
        }
        if constexpr (KeyForm::qjl == QJL_GAUSSIAN) {
            const float* matrices = static_cast<const float*>(key_projection);
            multiply<float, false>(matrices + static_cast<i64>(head) * HEAD_DIM * HEAD_DIM, sketch,
                                   lane, mine);
            scale_by(sketch, qjl_factor);
        } else {
            rotate<kDense<KeyForm>>(key_projection, head, sketch, lane, mine);
            scale_by(sketch, qjl_factor * bits_float(INVERSE_ROOT_BITS));
        }
        top = fmaxf(top, largest(sketch));
    }
    // 2^(9 - floor(log2(top))), from the exponent's bits; rows too small for it are as good as 0.
    const int exponent = static_cast<int>(float_bits(top) >> 23);
    const bool vanishes = exponent < 20 || sm_scale == 0.0f;
    const float power = vanishes ? 0.0f : bits_float(static_cast<u32>(254 + 9 - exponent) << 23);
    const float sign = sm_scale < 0.0f ? -power : power;
    scale_by(x, sign);
    if (!exists) return;
    write_halves(rows + at * HEAD_DIM, x, lane);
    if constexpr (KeyForm::qjl != QJL_NONE) {
        scale_by(sketch, sign);
        write_halves(sketches + at * HEAD_DIM, sketch, lane);
    }
    if (lane == 0) {
        scales[at] = vanishes ? 1.0f : fabsf(sm_scale) * 1.44269504f / power;
        if (offsets != nullptr) offsets[at] = sm_scale * shift;
    }
}
