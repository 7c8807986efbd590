// One warp's share of a store: fetch vectors, round them, encode or copy them into pages.
//
// what      the body that `store` (tokens from the model) and `seal` (tokens from rings) share
// mapping   kLanes lanes per vector, the two tokens of a pair in neighbouring lane groups, so that
//           interleaved values are written as words when both are there
// bytes     reads the vector, writes its token's planes
// host twin pagedtq/backends/page_writer.py (write)

#pragma once

#include "codec.cuh"

// Floats of shared memory that the block needs.
constexpr bool kScratch = kOdd > 1 || kDense<KeyForm> || kDense<ValueForm> ||
                          KeyForm::qjl == QJL_GAUSSIAN;
constexpr int kScratchFloats = kScratch ? kVectorsPerBlock * HEAD_DIM : 1;

// A search keeps the best codes so far beside those it tries.
constexpr bool kSearch = KeyForm::scale == SCALE_SEARCHED || ValueForm::scale == SCALE_SEARCHED;

// Wider codes, searches, and residuals of mixed radices, need more registers than that many blocks
// leave.
constexpr int kAppendBlocks = kSearch ? (kOdd > 1 || kBlocks < 4 ? 2 : 4)
                              : KeyForm::bits > 4 || ValueForm::bits > 4     ? kBlocks > 3 ? 4 : 2
                              : KeyForm::qjl != QJL_NONE && kOdd > 1 && kBlocks > 5 ? 5
                                                                                    : kBlocks;

// The vector a lane group works on: tokens of a pair are neighbours, heads come next.
struct Item {
    int token, head, lane;
    bool exists;
};

DEVICE Item item_of_thread(int num_tokens, int num_heads) {
    const u32 index = blockIdx.x * kVectorsPerBlock + threadIdx.x / kLanes;
    const u32 pair = index / 2 / num_heads;
    const u32 token = 2 * pair + index % 2;
    Item item;
    item.head = static_cast<int>(index / 2 - pair * num_heads);
    item.exists = token < static_cast<u32>(num_tokens);
    item.token = item.exists ? static_cast<int>(token) : 0;
    item.lane = threadIdx.x % kLanes;
    return item;
}

// Whether the lane group next door holds the other token of the same pair of slots.
DEVICE bool is_joined(i64 slot) {
    if constexpr (kLanes >= WARP_SIZE) return false;
    const i64 other = shfl_xor(slot, kLanes & 31);
    return slot >= 0 && other >= 0 && slot / 2 == other / 2;
}

// Read one vector at `row`, of type `from`, and put it into its page.
template <class Form, int from>
DEVICE void append(const u8* row, bool aligned, const Tables& tables, const Target& to, int head,
                   int lane, float* scratch) {
    Elements x;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
        const int chunk = lane + kLanes * j;
        const bool here = to.active && chunk < kChunks;
        // Read apart from `x`: otherwise some specialisations keep a copy of it in local memory.
        float given[8];
        if (here) read_chunk<from>(row, chunk, HEAD_DIM, aligned, given);
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            float one = here ? given[e] : 0.0f;
            if constexpr (from != KV_DTYPE) one = round_to<KV_DTYPE>(one);
            // Rounding to f16 saturates; scratch pages of a chunk may hold larger magnitudes.
            if constexpr (Form::exact == F16 && KV_DTYPE != F16) {
                one = fminf(fmaxf(one, -65504.0f), 65504.0f);
            }
            if constexpr (Form::exact != 0) one = round_to<Form::exact>(one);
            x[j][e] = one;
        }
    }
    if constexpr (Form::exact != 0) {
        if (!to.active) return;
        u8* place = to.place.row(Form::codes_at, Form::row);
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
            const int chunk = lane + kLanes * j;
            if (chunk < kChunks) {
                write_chunk<Form::exact>(place, chunk, HEAD_DIM, HEAD_DIM % 8 == 0, x[j]);
            }
        }
    } else {
        encode<Form>(x, tables, to, head, lane, scratch);
    }
}
