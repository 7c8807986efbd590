// Exact attention over sinks and ring: the tokens of a sequence that the window keeps as they came.
//
// what      out, lse of every query row over sink positions [0, first) and ring positions
//           [stop, kv_len); position p lies in sink row p and in ring row p % window_rows
// mapping   a warp per query row, lanes over channels; 128 threads
// bytes     keys and values of the row's positions once per query head of a group (neighbouring
//           warps, so mostly from cache); (HEAD_DIM + 1) * 4 out
// host twin WindowStore.attend (pagedtq/backends/host_window.py)
//
// The window is some hundred tokens whatever the length of the sequence; no claim to speed. What
// merge.cu takes as the other state.

#include "batch.cuh"
#include "tokens.cuh"

#define WARPS 4
#define LANE_CHANNELS ((HEAD_DIM + WARP_SIZE - 1) / WARP_SIZE)
#define MINUS_INFINITY (-bits_float(0x7f800000u))
#define LOG2_E 1.44269504f

// Rows of one owner (a window slot or a sink record): [heads, 2, rows, HEAD_DIM] in kv_dtype.
struct Rows {
    const u8* base;
    int heads, rows;

    DEVICE float at(i64 owner, int head, int plane, int row, int channel) const {
        const i64 index = (((owner * heads + head) * 2 + plane) * rows + row) * HEAD_DIM + channel;
        if constexpr (KV_DTYPE == F32) return bits_float(ldg32(base + 4 * index));
        return widen<KV_DTYPE>(ldg16(base + 2 * index));
    }
};

struct Softmax {
    float sum[LANE_CHANNELS];
    float top, mass;
};

// Fold one position in; every lane of the warp calls it alike.
DEVICE void visit(Softmax& state, const float* query, const Rows& rows, i64 owner, int head,
                  int row, float scale, float soft_cap) {
    float product = 0.0f;
#pragma unroll
    for (int k = 0; k < LANE_CHANNELS; ++k) {
        const int channel = lane_id() + WARP_SIZE * k;
        if (channel < HEAD_DIM) product += query[k] * rows.at(owner, head, 0, row, channel);
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) product += shfl_xor(product, lanes);
    float score = product * scale;
    if (soft_cap > 0.0f) {
        // cap tanh(x / cap) = cap (1 - 2 / (1 + exp(2 x / cap))).
        const float growth = ex2(score * (2.0f * LOG2_E / soft_cap));
        score = soft_cap * (1.0f - 2.0f * ex2(-lg2(1.0f + growth)));
    }
    score *= LOG2_E;
    const float top = fmaxf(state.top, score);
    const float decay = ex2(state.top - top), weight = ex2(score - top);
    state.top = top;
    state.mass = state.mass * decay + weight;
#pragma unroll
    for (int k = 0; k < LANE_CHANNELS; ++k) {
        const int channel = lane_id() + WARP_SIZE * k;
        if (channel < HEAD_DIM) {
            const float value = rows.at(owner, head, 1, row, channel);
            state.sum[k] = state.sum[k] * decay + weight * value;
        }
    }
}

// queries [tokens, num_q_heads, HEAD_DIM]; reads i64[5, batch] as in attend.cu; lengths i64[batch],
// the sequences' lengths, which kv_len falls short of where the chunk is attended to apart.
// window_slots, sink_records i32[batch] (-1: none). out [tokens, num_q_heads, HEAD_DIM] f32.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    attend_window(const u8* queries, const i64* reads, const i64* lengths, const int* query_starts,
                  const int* window_slots, const int* sink_records, const u8* ring, int window_rows,
                  const u8* sinks, int sink_rows, int batch, int num_rows, int num_q_heads,
                  int num_kv_heads, float sm_scale, float soft_cap, int window_left, float* out,
                  float* lse) {
    const int at = blockIdx.x * WARPS + threadIdx.x / WARP_SIZE;
    if (at >= num_rows) return;
    const int token = at / num_q_heads, head = at % num_q_heads / (num_q_heads / num_kv_heads);
    const int sequence = sequence_of(query_starts, batch, token);
    const int last = static_cast<int>(lengths[sequence]) - query_starts[sequence + 1] + token;
    const int floor = window_left < 0 ? 0 : max(last - window_left, 0);
    const int kv_len = static_cast<int>(reads[sequence]);
    const int first = static_cast<int>(reads[batch + sequence]);
    const int stop = static_cast<int>(reads[2 * batch + sequence]);
    const int keep = static_cast<int>(reads[3 * batch + sequence]);
    const int start = static_cast<int>(reads[4 * batch + sequence]);

    float query[LANE_CHANNELS];
    Softmax state;
    state.top = MINUS_INFINITY;
    state.mass = 0.0f;
#pragma unroll
    for (int k = 0; k < LANE_CHANNELS; ++k) {
        const int channel = lane_id() + WARP_SIZE * k;
        const i64 index = static_cast<i64>(at) * HEAD_DIM + channel;
        state.sum[k] = query[k] = 0.0f;
        if (channel >= HEAD_DIM) continue;
        if constexpr (INPUT_DTYPE == F32) query[k] = bits_float(ldg32(queries + 4 * index));
        else query[k] = widen<INPUT_DTYPE>(ldg16(queries + 2 * index));
    }
    const Rows sink = {sinks, num_kv_heads, sink_rows}, recent = {ring, num_kv_heads, window_rows};
    for (int p = floor; p < min(first, last + 1); ++p) {
        if (p >= keep && p < start) continue;
        visit(state, query, sink, sink_records[sequence], head, p, sm_scale, soft_cap);
    }
    for (int p = max(stop, floor); p < min(kv_len, last + 1); ++p) {
        visit(state, query, recent, window_slots[sequence], head, p % window_rows, sm_scale,
              soft_cap);
    }
    const bool none = state.top == MINUS_INFINITY;
    const float inverse = none ? 0.0f : 1.0f / state.mass;
#pragma unroll
    for (int k = 0; k < LANE_CHANNELS; ++k) {
        const int channel = lane_id() + WARP_SIZE * k;
        const i64 index = static_cast<i64>(at) * HEAD_DIM + channel;
        if (channel < HEAD_DIM) out[index] = state.sum[k] * inverse;
    }
    if (lane_id() == 0) {
        lse[at] = none ? MINUS_INFINITY : (state.top + lg2(state.mass)) * 0.693147181f;
    }
}
