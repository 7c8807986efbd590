// Merge the partial states of every query row, and bring the output back: one rotation per row.
//
// what      out[i], lse[i] of all units of row i, of an optional state in the original space (the
//           exact window, the chunk itself) and of an optional learned sink, which has no value
// mapping   128 threads, kLanes lanes per row (rotation.cuh)
// bytes     per row: (HEAD_DIM + 1) * 4 in per part, (HEAD_DIM + 1) * 4 out
// host twin merge_states, add_sink (pagedtq/backends/states.py), unrotate_outputs (queries.py)
//
// Parts are merged in order of their positions, so a row's result does not depend on the batch.
// Without any key, out is 0 and lse -inf.

#include "batch.cuh"
#include "decode.cuh"

#define MINUS_INFINITY (-bits_float(0x7f800000u))

// A running merge: sum of weights times outputs, weights relative to 2^top.
struct Merged {
    Elements sum;
    float top, mass;

    // Make room for a state with an lse of `log2_mass` (log2 units) and return its weight.
    DEVICE float admit(float log2_mass) {
        const float raised = fmaxf(top, log2_mass);
        if (raised == MINUS_INFINITY) return 0.0f;
        const float decay = ex2(top - raised);
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
#pragma unroll
            for (int e = 0; e < 8; ++e) sum[j][e] *= decay;
        }
        mass *= decay;
        top = raised;
        const float weight = ex2(log2_mass - raised);
        mass += weight;
        return weight;
    }

    DEVICE void add(const float* row, float lse, int lane) {
        const float weight = admit(lse * 1.44269504f);
        if (weight == 0.0f) return;
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int i = 8 * (lane + kLanes * j) + e;
                if (i < HEAD_DIM) sum[j][e] += weight * row[i];
            }
        }
    }
};

// part_outs f32[units, num_kv_heads, columns, HEAD_DIM] and part_lses belong to `attend`, as do
// query_starts, first_units and splits. other_out, other_lse (both or neither) and out are
// [tokens, num_q_heads(, HEAD_DIM)] f32; sink_logits f32[num_q_heads].
extern "C" __global__ void __launch_bounds__(kThreads)
    merge(const float* part_outs, const float* part_lses, int columns, const int* query_starts,
          const int* first_units, const int* splits, int batch, int num_rows, int num_q_heads,
          int group, const void* value_rotation, const float* other_out, const float* other_lse,
          const float* sink_logits, float* out, float* lse) {
    __shared__ float scratch[kVectorsPerBlock * HEAD_DIM];
    const int index = blockIdx.x * kVectorsPerBlock + threadIdx.x / kLanes;
    const int lane = threadIdx.x % kLanes;
    // Lanes without a row follow the others through the rotation's exchanges.
    const bool exists = index < num_rows;
    const i64 at = exists ? index : 0;
    const int query_head = static_cast<int>(at % num_q_heads), head = query_head / group;
    const int token = static_cast<int>(at / num_q_heads);
    const int sequence = sequence_of(query_starts, batch, token);
    const int column = (token - query_starts[sequence]) * group + query_head % group;
    const int parts = splits[sequence];

    Merged merged;
    merged.top = MINUS_INFINITY;
    merged.mass = 0.0f;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) merged.sum[j][e] = 0.0f;
    }
    for (int part = 0; part < parts; ++part) {
        const i64 unit = first_units[sequence] + column / columns * parts + part;
        const i64 row = (unit * (num_q_heads / group) + head) * columns + column % columns;
        merged.add(part_outs + row * HEAD_DIM, part_lses[row], lane);
    }
    if constexpr (ValueForm::exact == 0) {
        unrotate<kDense<ValueForm>>(value_rotation, head, merged.sum, lane,
                                    scratch + threadIdx.x / kLanes * HEAD_DIM);
    }
    if (!exists) return;
    if (other_out != nullptr) merged.add(other_out + at * HEAD_DIM, other_lse[at], lane);
    if (sink_logits != nullptr) merged.admit(sink_logits[query_head] * 1.44269504f);
    const bool none = merged.top == MINUS_INFINITY;
    const float inverse = none ? 0.0f : 1.0f / merged.mass;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int i = 8 * (lane + kLanes * j) + e;
            if (i < HEAD_DIM) out[at * HEAD_DIM + i] = merged.sum[j][e] * inverse;
        }
    }
    if (lane == 0) {
        lse[at] = none ? MINUS_INFINITY : (merged.top + lg2(merged.mass)) * 0.693147181f;
    }
}
