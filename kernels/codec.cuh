// Encoding one vector into its page: quantise, stored norm, QJL signs.
//
// what      everything between a rotated vector in registers and its codes (pack.cuh writes them)
// mapping   kLanes lanes per vector, chunks of 8 elements (rotation.cuh); lanes of absent vectors
//           take part in the shuffles and write nothing
// bytes     writes the token's code row, sign row, norm, and for Prod its QJL row and residual norm
// host twin pagedtq/codec/encoder.py (order of operations), quantize.py
//
// All arithmetic that decides bytes is *_rn.

#pragma once

#include "pack.cuh"
#include "tokens.cuh"

// What a stream's encoder needs besides the vector (pagedtq/backends/kernel_tables.py makes them).
// `book` is {factor, half step, midpoints[n - 1], magnitudes[n], odd steps[n]} of n = 2^(bits - 1)
// cells: magnitudes as in the decode table; for widths 1 to 4 an odd integer times the half step.
// `rotation` and `projection` are tables for `rotate`; a Gaussian projection is float32 matrices.
struct Tables {
    const float* book;
    const void* rotation;
    const float* mean;
    const void* projection;
};

template <class Form>
struct Book {
    static constexpr int cells = 1 << (Form::bits - 1);
    const float* entries;

    DEVICE float factor() const { return entries[0]; }
    DEVICE float half_step() const { return entries[1]; }
    DEVICE float midpoint(int i) const { return entries[2 + i]; }
    DEVICE float magnitude(int i) const { return entries[1 + cells + i]; }
    DEVICE int square(int i) const {
        const int step = static_cast<int>(entries[1 + 2 * cells + i]);
        return step * step;
    }
};

// Magnitude index: the number of midpoints m with |u| >= m; sign 1 iff u < 0 (-0 is code 0).
template <class Form>
DEVICE Codes<Form> quantize(const Elements& u, const Book<Form>& book, int lane) {
    constexpr int cells = Book<Form>::cells;
    Codes<Form> codes;
    codes.energy = 0;
    // One float counts the cells passed, above bit 16, and adds up the square's increments: integers
    // below 2^19, exact. Adding 2^23 puts them into the low bits.
    float midpoints[cells], passed[cells];
    const float first = static_cast<float>(book.square(0)) + 8388608.0f;
#pragma unroll
    for (int i = 0; i + 1 < cells && Form::bits <= 4; ++i) {
        midpoints[i] = book.midpoint(i);
        passed[i] = static_cast<float>(65536 + book.square(i + 1) - book.square(i));
    }
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
        codes.magnitudes[j] = 0;
        codes.signs[j] = 0;
        u32 nibbles = 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const float size = bits_float(float_bits(u[j][e]) & 0x7fffffffu);
            if constexpr (Form::bits <= 4) {
                float total = first;
#pragma unroll
                for (int i = 0; i + 1 < cells; ++i) {
                    total = fma_rn(set_ge(size, midpoints[i]), passed[i], total);
                }
                const u32 bits = float_bits(total);
                nibbles |= (e <= 4 ? bits >> (16 - 4 * e) : bits << (4 * e - 16)) & 7u << 4 * e;
                if (exists(lane, j, e)) codes.energy += bits & 0xffffu;
            } else {
                int index = 0;
#pragma unroll
                for (int step = cells / 2; step >= 1; step /= 2) {
                    if (size >= book.midpoint(index + step - 1)) index += step;
                }
                codes.magnitudes[j] |= static_cast<u64>(index) << 8 * e;
            }
            // Adding zero makes -0 positive; what is left of the sign bit says u < 0.
            codes.signs[j] |= float_bits(add_rn(u[j][e], 0.0f)) >> (31 - e) & 1u << e;
        }
        if constexpr (Form::bits <= 4) codes.magnitudes[j] = nibbles;
    }
    return codes;
}

// A stored norm as f16 bits.
DEVICE u16 limited_half(float stored) {
    return f32_to_f16(stored < 65504.0f ? stored : 65504.0f);
}

// The length of what the codes decode to, before the stored norm is multiplied in.
template <class Form>
DEVICE float length_of(const Codes<Form>& codes, const Book<Form>& book, int lane, float* scratch) {
    if constexpr (Form::bits <= 4) {
        return mul_rn(sqrt_rn(static_cast<float>(sum_lanes(codes.energy))), book.half_step());
    } else {
        Elements terms;
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float magnitude = book.magnitude(codes.magnitude(j, e));
                terms[j][e] = exists(lane, j, e) ? mul_rn(magnitude, magnitude) : 0.0f;
            }
        }
        return sqrt_rn(fold(terms, lane, scratch));
    }
}

// The inner product of u with what its codes decode to.
template <class Form>
DEVICE float product_with(const Elements& u, const Codes<Form>& codes, const Book<Form>& book,
                          int lane, float* scratch) {
    Elements terms;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const float magnitude = book.magnitude(codes.magnitude(j, e));
            const float size = bits_float(float_bits(u[j][e]) & 0x7fffffffu);
            terms[j][e] = exists(lane, j, e) ? mul_rn(magnitude, size) : 0.0f;
        }
    }
    return fold(terms, lane, scratch);
}

