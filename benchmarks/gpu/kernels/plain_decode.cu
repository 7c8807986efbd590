// Decode attention over plain pages, bfloat16 or e4m3: what compressed pages are compared with.
//
// what      one query token per sequence against its pages: softmax(q k / sqrt(d)) v
// mapping   grid (units, KV heads), 128 threads. A unit is a run of tokens of one sequence; its four
//           warps take every fourth group of PASS tokens. Keys and values are the left operand of
//           mma.m16n8k16 (16 tokens, or 16 channels, against the up to 8 query heads of the group),
//           so a page is read once for a whole group. Raw 16-byte loads to registers, one pass ahead
// bytes     2 * HEAD_DIM * (KV_FP8 ? 1 : 2) per token and head, once; (HEAD_DIM + 1) * 4 per query
//           row and unit where a sequence is cut
// host twin float64 attention in tests/simt/test_plain_decode.py
//
// Pages are [pages, KV heads, page size, HEAD_DIM], keys and values in a pool each. Units come from
// a plan on the host (plain_decode.py). A sequence of one unit is finished here; `merge_units` sums
// the others.

#include "plain_rows.cuh"

// Queries are bf16 [batch, num_kv_heads * group, HEAD_DIM]. units int32 [n, 4]: sequence, begin (a
// multiple of kPass), end, and where its partial state goes (-1: it is the whole sequence).
// score_scale is sm_scale * log2(e) * key scale. Partial states are f32 [parts, num_kv_heads,
// COLUMNS(, HEAD_DIM)], log2 of masses; out is f32 [batch, num_kv_heads * group, HEAD_DIM].
extern "C" __global__ void __launch_bounds__(32 * WARPS, 3)
    plain_decode(const u8* keys, const u8* values, const u16* queries, const int* block_table,
                 int table_stride, int page_shift, int group, float score_scale, float value_scale,
                 const int* units, float* part_outs, float* part_masses, float* out) {
    __shared__ float sums_of[WARPS][COLUMNS * kPadded];
    __shared__ float masses[WARPS][COLUMNS], tops[WARPS][COLUMNS];
    const int thread = threadIdx.x, lane = lane_id(), g = lane >> 2, t = lane & 3;
    const int warp = thread / WARP_SIZE, head = blockIdx.y, num_heads = gridDim.y;
    const int* unit = units + 4 * blockIdx.x;
    const int sequence = unit[0], begin = unit[1], end = unit[2], part = unit[3], last = end - 1;
    const i64 head_bytes = static_cast<i64>(HEAD_DIM * kElement) << page_shift;
    const Pages pages = {keys, values, block_table + static_cast<i64>(sequence) * table_stride,
                         page_shift, num_heads * head_bytes, head * head_bytes};
    const i64 first_row = (static_cast<i64>(sequence) * num_heads + head) * group;

    u32 query_words[kTiles][2];
    load_queries(query_words, g < group ? queries + (first_row + g) * HEAD_DIM : nullptr, t);
    float sums[kTiles][4], mass[2] = {0.0f, 0.0f}, top[2] = {NOTHING, NOTHING};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
#pragma unroll
        for (int k = 0; k < 4; ++k) sums[i][k] = 0.0f;
    }

    Pass pass;
    int at = begin + kPass * warp;
    if (at < end) {
        load_keys(pass, pages, at, last, g, t);
        load_values(pass, pages, at, last, g, t);
    }
