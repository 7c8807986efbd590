// Attention of queries over coded (or exact) pages, one part of a sequence at a time.
//
// what      one partial state (out in the space of the stored values, lse of true logits) per unit:
//           a sequence, up to COLUMNS query rows of one KV head, and a share of its token tiles
// mapping   grid (units, KV heads), 128 threads: four warps take every fourth tile of TILE_TOKENS
//           tokens. Keys and values are the left operand of mma.m16n8k16 (16 tokens, or 16
//           channels, against 8 query rows), so a page is read and decoded once for a whole group
// bytes     reads each readable extent once per unit; writes (head_dim + 1) * 4 per query row
// host twin pagedtq/backends/host_attend.py (PageAttention.attend), normalised per part as there
//
// Specialised by HEAD_DIM, KEY_FORMAT, VALUE_FORMAT (formats.cuh), KEY_PROD, COLUMN_TILES (8 query
// rows each), SOFT_CAP, TILE_TOKENS (16, 32 or 64, at most the page size), KEY_INT8, VALUE_INT8 and
// CUDA_CORES. Page size, strides, group and number of pages are run-time values.
//
// KEY_INT8 multiplies keys of width 2, 3 or 4 as unsigned bytes (mma.m16n8k32, exact integer sums):
// table values are half-integers j + 1/2, so a code decodes to the byte 128 + j or 127 - j with one
// permutation for four codes instead of four. A query row becomes integers of 15 bits, each in two
// signed bytes with a product of its own: as many matrix instructions as with halves, and an error
// of at most 6e-5 of the row's largest element, below that of halves. On sm_90, head dim 128, per
// element (instructions / integer pipe): k3v3 2.36 / 1.67 becomes 2.07 / 1.30, k2v2 2.71 / 1.42
// becomes 2.10 / 1.07. VALUE_INT8 multiplies values of these widths as bytes: byte_values.cuh.
//
// Numbers. A query row is f16 times a power of two; scores are log2 of weights. With r the running
// reference of a row, weights 2^(s - r) are at most 2^(14 - e), where 2^e bounds the value norms
// seen: weight times norm then fills the range of f16 and a long tail does not underflow. Tiles
// that are not readable throughout (ends of the ranges, causal edges) take a masked path first,
// all others the loop with loads one tile ahead (up to head dim 256: rows.cuh). Slots that were
// never written may hold NaN: what a mask excludes is replaced, never multiplied by zero. The null
// page is not read.

#if VALUE_INT8
#include "byte_values.cuh"
#else
#include "half_values.cuh"
#endif

// Blocks that share a multiprocessor: three where 168 registers do without spilling, which depends
// on how the compiler schedules for an architecture.
#if COLUMN_TILES > 1 || KEY_PROD || SOFT_CAP || HEAD_DIM > 128 || KEY_FORMAT > 8 || \
    VALUE_FORMAT > 8 || CUDA_CORES || (VALUE_INT8 && KEY_FORMAT + VALUE_FORMAT > 4) ||         \
    (HEAD_DIM % 64 != 0 && KEY_FORMAT == 3 && VALUE_FORMAT == 3)
#define BLOCKS 2
#elif defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ / 100 == 10 || \
                                 (VALUE_INT8 && __CUDA_ARCH__ / 100 == 12))
#define BLOCKS 2
#else
#define BLOCKS (is_tuned(KEY_FORMAT, HEAD_DIM) && is_tuned(VALUE_FORMAT, HEAD_DIM) ? 3 : 2)
#endif

struct Unit {
    const u8* extents;       // of this KV head, page 0
    const int* table;        // the sequence's row of the page table
    const Reach& reach;
    const int *last, *floor;  // per column, in shared memory
    int warp, g, t;
};

// Tiles [begin, end), 16 tokens of this warp at a time, position by position.
DEVICE void attend_cut(int begin, int end, const Unit& unit, const AttendShape& shape,
                       const Queries& queries, const StreamTable& key_table,
                       const StreamTable& value_table, State& state) {
#pragma unroll 1
    for (int tile = begin * SUBTILES + unit.warp; tile < end * SUBTILES; tile += WARPS) {
        const int position = 16 * tile;
        bool any = false;
        u32 readable[1][2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int pair = position + 8 * half + 2 * unit.t;
            readable[0][half] = (unit.reach.allows(pair) ? 0xffffu : 0u) |
                                (unit.reach.allows(pair + 1) ? 0xffff0000u : 0u);
            any |= readable[0][half] != 0;
        }
        // Nothing of a page is touched, nor its entry of the table, but for readable positions.
        if (!vote_any(any)) continue;
        const int page = unit.table[position >> shape.page_shift];
        if (page == 0) continue;
        const u8* extent = unit.extents + page * shape.page_stride;
        const int first = position & ((1 << shape.page_shift) - 1);
        KeyTile<1> keys;
        ValueTile<1> values;
        NormTile<1> norms;
        keys.load(extent, shape, first, unit.g, unit.t);
        values.load(extent, shape, first, unit.g, unit.t);
        norms.load_keys(extent + 2 * first, shape, unit.g, unit.t);
        norms.load_values(extent + 2 * first, shape, unit.g, unit.t);
        Scores<1> scores;
        score_tile(keys, norms, queries, key_table, shape.soft_cap, scores);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = position + 8 * half + unit.g;
            const bool inside = unit.reach.allows(token);
            if (VALUE_INT8 && !inside) norms.values[0][half] = 0;
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
                for (int c = 0; c < 2; ++c) {
                    const int column = 8 * j + 2 * unit.t + c;
                    const bool seen =
                        inside && token <= unit.last[column] && token >= unit.floor[column];
                    if (!seen) scores.at[0][j][2 * half + c] = NO_SCORE;
                }
            }
        }
        if constexpr (kValueNorms && !VALUE_INT8) {
            // All lanes together hold all norms once more; NaN of an unreadable one must not count.
            norms.sample = max(norms.values[0][0] & readable[0][0] & 0xffff0000u,
                               norms.values[0][1] & readable[0][1] & 0xffff0000u) |
                           max(norms.values[0][0] & readable[0][0] & 0xffffu,
                               norms.values[0][1] & readable[0][1] & 0xffffu);
        }
        Weights<1> weights;
        weigh_tile(state, queries, scores, norms, weights);
        add_values<true>(state, values, norms, value_table, weights, readable);
    }
}

