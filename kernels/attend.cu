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
// Specialised by HEAD_DIM, KEY_FORMAT, VALUE_FORMAT (streams.cuh), KEY_PROD, COLUMN_TILES (8 query
// rows each), SOFT_CAP and TILE_TOKENS (16, 32 or 64, at most the page size). Page size, strides,
// group and number of pages are run-time values.
//
// Numbers. A query row is f16 times a power of two; scores are log2 of weights. With r the running
// reference of a row, weights 2^(s - r) are at most 2^(14 - e), where 2^e bounds the value norms
// seen: weight times norm then fills the range of f16 and a long tail does not underflow. Tiles
// that are not readable throughout (ends of the ranges, causal edges) take a masked path first,
// all others the loop with loads one tile ahead. Slots that were never written may hold NaN: what
// a mask excludes is replaced, never multiplied by zero. The null page is not read.

#include "streams.cuh"

#define WARPS 4
#define COLUMNS (8 * COLUMN_TILES)
#define SUBTILES (TILE_TOKENS / 16)
#define PADDED_DIM ((HEAD_DIM + 15) / 16 * 16)
#define OUTPUT_TILES (PADDED_DIM / 16)

typedef Keys<KEY_FORMAT, HEAD_DIM> KeyRow;
typedef Values<VALUE_FORMAT, HEAD_DIM> ValueRow;

constexpr bool kKeyNorms = !is_exact(KEY_FORMAT);
constexpr bool kValueNorms = !is_exact(VALUE_FORMAT);

// Blocks that share a multiprocessor: three where 168 registers do without spilling, which depends
// on the architecture's scheduling.
#ifndef __CUDA_ARCH__
#define __CUDA_ARCH__ 900
#endif
#if COLUMN_TILES == 1 && !KEY_PROD && !SOFT_CAP && HEAD_DIM <= 128 && \
    (__CUDA_ARCH__ == 900 || __CUDA_ARCH__ >= 1200)
#define BLOCKS 3
#else
#define BLOCKS 2
#endif

// Everything of a launch that is no array.
struct AttendShape {
    i64 page_stride, head_stride;
    StreamPlanes keys, values;
    Table key_table, value_table;
    u32 qjl_signs, residual_norms;
    int page_shift;    // log2 of the page size
    int table_stride;  // entries of a row of the page table
    int batch;
    int num_kv_heads;
    int group;         // query heads of a KV head
    int window_left;   // negative: none
    float soft_cap;    // with SOFT_CAP
    int has_offsets;   // key means were subtracted: `offsets` holds sm_scale * q . mean
};

// QJL signs of a token: 16-bit units, pairs of bits eight apart.
struct Sketch {
    static constexpr bool kTuned = HEAD_DIM % 64 == 0;
    static constexpr int kUnits = PADDED_DIM / 64 > 0 ? PADDED_DIM / 64 : 1;
    static constexpr int kPairs = PADDED_DIM / 8;
    static constexpr int kRow = (HEAD_DIM + 7) / 8;

    u16 units[kUnits];
    const u8* row;
    int part;

    DEVICE static const u8* source(const u8* extent, u32 plane, int token, int t) {
        return extent + (plane + token * kRow + (kTuned ? 2 * kUnits * t : 0));
    }

    DEVICE void load(const u8* source, int tokens, int t) {
        row = source + tokens * kRow;
        part = t;
        if constexpr (kTuned) {
#pragma unroll
            for (int i = 0; i < kUnits; ++i) units[i] = ldg16(row + 2 * i);
        }
    }

    // Plus or minus one in halves; lop3 0x6A is (a & b) ^ c.
    DEVICE u32 pair(int n) const {
        if constexpr (kTuned) {
            const u32 spread = prmt(units[n / 8], 0, 0x4140u);
            return lop3<0x6A>(spread << (15 - n % 8), 0x80008000u, 0xBC00BC00u);
        } else {
            u32 halves = 0;
            for (int half = 0; half < 2; ++half) {
                const int e = element(n, half, part);
                if (e < HEAD_DIM) {
                    const u32 bit = ldg8(row + e / 8) >> e % 8 & 1;
                    halves |= (bit ? 0x3C00u : 0xBC00u) << 16 * half;
                }
            }
            return halves;
        }
    }

    DEVICE static int element(int n, int half, int t) {
        if constexpr (kTuned) return 16 * (kUnits * t + n / 8) + n % 8 + 8 * half;
        return 8 * n + 2 * t + half;
    }
};

