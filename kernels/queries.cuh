// Query rows as right operands of a tile's key products.
//
// what      fragments of query rows, as halves or as bytes (KEY_INT8), in registers or, where
//           those are scarce, in shared memory
// mapping   fragments: columns are query rows; all warps of a block hold the same
// bytes     a block's query rows, once
// host twin pagedtq/backends/host_attend.py (Rows)
//
// The macros of a specialisation are explained in attend.cu.

#pragma once

#include "matrix.cuh"
#include "tiles.cuh"

// What keys decode with.
DEVICE StreamTable key_table_of(const AttendShape& shape, const u16* entries) {
#if KEY_INT8
    return {{{0, 0}, {shape.key_bytes[0], shape.key_bytes[1]}}, entries};
#else
    return {shape.key_table, entries};
#endif
}

#if KEY_INT8
static_assert(KEY_FORMAT >= 2 && KEY_FORMAT <= 4 && is_tuned(KEY_FORMAT, HEAD_DIM) && !KEY_PROD,
              "KEY_INT8 takes keys of width 2, 3 or 4 whose rows divide among the lanes");
// Sums of 255 * 2^14 * HEAD_DIM fit in 32 bits.
static_assert(HEAD_DIM <= 256, "KEY_INT8 takes head dims up to 256");
// Query rows are at most 2^10, which rounding to halves may reach (rotate_queries.cu). Times this
// they are integers 128 a + b with a in [-127, 127] and b in [-64, 63].
#define BYTE_QUERY_SCALE 15.875f
#define QUERY_TERMS 2
#define QUERY_STEPS (HEAD_DIM / 32)
#else
#define QUERY_TERMS 1
#define QUERY_STEPS (PADDED_DIM / 16)
#endif

// Fragments take PADDED_DIM / 8 registers per column tile. Beside them stand sums, twice as many; a
// tile's keys and values, up to as many as the sums; temporaries of decoding element by element; and
// integer sums (VALUE_INT8), with which three blocks fit for codes of 2 bits alone, up to 128 channels.
// Loops that are not unrolled (rows.cuh) find them in shared memory alone.
constexpr bool kQueriesShared = (VALUE_INT8 && VALUE_FORMAT == 2 && KEY_FORMAT == 2) ||
                                (VALUE_INT8 && PADDED_DIM > 192) ||
                                COLUMN_TILES * PADDED_DIM > 256 ||
                                !is_tuned(KEY_FORMAT, HEAD_DIM) ||
                                !is_tuned(VALUE_FORMAT, HEAD_DIM) ||
                                (PADDED_DIM > 192 && is_exact(VALUE_FORMAT)) ||
                                (KEY_PROD && !Sketch::kTuned);

// Words of all column tiles, and of both terms of a row (KEY_INT8), for one matrix instruction each.
#define STEP_WORDS (2 * COLUMN_TILES * QUERY_TERMS)
#define SKETCH_WORDS (2 * COLUMN_TILES)

// `steps` times `words` of a lane; `put` fills `count` words of a step from word `first` on.
template <int steps, int words, bool shared>
struct Fragments {
    u32 own[steps][words];
    template <int count>
    DEVICE void put(int step, int first, const u32* from, u32*) {
#pragma unroll
        for (int i = 0; i < count; ++i) own[step][first + i] = from[i];
    }
    DEVICE void get(int step, u32* to) const {
#pragma unroll
        for (int i = 0; i < words; ++i) to[i] = own[step][i];
    }
};

// Units of 16 bytes (or of 8, where a step has no more), lane beside lane.
template <int steps, int words>
struct Fragments<steps, words, true> {
    static constexpr int kUnit = words < 4 ? words : 4;
    const u32* lane;
    template <int count>
    DEVICE void put(int step, int first, const u32* from, u32* store) {
        lane = store + kUnit * lane_id();
        if (threadIdx.x >= WARP_SIZE) return;
#pragma unroll
        for (int i = first; i < first + count; ++i) {
            store[(step * (words / kUnit) + i / kUnit) * kUnit * WARP_SIZE + kUnit * lane_id() +
                  i % kUnit] = from[i - first];
        }
    }
    DEVICE void get(int step, u32* to) const {
#pragma unroll
        for (int unit = 0; unit < words / kUnit; ++unit) {
            const u32* from = lane + (step * (words / kUnit) + unit) * kUnit * WARP_SIZE;
            if constexpr (kUnit == 4) {
                const uint4 v = lds128(from);
                to[4 * unit] = v.x, to[4 * unit + 1] = v.y;
                to[4 * unit + 2] = v.z, to[4 * unit + 3] = v.w;
            } else {
                const uint2 v = lds64(from);
                to[0] = v.x, to[1] = v.y;
            }
        }
    }
};