// First tile from `tile` on, in steps of WARPS, whose page is resident; `page` is its page.
DEVICE int next_resident(int tile, int end, const Unit& unit, const AttendShape& shape, int& page) {
#pragma unroll 1
    for (; tile < end; tile += WARPS) {
        page = unit.table[(tile * TILE_TOKENS) >> shape.page_shift];
        if (page != 0) break;
    }
    return tile;
}

// Tiles [begin, end) of this warp, every position of which every row reads: the hot loop.
DEVICE void attend_whole(int begin, int end, const Unit& unit, const AttendShape& shape,
                         const Queries& queries, const StreamTable& key_table,
                         const StreamTable& value_table, State& state) {
    int page = 0;
    int tile = next_resident(begin + ((unit.warp - begin) & (WARPS - 1)), end, unit, shape, page);
    if (tile >= end) return;
    const int in_page = (1 << shape.page_shift) - 1;
    const u8* extent = unit.extents + page * shape.page_stride;
    int first = tile * TILE_TOKENS & in_page;
    KeyTile<SUBTILES> keys;
    ValueTile<SUBTILES> values;
    keys.load(extent, shape, first, unit.g, unit.t);
    values.load(extent, shape, first, unit.g, unit.t);
    const u8* norm_base = extent + 2 * first;
#pragma unroll 1
    while (true) {
        NormTile<SUBTILES> norms;
        norms.load_keys(norm_base, shape, unit.g, unit.t);
        Scores<SUBTILES> scores;
        score_tile(keys, norms, queries, key_table, shape.soft_cap, scores);
        norms.load_values(norm_base, shape, unit.g, unit.t);
        tile = next_resident(tile + WARPS, end, unit, shape, page);
        extent = unit.extents + page * shape.page_stride;
        first = tile * TILE_TOKENS & in_page;
        norm_base = extent + 2 * first;
        Weights<SUBTILES> weights;
        weigh_tile(state, queries, scores, norms, weights);
        if (tile < end) keys.load(extent, shape, first, unit.g, unit.t);
        add_values<false>(state, values, norms, value_table, weights, nullptr);
        if (tile >= end) break;
        values.load(extent, shape, first, unit.g, unit.t);
    }
}

