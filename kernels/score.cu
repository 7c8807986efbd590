// Inner products of one query token per sequence with its readable keys.
//
// what      scores[h, i] = <q, k> of every readable position, in position order; nothing of it is
//           scaled, and what key centring took is added back
// mapping   grid (units, KV heads), 128 threads: units as in attend.cu, a warp takes every fourth
//           tile of its part and writes 16 by 8 products at a time
// bytes     the key planes of each readable page once, 4 per query head and position out
// host twin HostLayer.score (pagedtq/backends/host_layer.py)
//
// Specialised like attend.cu (VALUE_FORMAT and SOFT_CAP do not matter). The output is ragged: the
// caller counts what is readable per block, because only the page table knows where a page is.

#include "products.cuh"

// Blocks that share a multiprocessor: four where 128 registers do without spilling.
#define BLOCKS (KEY_PROD * HEAD_DIM * COLUMN_TILES > 128 || \
                (HEAD_DIM > 128 && is_exact(KEY_FORMAT)) ? 2 : 4)

// Positions of [from, to) that are readable, pages aside.
DEVICE int count_readable(const Reach& reach, int from, int to) {
    const int low = max(from, reach.low), high = min(to, reach.high);
    if (reach.keep >= reach.start) return max(high - low, 0);
    return max(min(high, reach.keep) - low, 0) + max(high - max(low, reach.start), 0);
}

// queries and units as in attend.cu, one token each. query_offsets
// [batch, num_q_heads] is q . mean.
// sequence_starts i64[batch + 1] and block_starts i64[batch, table_stride] index a row of scores
// f32[num_q_heads, sequence_starts[batch]]; block_starts counts from the sequence's start.
extern "C" __global__ void __launch_bounds__(32 * WARPS, BLOCKS)
    score(const u8* __restrict__ pool, AttendShape shape, const int* __restrict__ block_table,
          const i64* __restrict__ reads, const u16* __restrict__ query_rows,
          const float* __restrict__ query_scales, const u16* __restrict__ sketches,
          const float* __restrict__ query_offsets, const u16* __restrict__ key_entries,
          const int* __restrict__ unit_sequences, const int* __restrict__ first_units,
          const int* __restrict__ splits, const i64* __restrict__ sequence_starts,
          const i64* __restrict__ block_starts, float* __restrict__ scores) {
    __shared__ int row_index[COLUMNS];
    __shared__ __align__(16) QueryStore store;
    __shared__ float shifts[COLUMNS];
    __shared__ Reach reach;
    const int index = blockIdx.x, head = blockIdx.y, thread = threadIdx.x;
    const int sequence = unit_sequences[index];
    if (sequence < 0) return;
    const int lane = lane_id(), g = lane >> 2, t = lane & 3, warp = thread / WARP_SIZE;
    const int parts = splits[sequence], local = index - first_units[sequence];
    const int first_column = local / parts * COLUMNS;
    const int num_columns = min(COLUMNS, shape.group - first_column);
    const int num_q_heads = shape.num_kv_heads * shape.group;

    if (thread < COLUMNS) {
        const int column = first_column + min(thread, num_columns - 1);
        row_index[thread] = (sequence * shape.num_kv_heads + head) * shape.group + column;
    }
    if (thread == 0) {
        reach.low = static_cast<int>(reads[shape.batch + sequence]);
        reach.high = static_cast<int>(reads[2 * shape.batch + sequence]);
        reach.keep = static_cast<int>(reads[3 * shape.batch + sequence]);
        reach.start = static_cast<int>(reads[4 * shape.batch + sequence]);
        cut_runs(reach, 0, reach.high, local % parts, parts);
    }
    sync_block();

    Queries queries;
    load_queries(queries, shape, query_rows, query_scales, sketches, row_index, store, shifts, g,
                 t);
    const StreamTable table = key_table_of(shape, key_entries);
    const i64 total = sequence_starts[shape.batch];
    const i64 sequence_start = sequence_starts[sequence];
    const i64 table_row = static_cast<i64>(sequence) * shape.table_stride;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
#pragma unroll 1
        for (int tile = reach.runs[i].begin * SUBTILES + warp; tile < reach.runs[i].end * SUBTILES;
             tile += WARPS) {
            const int position = 16 * tile;
            if (count_readable(reach, position, position + 16) == 0) continue;
            const int block = position >> shape.page_shift;
            const int page = block_table[table_row + block];
            if (page == 0) continue;
            const u8* extent = pool + head * shape.head_stride + page * shape.page_stride;
            const int first = position & ((1 << shape.page_shift) - 1);
            KeyTile<1> keys;
            NormTile<1> norms;
            keys.load(extent, shape, first, g, t);
            norms.load_keys(extent + 2 * first, shape, g, t);
            Scores<1> products;
            score_tile(keys, norms, queries, table, 0.0f, products);
            const i64 block_start = sequence_start + block_starts[table_row + block];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = position + 8 * half + g;
                if (!reach.allows(token)) continue;
                const i64 at =
                    block_start + count_readable(reach, block << shape.page_shift, token);
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
                    for (int c = 0; c < 2; ++c) {
                        const int column = 8 * j + 2 * t + c;
                        if (column >= num_columns) continue;
                        const int row = row_index[column];
                        const float natural = queries.scale[j][c] * 0.693147181f;
                        const float offset = shape.has_offsets ? query_offsets[row] : 0.0f;
                        scores[(row - sequence * num_q_heads) * total + at] =
                            products.at[0][j][2 * half + c] * natural + offset;
                    }
                }
            }
        }
    }
}