#pragma unroll 1
    for (; at < end; at += kPass * WARPS) {
        const int next = at + kPass * WARPS;
        float scores[kGroups][4];
#pragma unroll
        for (int r = 0; r < kGroups; ++r) {
#pragma unroll
            for (int k = 0; k < 4; ++k) scores[r][k] = 0.0f;
            score_group(scores[r], pass.keys[r], query_words);
        }
        if (next < end) load_keys(pass, pages, next, last, g, t);

        float peak[2] = {top[0], top[1]};
#pragma unroll
        for (int r = 0; r < kGroups; ++r) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                const bool read = at + 16 * r + g + 8 * (k >> 1) < end;
                scores[r][k] = read ? scores[r][k] * score_scale : NOTHING;
                peak[k & 1] = fmaxf(peak[k & 1], scores[r][k]);
            }
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) {
                peak[c] = fmaxf(peak[c], shfl_xor(peak[c], lanes));
            }
        }
        if (vote_any(peak[0] > top[0] || peak[1] > top[1])) {
            const float decay[2] = {ex2(top[0] - peak[0]), ex2(top[1] - peak[1])};
#pragma unroll
            for (int i = 0; i < kTiles; ++i) {
#pragma unroll
                for (int k = 0; k < 4; ++k) sums[i][k] *= decay[k & 1];
            }
#pragma unroll
            for (int c = 0; c < 2; ++c) mass[c] *= decay[c], top[c] = peak[c];
        }
        if (at + kPass > end) {
            // Rows that nobody wrote may hold NaN, and 0 * NaN is not 0.
#pragma unroll
            for (int r = 0; r < kGroups; ++r) {
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    if (at + 16 * r + 2 * t + (k & 1) + 8 * (k >> 1) < end) continue;
#pragma unroll
                    for (int w = 0; w < kValueWords; ++w) pass.values[r][k][w] = 0;
                }
            }
        }
#pragma unroll
        for (int r = 0; r < kGroups; ++r) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                scores[r][k] = ex2(scores[r][k] - top[k & 1]);
                mass[k & 1] += scores[r][k];
            }
            const u32 b0 = movmatrix_trans(weight_pair(scores[r][0], scores[r][1]));
            const u32 b1 = movmatrix_trans(weight_pair(scores[r][2], scores[r][3]));
            add_values(sums, pass.values[r], b0, b1);
        }
        if (next < end) load_values(pass, pages, next, last, g, t);
    }

#pragma unroll
    for (int c = 0; c < 2; ++c) {
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) mass[c] += shfl_xor(mass[c], lanes);
        if (g == 0) masses[warp][2 * t + c] = mass[c], tops[warp][2 * t + c] = top[c];
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                sums_of[warp][(2 * t + c) * kPadded + channel(i, half, g)] = sums[i][2 * half + c];
            }
        }
    }
    sync_block();
    for (int i = thread; i < group * HEAD_DIM; i += 32 * WARPS) {
        const int column = i / HEAD_DIM, at_channel = i % HEAD_DIM;
        float peak = NOTHING, total = 0.0f, sum = 0.0f;
        for (int w = 0; w < WARPS; ++w) peak = fmaxf(peak, tops[w][column]);
        for (int w = 0; w < WARPS; ++w) {
            const float weight = ex2(tops[w][column] - peak);
            total += weight * masses[w][column];
            sum += weight * sums_of[w][column * kPadded + at_channel];
        }
        const float value = sum / total * value_scale;
        if (part < 0) {
            out[(first_row + column) * HEAD_DIM + at_channel] = value;
        } else {
            const i64 row = (static_cast<i64>(part) * num_heads + head) * COLUMNS + column;
            part_outs[row * HEAD_DIM + at_channel] = value;
            if (at_channel == 0) part_masses[row] = peak + lg2(total);
        }
    }
}

// Sum the parts of cut sequences: one block per cut sequence (x) and KV head (y). cuts int32 [n, 3]:
// sequence, its first part, and the part behind its last.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
    merge_units(const int* cuts, int group, const float* part_outs, const float* part_masses,
                float* out) {
    const int* cut = cuts + 3 * blockIdx.x;
    const int head = blockIdx.y, num_heads = gridDim.y;
    const i64 first_row = (static_cast<i64>(cut[0]) * num_heads + head) * group;
    for (int i = threadIdx.x; i < group * HEAD_DIM; i += 32 * WARPS) {
        const int column = i / HEAD_DIM, at_channel = i % HEAD_DIM;
        float peak = NOTHING, total = 0.0f, sum = 0.0f;
        for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 4
            for (int part = cut[1]; part < cut[2]; ++part) {
                const i64 row = (static_cast<i64>(part) * num_heads + head) * COLUMNS + column;
                if (pass == 0) {
                    peak = fmaxf(peak, part_masses[row]);
                } else {
                    const float weight = ex2(part_masses[row] - peak);
                    total += weight;
                    sum += weight * part_outs[row * HEAD_DIM + at_channel];
                }
            }
        }
        out[(first_row + column) * HEAD_DIM + at_channel] = sum / total;
    }
}