// Of the codes of u stretched by 13/16 to 20/16, those nearest to u in direction; the first of equal
// ones. Returns their length.
template <class Form>
DEVICE float search(const Elements& u, const Book<Form>& book, int lane, float* scratch,
                    Codes<Form>& codes) {
    float best = -1.0f, length = 1.0f;
    // Not unrolled: eight copies of the quantizer would fill the instruction cache.
#pragma unroll 1
    for (int sixteenths = 13; sixteenths <= 20; ++sixteenths) {
        const float stretch = static_cast<float>(sixteenths) * 0.0625f;
        Elements terms;
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
#pragma unroll
            for (int e = 0; e < 8; ++e) terms[j][e] = mul_rn(u[j][e], stretch);
        }
        const Codes<Form> tried = quantize<Form>(terms, book, lane);
        const float product = product_with<Form>(u, tried, book, lane, scratch);
        const float its_length = length_of<Form>(tried, book, lane, scratch);
        const float cosine = div_rn(product, its_length);
        if (cosine > best) {
            best = cosine;
            length = its_length;
            codes = tried;
        }
    }
    return length;
}

// The stored norm (f16 bits) into which the scale is folded; u are the unit coordinates.
template <class Form>
DEVICE u16 stored_norm(float norm, const Elements& u, const Codes<Form>& codes, const Book<Form>& book,
                       int lane, float* scratch) {
    float stored;
    if constexpr (Form::scale == SCALE_NONE) {
        stored = mul_rn(norm, book.factor());
    } else if constexpr (Form::scale == SCALE_NORM_CORRECTED) {
        stored = div_rn(norm, length_of<Form>(codes, book, lane, scratch));
    } else {
        const float sum = product_with<Form>(u, codes, book, lane, scratch);
        const float root = bits_float(ROOT_BITS);
        stored = sum > 0.0f ? div_rn(mul_rn(norm, root), sum) : 0.0f;
    }
    return limited_half(stored);
}

// Prod: the norm of what the codes miss, and the signs of its projection.
template <class Form>
DEVICE void put_residual(const Elements& raw, const Codes<Form>& codes, u16 stored,
                         const Book<Form>& book, const Tables& tables, const Target& to, int head,
                         int lane, float* scratch) {
    const float scale = bits_float(INVERSE_ROOT_BITS);
    const float norm = f16_to_f32(stored);
    Elements residual, terms;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const float magnitude = book.magnitude(codes.magnitude(j, e));
            const float decoded = mul_rn(codes.negative(j, e) ? -magnitude : magnitude, norm);
            const float rest = sub_rn(mul_rn(raw[j][e], scale), decoded);
            residual[j][e] = exists(lane, j, e) ? rest : 0.0f;
            terms[j][e] = mul_rn(residual[j][e], residual[j][e]);
        }
    }
    const float gamma = sqrt_rn(fold(terms, lane, scratch));
    if constexpr (Form::qjl == QJL_GAUSSIAN) {
        const float* matrices = static_cast<const float*>(tables.projection);
        multiply<float, false>(matrices + static_cast<i64>(head) * HEAD_DIM * HEAD_DIM, residual,
                               lane, scratch);
    } else {
        rotate<kDense<Form>>(tables.projection, head, residual, lane, scratch);
    }
    if (!to.active) return;
    if (lane == 0) put_half(to.place, Form::residual_norms_at, f32_to_f16(gamma));
    u8* row = to.place.row(Form::qjl_at, kChunks);
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
        u32 byte = 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            byte |= static_cast<u32>(exists(lane, j, e) && residual[j][e] >= 0.0f) << e;
        }
        if (lane + kLanes * j < kChunks) row[lane + kLanes * j] = static_cast<u8>(byte);
    }
}

// Encode a vector, already rounded to kv_dtype, into its page; x is used up.
template <class Form>
DEVICE void encode(Elements& x, const Tables& tables, const Target& to, int head, int lane,
                   float* scratch) {
    const Book<Form> book = {tables.book};
    if (tables.mean != nullptr) {
        const float* row = tables.mean + static_cast<i64>(head) * HEAD_DIM;
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
            const int chunk = lane + kLanes * j;
            if (chunk >= kChunks) continue;
            float mean[8];
            read_chunk<F32>(reinterpret_cast<const u8*>(row), chunk, HEAD_DIM, HEAD_DIM % 8 == 0,
                            mean);
#pragma unroll
            for (int e = 0; e < 8; ++e) x[j][e] = sub_rn(x[j][e], mean[e]);
        }
    }
    Elements u;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) u[j][e] = mul_rn(x[j][e], x[j][e]);
    }
    float norm = sqrt_rn(fold(u, lane, scratch));
    if (norm < 1e-12f) norm = 0.0f;
    rotate<kDense<Form>>(tables.rotation, head, x, lane, scratch);
    const float inverse = norm > 0.0f ? div_rn(1.0f, norm) : 0.0f;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) u[j][e] = mul_rn(x[j][e], inverse);
    }
    Codes<Form> codes;
    u16 stored;
    if constexpr (Form::scale == SCALE_SEARCHED) {
        stored = limited_half(div_rn(norm, search<Form>(u, book, lane, scratch, codes)));
    } else {
        codes = quantize<Form>(u, book, lane);
        stored = stored_norm<Form>(norm, u, codes, book, lane, scratch);
    }
    put_codes<Form>(codes, to, lane);
    if (to.active && lane == 0) put_half(to.place, Form::norms_at, stored);
    if constexpr (Form::qjl != QJL_NONE) {
        put_residual<Form>(x, codes, stored, book, tables, to, head, lane, scratch);
    }
}