// The readable positions of a unit, and its runs of tiles; in shared memory, so that the hot loop
// need not carry them.
struct Reach {
    int low, high;    // positions [low, high) ...
    int keep, start;  // ... below keep or from start on
    struct {
        int begin, end;              // tiles of this part
        int whole_begin, whole_end;  // those of them that every row reads throughout
    } runs[2];

    DEVICE bool allows(int position) const {
        return position >= low && position < high && (position < keep || position >= start);
    }
};

// Cut the readable positions into runs of tiles, one on either side of the hole, and take part
// `part` of `parts`. Every row reads positions [floor_all, last_all]. A tile that holds ends of
// both runs belongs to the first.
DEVICE void cut_runs(Reach& reach, int floor_all, int last_all, int part, int parts) {
    const bool hole = reach.keep < reach.start;
    const int low[2] = {reach.low, max(reach.low, reach.start)};
    const int high[2] = {hole ? min(reach.high, reach.keep) : reach.high, reach.high};
    int begin[2], count[2];
    begin[0] = low[0] / TILE_TOKENS;
    count[0] = high[0] > low[0] ? (high[0] + TILE_TOKENS - 1) / TILE_TOKENS - begin[0] : 0;
    begin[1] = max(low[1] / TILE_TOKENS, count[0] > 0 ? begin[0] + count[0] : 0);
    count[1] = (high[1] + TILE_TOKENS - 1) / TILE_TOKENS - begin[1];
    if (!hole || high[1] <= low[1] || count[1] < 0) count[1] = 0;
    const i64 total = count[0] + count[1];
    const int share_begin = static_cast<int>(total * part / parts);
    const int share_end = static_cast<int>(total * (part + 1) / parts);
    for (int i = 0; i < 2; ++i) {
        auto& run = reach.runs[i];
        const int before = i ? count[0] : 0;
        run.begin = begin[i] + max(share_begin - before, 0);
        run.end = begin[i] + min(share_end - before, count[i]);
        const int inner_low = max(low[i], floor_all), inner_high = min(high[i], last_all + 1);
        run.whole_begin = min(max((inner_low + TILE_TOKENS - 1) / TILE_TOKENS, run.begin), run.end);
        run.whole_end = max(min(inner_high / TILE_TOKENS, run.end), run.whole_begin);
    }
}

// A lane's fragments of query rows: element pairs in the order of the key stream.
struct Queries {
    u32 keys[COLUMN_TILES][PADDED_DIM / 8];
#if KEY_PROD
    u32 sketch[COLUMN_TILES][PADDED_DIM / 8];
#endif
    float scale[COLUMN_TILES][2];
#if SOFT_CAP
    float offset[COLUMN_TILES][2];
#endif
};

// What the loads of `n` times 16 tokens leave in registers.
template <int n>
struct KeyTile {
    KeyRow rows[n][2];
#if KEY_PROD
    Sketch sketches[n][2];
#endif

    DEVICE void load(const u8* extent, const AttendShape& shape, int first, int g, int t) {
        const Source source = KeyRow::source(extent, shape.keys, first + g, t);
#if KEY_PROD
        const u8* sketch_plane = Sketch::source(extent, shape.qjl_signs, first + g, t);
#endif
#pragma unroll
        for (int s = 0; s < n; ++s) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = 16 * s + 8 * half;
                rows[s][half].load(source, token);
#if KEY_PROD
                sketches[s][half].load(sketch_plane, token, t);
#endif
            }
        }
    }
};

template <int n>
struct ValueTile {
    ValueRow rows[n][2];

    DEVICE void load(const u8* extent, const AttendShape& shape, int first, int g, int t) {
        const Source source = ValueRow::source(extent, shape.values, first + 2 * t, g);
#pragma unroll
        for (int s = 0; s < n; ++s) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = 16 * s + 8 * half;
                rows[s][half].load(source, token);
            }
        }
    }
};

// Norms of the same tokens. They are needed late in a tile: loading them ahead would only hold
// registers.
template <int n>
struct NormTile {
    u16 keys[n][2];
    u16 residuals[n][2];  // with KEY_PROD
    u32 values[n][2];     // of token pairs
    u32 sample;           // value norms of two tokens, all tokens over the warp

