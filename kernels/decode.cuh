// Decoding one token's rows of a page into registers.
//
// what      rotated coordinates (norm times table value), QJL signs times the residual norm, and the
//           inverse rotation
// mapping   kLanes lanes per vector, chunks of 8 elements (rotation.cuh)
// bytes     reads the token's code row, sign row and norms
// host twin pagedtq/backends/page_reader.py (rows, qjl_rows), pagedtq/codec/rotation.py (inverse)

#pragma once

#include "codec.cuh"

// Read a chunk's `count` bytes of one token; what lies beyond the row is 0.
template <class Form, int count>
DEVICE u64 get_chunk(const Place& place, int plane_at, int row_bytes, int first) {
    constexpr bool words = HEAD_DIM % 16 == 0;
    const u8* row = place.stream_row<Form>(plane_at, row_bytes);
    if constexpr (Form::paired) {
        const bool odd = place.offset % 2;
        const u8* at = row + 2 * first;
        const u32 pick = odd ? 0x7531 : 0x6420;
        if constexpr (words && count == 8) {
            const uint4 v = ldg128(at - odd);
            return prmt(v.x, v.y, pick) | static_cast<u64>(prmt(v.z, v.w, pick)) << 32;
        } else if constexpr (words && count == 4) {
            const uint2 v = ldg64(at - odd);
            return prmt(v.x, v.y, pick);
        } else if constexpr (words && count == 2) {
            return prmt(ldg32(at - odd), 0, pick & 0xff) & 0xffff;
        }
        u64 bytes = 0;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            if (first + i < row_bytes) bytes |= static_cast<u64>(ldg8(at + 2 * i)) << 8 * i;
        }
        return bytes;
    } else {
        const u8* at = row + first;
        if constexpr (words && count == 8) {
            const uint2 v = ldg64(at);
            return v.x | static_cast<u64>(v.y) << 32;
        } else if constexpr (words && count == 4) {
            return ldg32(at);
        } else if constexpr (words && count == 2) {
            return ldg16(at);
        }
        u64 bytes = 0;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            if (first + i < row_bytes) bytes |= static_cast<u64>(ldg8(at + i)) << 8 * i;
        }
        return bytes;
    }
}

// The inverse of `put_codes` for one chunk, times the norm: x[e] = norm * table[code]; 0 beyond
// HEAD_DIM.
template <class Form>
DEVICE void decode_chunk(const Place& place, int chunk, float norm, const Book<Form>& book,
                         float* x) {
    constexpr int count = Form::sign_row > 0 ? 2 : Form::bits;
    const u64 bytes = get_chunk<Form, count>(place, Form::codes_at, Form::row, chunk * count);
    u32 nibbles = 0;
    if constexpr (Form::sign_row > 0) {
        constexpr int distance = Form::sign_distance;
        const int first = chunk / (2 * distance) * 2 * distance + chunk % distance * 2;
        nibbles =
            static_cast<u32>(get_chunk<Form, 2>(place, Form::signs_at, Form::sign_row, first));
        if (chunk & distance) nibbles >>= 2;
    }
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        int magnitude;
        bool negative;
        if constexpr (Form::sign_row > 0) {
            magnitude = static_cast<int>(bytes >> 2 * e & 3);
            // Bits 0, 1, 4, 5 of the byte of elements 0..3, then of 4..7.
            negative = nibbles >> (e / 4 * 8 + e % 4 / 2 * 4 + e % 2) & 1;
        } else if constexpr (Form::is_key && Form::bits == 4 && HEAD_DIM % 16 == 0) {
            magnitude = static_cast<int>(bytes >> 4 * e & 7);
            negative = bytes >> (e < 4 ? 8 * e + 7 : 8 * e - 29) & 1;
        } else {
            const int code = static_cast<int>(bytes >> Form::bits * e) & (2 * book.cells - 1);
            magnitude = code & (book.cells - 1);
            negative = code >= book.cells;
        }
        const float size = book.magnitude(magnitude);
        x[e] = 8 * chunk + e < HEAD_DIM ? mul_rn(negative ? -size : size, norm) : 0.0f;
    }
}

template <class Form>
DEVICE float stored_norm_of(const Place& place) {
    return f16_to_f32(ldg16(place.row(Form::norms_at, 2)));
}

// A lane's elements of a token, still rotated; 0 where nothing exists.
template <class Form>
DEVICE void decode(const Place& place, bool active, const Book<Form>& book, Elements& x, int lane) {
    const float norm = active ? stored_norm_of<Form>(place) : 0.0f;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
        const int chunk = lane + kLanes * j;
        if (active && chunk < kChunks) {
            decode_chunk<Form>(place, chunk, norm, book, x[j]);
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e) x[j][e] = 0.0f;
        }
    }
}

// Prod: the residual norm with the stored signs.
template <class Form>
DEVICE void decode_signs(const Place& place, bool active, Elements& x, int lane) {
    const float gamma = active ? f16_to_f32(ldg16(place.row(Form::residual_norms_at, 2))) : 0.0f;
    const u8* row = place.row(Form::qjl_at, kChunks);
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
        const int chunk = lane + kLanes * j;
        const u32 byte = active && chunk < kChunks ? ldg8(row + chunk) : 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const float signed_norm = byte >> e & 1 ? gamma : -gamma;
            x[j][e] = active && exists(lane, j, e) ? signed_norm : 0.0f;
        }
    }
}

// x becomes R^T x. `table`: sign bits, or for dense rotations the orthogonal matrices in float64.
template <bool dense>
DEVICE void unrotate(const void* table, int head, Elements& x, int lane, float* scratch) {
    if constexpr (dense) {
        const double* matrices = static_cast<const double*>(table);
        multiply<double, true>(matrices + static_cast<i64>(head) * HEAD_DIM * HEAD_DIM, x, lane,
                               scratch);
    } else {
        const float scale = bits_float(INVERSE_ROOT_BITS);
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
#pragma unroll
            for (int e = 0; e < 8; ++e) x[j][e] = mul_rn(x[j][e], scale);
        }
        // The transform is symmetric, so its inverse is itself with the signs last.
        hadamard(x, lane);
        if constexpr (kOdd > 1) hartley_parts(x);
        apply_signs(static_cast<const u8*>(table) + head * kChunks, x, lane);
    }
}