// queries [tokens, num_q_heads, head_dim] f16, rotated; query_scales [tokens, num_q_heads] f32
// (log2 units per product); sketches likewise projected (KEY_PROD); offsets [tokens, num_q_heads].
// reads i64[5, batch]: kv_len, first, stop, keep, start. query_starts i32[batch + 1]. The plan:
// unit_sequences i32[units] (-1: idle), first_units and splits i32[batch]. Unit u of sequence b is
// column tile (u - first_unit) / splits, share (u - first_unit) % splits.
// out f32[units, num_kv_heads, COLUMNS, head_dim], lse f32[units, num_kv_heads, COLUMNS].
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
attend(const u8* __restrict__ pool, AttendShape shape, const int* __restrict__ block_table,
       const i64* __restrict__ reads, const int* __restrict__ query_starts,
       const u16* __restrict__ query_rows, const float* __restrict__ query_scales,
       const u16* __restrict__ sketches, const float* __restrict__ offsets,
       const u16* __restrict__ key_entries, const u16* __restrict__ value_entries,
       const int* __restrict__ unit_sequences, const int* __restrict__ first_units,
       const int* __restrict__ splits, float* __restrict__ out, float* __restrict__ lse) {
    __shared__ int last[COLUMNS], floor[COLUMNS], row_index[COLUMNS];
    __shared__ Reach reach;
    __shared__ float references[WARPS][COLUMNS], masses[WARPS][COLUMNS];
    __shared__ float merged[COLUMNS * PADDED_DIM];
    __shared__ __align__(16) QueryStore store;
    __shared__ float shifts[COLUMNS];

    const int index = blockIdx.x, head = blockIdx.y, thread = threadIdx.x;
    const int sequence = unit_sequences[index];
    if (sequence < 0) return;
    const int lane = lane_id(), g = lane >> 2, t = lane & 3, warp = thread / WARP_SIZE;
    const int parts = splits[sequence], local = index - first_units[sequence];
    const int query_begin = query_starts[sequence];
    const int num_queries = query_starts[sequence + 1] - query_begin;
    const int first_column = local / parts * COLUMNS, part = local % parts;
    const int num_columns = min(COLUMNS, num_queries * shape.group - first_column);
    const int length = static_cast<int>(reads[sequence]);

    if (thread < COLUMNS) {
        // Columns beyond the last repeat it; their results are not written.
        const int column = first_column + min(thread, num_columns - 1);
        const int token = column / shape.group;
        last[thread] = length - num_queries + token;
        floor[thread] = shape.window_left < 0 ? 0 : max(last[thread] - shape.window_left, 0);
        row_index[thread] = ((query_begin + token) * shape.num_kv_heads + head) * shape.group +
                            column % shape.group;
    }
    sync_block();
    if (thread == 0) {
        // Rows follow each other in position: the first ends first, the last begins last.
        reach.low = max(static_cast<int>(reads[shape.batch + sequence]), floor[0]);
        reach.high =
            min(static_cast<int>(reads[2 * shape.batch + sequence]), last[COLUMNS - 1] + 1);
        reach.keep = static_cast<int>(reads[3 * shape.batch + sequence]);
        reach.start = static_cast<int>(reads[4 * shape.batch + sequence]);
        cut_runs(reach, floor[COLUMNS - 1], last[0], part, parts);
    }
    sync_block();

    const Unit unit = {pool + head * shape.head_stride,
                       block_table + static_cast<i64>(sequence) * shape.table_stride,
                       reach, last, floor, warp, g, t};
    Queries queries;
    load_queries(queries, shape, query_rows, query_scales, sketches, row_index, store, shifts, g,
                 t);
#if SOFT_CAP
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const float offset = shape.has_offsets ? offsets[row_index[8 * j + 2 * t + c]] : 0.0f;
            queries.offset[j][c] = offset * 1.44269504f;
        }
    }
#endif
    const StreamTable key_table = key_table_of(shape, key_entries);
    const StreamTable value_table = {shape.value_table, value_entries};
    State state;
    clear(state);

#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        const auto& run = reach.runs[i];
        attend_whole(run.whole_begin, run.whole_end, unit, shape, queries, key_table, value_table,
                     state);
#pragma unroll 1
        for (int side = 0; side < 2; ++side) {
            attend_cut(side ? run.whole_end : run.begin, side ? run.end : run.whole_begin, unit,
                       shape, queries, key_table, value_table, state);
        }
    }

    complete(state);
    // The four warps' states become one, in the order of the warps.
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float mass = state.mass[j][c];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) mass += shfl_xor(mass, lanes);
            if (g == 0) {
                masses[warp][8 * j + 2 * t + c] = mass;
                references[warp][8 * j + 2 * t + c] =
                    mass > 0.0f ? state.reference[j][c] : NO_SCORE;
            }
        }
    }
    sync_block();
    const i64 first_row = (static_cast<i64>(index) * shape.num_kv_heads + head) * COLUMNS;
    float factor[COLUMN_TILES][2];
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int column = 8 * j + 2 * t + c;
            float reference = references[0][column], mass = 0.0f;
#pragma unroll
            for (int w = 1; w < WARPS; ++w) reference = fmaxf(reference, references[w][column]);
            const bool none = reference == NO_SCORE;
            if (none) reference = 0.0f;
#pragma unroll
            for (int w = 0; w < WARPS; ++w) {
                mass += masses[w][column] * ex2(references[w][column] - reference);
            }
            factor[j][c] = none ? 0.0f : ex2(references[warp][column] - reference) / mass;
            if (VALUE_INT8) factor[j][c] *= shape.value_unit;
            if (warp == 0 && g == 0 && column < num_columns) {
                float value = none ? NO_SCORE : (reference + lg2(mass)) * 0.693147181f;
                if (!SOFT_CAP && shape.has_offsets) value += offsets[row_index[column]];
                lse[first_row + column] = value;
            }
        }
    }
#pragma unroll 1
    for (int turn = 0; turn < WARPS; ++turn) {
        if (turn == warp) {
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
                for (int i = 0; i < OUTPUT_TILES; ++i) {
#pragma unroll
                    for (int k = 0; k < 4; ++k) {
                        const int channel = ValueRow::channel(2 * i + (k >> 1), g);
                        float& sum = merged[(8 * j + 2 * t + (k & 1)) * PADDED_DIM + channel];
                        const float mine = state.sums[j][i][k] * factor[j][k & 1];
                        sum = turn == 0 ? mine : sum + mine;
                    }
                }
            }
        }
        sync_block();
    }
    float* target = out + first_row * HEAD_DIM;
    for (int at = thread; at < num_columns * HEAD_DIM; at += 32 * WARPS) {
        target[at] = merged[at / HEAD_DIM * PADDED_DIM + at % HEAD_DIM];
    }
}