    // `norms`: two bytes per token further than the extent.
    DEVICE void load_keys(const u8* norms, const AttendShape& shape, int g, int t) {
        sample = 0;
        if constexpr (kValueNorms) {
            sample = ldg32(norms + (shape.values.norms + (4 * (4 * g + t) & (32 * n - 1))));
        }
        const u8* key_plane = norms + (shape.keys.norms + 2 * g);
        const u8* residual_plane = norms + (shape.residual_norms + 2 * g);
#pragma unroll
        for (int s = 0; s < n; ++s) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int token = 16 * s + 8 * half;
                if constexpr (kKeyNorms) keys[s][half] = ldg16(key_plane + 2 * token);
                if constexpr (KEY_PROD) residuals[s][half] = ldg16(residual_plane + 2 * token);
            }
        }
    }
    DEVICE void load_values(const u8* norms, const AttendShape& shape, int t) {
        const u8* value_plane = norms + (shape.values.norms + 4 * t);
#pragma unroll
        for (int s = 0; s < n; ++s) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                if constexpr (kValueNorms) {
                    values[s][half] = ldg32(value_plane + 2 * (16 * s + 8 * half));
                }
            }
        }
    }
};

// Scores of a tile, fragment by fragment: rows are tokens, columns query rows.
template <int n>
struct Scores {
    float at[n][COLUMN_TILES][4];
};

// The running softmax of one warp.
struct State {
    float sums[COLUMN_TILES][OUTPUT_TILES][4];
    float reference[COLUMN_TILES][2];  // log2: weights are 2^(score - reference)
    float mass[COLUMN_TILES][2];       // this lane's share
    float weight_bits;                 // 14 - e: the largest score exceeds the reference by this
    u32 norm_limit;                    // f16 bits of 2^(e + 1)
};

#define NO_SCORE (-bits_float(0x7f800000u))
// Below every score, yet finite, so that weights of what is masked are zero from the first tile on.
#define NO_REFERENCE -1e30f

DEVICE void clear(State& state) {
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int i = 0; i < OUTPUT_TILES; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) state.sums[j][i][k] = 0.0f;
        }
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            state.reference[j][c] = NO_REFERENCE;
            state.mass[j][c] = 0.0f;
        }
    }
    state.weight_bits = 14.0f;
    state.norm_limit = 0x4000u;
}

template <int subtiles>
DEVICE void score_tile(const KeyTile<subtiles>& keys, const NormTile<subtiles>& norms,
                       const Queries& queries, const StreamTable& table, float soft_cap,
                       Scores<subtiles>& scores) {
#pragma unroll
    for (int s = 0; s < subtiles; ++s) {
        float products[COLUMN_TILES][4] = {};
#pragma unroll
        for (int step = 0; step < KeyRow::kSteps; ++step) {
            u32 upper[KeyRow::kPairs], lower[KeyRow::kPairs];
            keys.rows[s][0].decode(step, table, upper);
            keys.rows[s][1].decode(step, table, lower);
#pragma unroll
            for (int n = 0; n < KeyRow::kPairs; n += 2) {
                const u32 left[4] = {upper[n], lower[n], upper[n + 1], lower[n + 1]};
                const int pair = step * KeyRow::kPairs + n;
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; ++j) {
                    mma_f16(products[j], left, queries.keys[j][pair], queries.keys[j][pair + 1]);
                }
            }
        }
        if constexpr (kKeyNorms) {
            const float upper = f16_to_f32(norms.keys[s][0]), lower = f16_to_f32(norms.keys[s][1]);
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; ++j) {
                products[j][0] *= upper, products[j][1] *= upper;
                products[j][2] *= lower, products[j][3] *= lower;
            }
        }
#if KEY_PROD
        float residual[COLUMN_TILES][4] = {};
#pragma unroll
        for (int n = 0; n < Sketch::kPairs; n += 2) {
            const Sketch &upper = keys.sketches[s][0], &lower = keys.sketches[s][1];
            const u32 left[4] = {upper.pair(n), lower.pair(n), upper.pair(n + 1), lower.pair(n + 1)};
#pragma unroll
            for (int j = 0; j < COLUMN_TILES; ++j) {
                mma_f16(residual[j], left, queries.sketch[j][n], queries.sketch[j][n + 1]);
            }
        }
        const float upper_norm = f16_to_f32(norms.residuals[s][0]);
        const float lower_norm = f16_to_f32(norms.residuals[s][1]);
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                products[j][k] += residual[j][k] * (k < 2 ? upper_norm : lower_norm);
            }
        }