// What of a block's query rows lies in shared memory.
struct QueryStore {
    u32 words[kQueriesShared ? QUERY_STEPS * STEP_WORDS * WARP_SIZE : 4];
    u32 sketch[kQueriesShared && KEY_PROD ? PADDED_DIM / 16 * SKETCH_WORDS * WARP_SIZE : 4];
};

// A lane's fragments of query rows: elements in the order of the key stream.
struct Queries {
    Fragments<QUERY_STEPS, STEP_WORDS, kQueriesShared> words;
#if KEY_INT8
    // -127.5 times the sum of a row's integers. Width 2 has no registers left for it.
#if KEY_FORMAT == 2
    const float* shift;  // in shared memory
    DEVICE float shift_of(int j, int c) const { return shift[8 * j + c]; }
#else
    float shift[COLUMN_TILES][2];
    DEVICE float shift_of(int j, int c) const { return shift[j][c]; }
#endif
#endif
#if KEY_PROD
    Fragments<PADDED_DIM / 16, SKETCH_WORDS, kQueriesShared> sketch;
#endif
    float scale[COLUMN_TILES][2];
#if SOFT_CAP
    float offset[COLUMN_TILES][2];
#endif
};

// A pair of halves of a query row; elements beyond head_dim are zero.
DEVICE u32 query_pair(const u16* row, int first, int second) {
    const u32 low = first < HEAD_DIM ? row[first] : 0, high = second < HEAD_DIM ? row[second] : 0;
    return low | high << 16;
}

#if KEY_INT8
// A row's bytes for quad n, and the sum of their integers.
DEVICE int query_quad(const u16* row, int n, int t, u32& high, u32& low) {
    int sum = 0;
    high = low = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float x = f16_to_f32(row[KeyRow::quad_element(n, i, t)]);
        const int whole = round_to_int(x * BYTE_QUERY_SCALE), upper = (whole + 64) >> 7;
        high |= (static_cast<u32>(upper) & 255u) << 8 * i;
        low |= (static_cast<u32>(whole - upper * 128) & 255u) << 8 * i;
        sum += whole;
    }
    return sum;
}
#endif

// Fragments and scales of a block's rows, whose indices lie in shared memory, as do `store` and
// `shifts`. All threads of the block call it.
DEVICE void load_queries(Queries& queries, const AttendShape& shape, const u16* rows,
                         const float* scales, const u16* sketches, const int* row_index,
                         QueryStore& store, float* shifts, int g, int t) {
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
        const i64 start = static_cast<i64>(row_index[8 * j + g]) * HEAD_DIM;
        const u16* row = rows + start;
#pragma unroll
        for (int c = 0; c < 2; ++c) queries.scale[j][c] = scales[row_index[8 * j + 2 * t + c]];
#if KEY_INT8
        int sum = 0;
#endif
#pragma unroll
        for (int step = 0; step < QUERY_STEPS; ++step) {
            u32 words[2 * QUERY_TERMS];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int n = 2 * step + i;
#if KEY_INT8
                sum += query_quad(row, n, t, words[i], words[2 + i]);
#else
                words[i] = query_pair(row, KeyRow::element(n, 0, t), KeyRow::element(n, 1, t));
#endif
            }
            queries.words.put<2 * QUERY_TERMS>(step, 2 * QUERY_TERMS * j, words, store.words);
        }
#if KEY_PROD
        const u16* sketch = sketches + start;
#pragma unroll
        for (int step = 0; step < PADDED_DIM / 16; ++step) {
            u32 words[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int n = 2 * step + i;
                words[i] = query_pair(sketch, Sketch::element(n, 0, t), Sketch::element(n, 1, t));
            }
            queries.sketch.put<2>(step, 2 * j, words, store.sketch);
        }
#endif
#if KEY_INT8
        // Lanes 4 g to 4 g + 3 share row g, which is column g of the products.
        sum += shfl_xor(sum, 1);
        sum += shfl_xor(sum, 2);
#if KEY_FORMAT == 2
        if (threadIdx.x < WARP_SIZE && t == 0) shifts[8 * j + g] = -127.5f * static_cast<float>(sum);
#endif
#pragma unroll
        for (int c = 0; c < 2; ++c) {
#if KEY_FORMAT != 2
            queries.shift[j][c] = -127.5f * static_cast<float>(shfl_idx(sum, 4 * (2 * t + c)));
#endif
            queries.scale[j][c] *= shape.key_unit * (1.0f / BYTE_QUERY_SCALE);
        }
#endif
    }
#if KEY_INT8 && KEY_FORMAT == 2
    queries.shift = shifts + 2 * t;
#endif
    if constexpr (kQueriesShared || (KEY_INT8 && KEY_FORMAT == 2)) sync_block();
}