#endif
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                float x = products[j][k];
#if SOFT_CAP
                // cap tanh(x / cap) = cap (1 - 2 / (1 + exp(2 x / cap))), in log2 units throughout.
                x = x * queries.scale[j][k & 1] + queries.offset[j][k & 1];
                x = 1.0f - 2.0f * ex2(-lg2(1.0f + ex2(x * (2.0f / soft_cap))));
                x *= soft_cap * 1.44269504f;
#endif
                scores.at[s][j][k] = x;
            }
        }
    }
}

// What a score must be multiplied by to be in log2 units.
DEVICE float score_scale(const Queries& queries, int j, int c) {
    return SOFT_CAP ? 1.0f : queries.scale[j][c];
}

// Follow a tile with a larger score or value norm than any before; `tile_top`: largest score of the
// lane's tokens.
DEVICE void raise_reference(State& state, float (*tile_top)[2], u32 sample) {
    const float bits = state.weight_bits;
    if constexpr (kValueNorms) {
        while (vote_any((sample & 0xffff) > state.norm_limit || (sample >> 16) > state.norm_limit)) {
            state.norm_limit += 0x0400u;
            state.weight_bits -= 1.0f;
        }
    }
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
        float decay[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float top = tile_top[j][c];
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, shfl_xor(top, lanes));
            const float reference =
                fmaxf(top, state.reference[j][c] + bits) - state.weight_bits;
            decay[c] = ex2(state.reference[j][c] - reference);
            state.reference[j][c] = reference;
            state.mass[j][c] *= decay[c];
        }
#pragma unroll
        for (int i = 0; i < OUTPUT_TILES; ++i) {
#pragma unroll
            for (int k = 0; k < 4; ++k) state.sums[j][i][k] *= decay[k & 1];
        }
    }
}

// Fold a tile's scores into the state; `weights` become right operands: halves of two tokens.
template <int subtiles>
DEVICE void weigh_tile(State& state, const Queries& queries, const Scores<subtiles>& scores,
                       u32 sample, u32 (*weights)[COLUMN_TILES][2]) {
    float tile_top[COLUMN_TILES][2];
    bool raise = false;
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            float top = fmaxf(scores.at[0][j][c], scores.at[0][j][c + 2]);
#pragma unroll
            for (int s = 1; s < subtiles; ++s) {
                top = fmaxf(top, fmaxf(scores.at[s][j][c], scores.at[s][j][c + 2]));
            }
            tile_top[j][c] = top * score_scale(queries, j, c);
            raise |= tile_top[j][c] > state.reference[j][c] + state.weight_bits;
        }
    }
    if constexpr (kValueNorms) {
        const u32 limit = state.norm_limit << 16;
        raise |= sample > (limit | 0xffff) || (sample << 16) > limit;
    }
    if (vote_any(raise)) raise_reference(state, tile_top, sample);
#pragma unroll
    for (int s = 0; s < subtiles; ++s) {
#pragma unroll
        for (int j = 0; j < COLUMN_TILES; ++j) {
            float weight[4];
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                weight[k] = ex2(scores.at[s][j][k] * score_scale(queries, j, k & 1) -
                                state.reference[j][k & 1]);
                state.mass[j][k & 1] += weight[k];
            }
            weights[s][j][0] = movmatrix_trans(h2_from(weight[0], weight[1]));
            weights[s][j][1] = movmatrix_trans(h2_from(weight[2], weight[3]));
        }
    }
}

// Add weighted values; `readable` masks token pairs of tiles that are not readable throughout.
template <bool cut, int subtiles>
DEVICE void add_values(State& state, const ValueTile<subtiles>& values,
                       const NormTile<subtiles>& norms, const StreamTable& table, u32 (*weights)[COLUMN_TILES][2],
                       const u32 (*readable)[2]) {
#pragma unroll
    for (int s = 0; s < subtiles; ++s) {
        if constexpr (kValueNorms) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                u32 pair = norms.values[s][half];
                if (cut) pair &= readable[s][half];
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; ++j) {
                    weights[s][j][half] = h2_mul(weights[s][j][half], pair);
                }
            }
        }
#pragma unroll
        for (int step = 0; step < ValueRow::kSteps; ++step) {
            u32 first[ValueRow::kPairs], second[ValueRow::kPairs];
            values.rows[s][0].decode(step, table, first);
            values.rows[s][1].decode(step, table, second);
#pragma unroll
            for (int n = 0; n < ValueRow::kPairs; n += 2) {
                u32 left[4] = {first[n], first[n + 1], second[n], second[n + 1]};
                if (cut && !kValueNorms) {
                    left[0] &= readable[s][0], left[1] &= readable[s][0];
                    left[2] &= readable[s][1], left[3] &= readable[s][1];
                }
#pragma unroll
                for (int j = 0; j < COLUMN_TILES; ++j) {
                    mma_f16(state.sums[j][(step * ValueRow::kPairs + n) / 2], left,
                            weights[s][j][0], weights[s][j][1]);
                }
            }
        }
    }
}

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
        norms.load_values(extent + 2 * first, shape, unit.t);
        Scores<1> scores;
        score_tile(keys, norms, queries, key_table, shape.soft_cap, scores);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int token = position + 8 * half + unit.g;
            const bool inside = unit.reach.allows(token);
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
        // All lanes together hold all norms once more; NaN of an unreadable one must not count.
        const u32 sample = max(norms.values[0][0] & readable[0][0] & 0xffff0000u,
                               norms.values[0][1] & readable[0][1] & 0xffff0000u) |
                           max(norms.values[0][0] & readable[0][0] & 0xffffu,
                               norms.values[0][1] & readable[0][1] & 0xffffu);
        u32 weights[1][COLUMN_TILES][2];
        weigh_tile(state, queries, scores, kValueNorms ? sample : 0, weights);
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
        norms.load_values(norm_base, shape, unit.t);
        tile = next_resident(tile + WARPS, end, unit, shape, page);
        extent = unit.extents + page * shape.page_stride;
        first = tile * TILE_TOKENS & in_page;
        norm_base = extent + 2 * first;
        u32 weights[SUBTILES][COLUMN_TILES][2];
        weigh_tile(state, queries, scores, norms.sample, weights);
        if (tile < end) keys.load(extent, shape, first, unit.g, unit.t);
        add_values<false>(state, values, norms, value_table, weights, nullptr);
        if (tile >= end) break;
        values.load(extent, shape, first, unit.g, unit.t);
    }
}

// A pair of halves of a query row; elements beyond head_dim are zero.
DEVICE u32 query_pair(const u16* row, int first, int second) {
    const u32 low = first < HEAD_DIM ? row[first] : 0, high = second < HEAD_DIM ? row[second] : 0;
    return low | high << 16;
}

// queries [tokens, num_q_heads, head_dim] f16, rotated; query_scales [tokens, num_q_heads] f32 (log2
// units per product); sketches likewise projected (KEY_PROD); offsets [tokens, num_q_heads].
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
#pragma unroll
    for (int j = 0; j < COLUMN_TILES; ++j) {
        const u16* row = query_rows + static_cast<i64>(row_index[8 * j + g]) * HEAD_DIM;
#pragma unroll
        for (int n = 0; n < PADDED_DIM / 8; ++n) {
            queries.keys[j][n] = query_pair(row, KeyRow::element(n, 0, t), KeyRow::element(n, 1, t));
        }
#if KEY_PROD
        row = sketches + static_cast<i64>(row_index[8 * j + g]) * HEAD_DIM;
#pragma unroll
        for (int n = 0; n < PADDED_DIM / 8; ++n) {
            queries.sketch[j][n] = query_pair(row, Sketch::element(n, 0, t), Sketch::element(n, 1, t));
        }
#endif
#pragma unroll
        for (int c = 0; c < 2; ++c) {
            const int row_of = row_index[8 * j + 2 * t + c];
            queries.scale[j][c] = query_scales[row_of];
#if SOFT_CAP
            queries.offset[j][c] = shape.has_offsets ? offsets[row_of] * 1.44269504f : 0.0f;
#endif
        }
    }
    const StreamTable key_table = {shape.key_table, key_entries};
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
                references[warp][8 * j + 2 * t + c] = mass > 0.0f ? state.reference[j][c] : NO_SCORE;
            }
        }
    }
    sync_block();
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
            if (warp == 0 && g == 0 && column < num_columns) {
                float value = none ? NO_SCORE : (reference + lg2(mass)) * 0.693147181f;
                if (!SOFT_CAP && shape.has_offsets) value += offsets[row_index[column]];
                lse[(static_cast<i64>(index) * shape.num_kv_heads + head) * COLUMNS + column] = value;
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
    float* target = out + (static_cast<i64>(index) * shape.num_kv_heads + head) * COLUMNS * HEAD_DIM;
    for (int at = thread; at < num_columns * HEAD_DIM; at += 32 * WARPS) {
        target[at] = merged[at / HEAD_DIM * PADDED_DIM + at % HEAD_DIM];
    }
}
