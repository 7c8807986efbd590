// The codec's rotations and sums, in registers, in the host's order of operations.
//
// what      Hadamard and mixed-radix transforms, dense matrices, the fold of a vector's terms
// mapping   `kLanes` lanes hold a vector; lane l owns chunks l, l + kLanes, ... of 8 elements, so a
//           part of 2^k elements spans all lanes once and the odd factor of a mixed radix runs
//           inside a lane. All lanes of a warp take part in every call.
// bytes     none moved but the dense matrices
// host twin pagedtq/codec/rotation.py (transform), planar.py (fold, fixed_order_product)
//
// Butterflies add and subtract only; the other products are rounded before they are added. What
// comes out is the host's result bit for bit.

#pragma once

#include "device.cuh"

constexpr int kPower = HEAD_DIM & -HEAD_DIM;
constexpr int kOdd = HEAD_DIM / kPower;
// Dimensions without a fast transform are always dense.
constexpr bool kFast = kOdd == 1 || HEAD_DIM == 80 || HEAD_DIM == 96 || HEAD_DIM == 112 ||
                       HEAD_DIM == 160 || HEAD_DIM == 192;
// Sixteen elements in a lane where the power of two allows it.
constexpr int kLanes = !kFast            ? 32
                       : kOdd > 1        ? kPower / 8
                       : HEAD_DIM >= 512 ? 32
                       : HEAD_DIM >= 16  ? HEAD_DIM / 16
                                         : 1;
constexpr int kChunks = (HEAD_DIM + 7) / 8;
constexpr int kSpan = (kChunks + kLanes - 1) / kLanes;
template <class Form>
constexpr bool kDense = Form::dense || !kFast;
constexpr int kThreads = 128;
// Blocks that an SM should hold: bounds the registers, which long spans need.
constexpr int kBlocks = kSpan <= 3 && kFast ? 6 : kSpan <= 5 ? 3 : 2;
constexpr int kVectorsPerBlock = kThreads / kLanes;

// A lane's elements of a vector; x[j][e] is element 8 (lane + kLanes j) + e.
typedef float Elements[kSpan][8];

// cas(2 pi k / m) = cos + sin, rounded to float32.
DEVICE constexpr float hartley(int m, int k) {
    constexpr float three[3] = {1.0f, 0.36602542f, -1.3660254f};
    constexpr float five[5] = {1.0f, 1.2600735f, -0.22123174f, -1.3968023f, -0.64203954f};
    constexpr float seven[7] = {1.0f,        1.4053212f,  0.75240695f, -0.46708512f,
                                -1.3348526f, -1.1974488f, -0.15834168f};
    return m == 3 ? three[k % 3] : m == 5 ? five[k % 5] : seven[k % 7];
}

// sqrt(2^k) times the orthonormal Hadamard transform of every part of 2^k elements.
DEVICE void hadamard(Elements& x, int lane) {
#pragma unroll
    for (int stride = 1; stride < 8 && stride < kPower; stride *= 2) {
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                if (e & stride) continue;
                const float low = x[j][e], high = x[j][e + stride];
                x[j][e] = add_rn(low, high);
                x[j][e + stride] = sub_rn(low, high);
            }
        }
    }
#pragma unroll
    for (int bit = 1; bit < kLanes; bit *= 2) {
        // The product is exact, so this is a sum or a difference, rounded once.
        const float sign = lane & bit ? -1.0f : 1.0f;
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
#pragma unroll
            for (int e = 0; e < 8; ++e) x[j][e] = fma_rn(sign, x[j][e], shfl_xor(x[j][e], bit));
        }
    }
    if constexpr (kOdd == 1) {
#pragma unroll
        for (int stride = 1; stride < kSpan; stride *= 2) {
#pragma unroll
            for (int j = 0; j < kSpan; ++j) {
                if (j & stride) continue;
#pragma unroll
                for (int e = 0; e < 8; ++e) {
                    const float low = x[j][e], high = x[j + stride][e];
                    x[j][e] = add_rn(low, high);
                    x[j + stride][e] = sub_rn(low, high);
                }
            }
        }
    }
}

// The Hartley matrix across the kOdd parts, which are a lane's chunks.
DEVICE void hartley_parts(Elements& x) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
        float part[kSpan];
#pragma unroll
        for (int j = 0; j < kSpan; ++j) part[j] = x[j][e];
#pragma unroll
        for (int a = 0; a < kSpan; ++a) {
            float sum = part[0];
#pragma unroll
            for (int b = 1; b < kSpan; ++b) {
                const float factor = hartley(kOdd, a * b % kOdd);
                sum = add_rn(sum, factor == 1.0f ? part[b] : mul_rn(factor, part[b]));
            }
            x[a][e] = sum;
        }
    }
}

// Put a vector where all of its lanes can read it.
DEVICE void share(const Elements& x, int lane, float* scratch) {
    sync_warp();
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const int i = 8 * (lane + kLanes * j) + e;
            if (i < HEAD_DIM) scratch[i] = x[j][e];
        }
    }
    sync_warp();
}

// x becomes matrix x: sums over ascending columns in the type of the matrix, rounded to float32
// once. `transposed` reads it by columns.
template <class T, bool transposed>
DEVICE void multiply(const T* matrix, Elements& x, int lane, float* scratch) {
    share(x, lane, scratch);
    constexpr i64 row_step = transposed ? 1 : HEAD_DIM, column_step = transposed ? HEAD_DIM : 1;
    T sums[kSpan][8];
    for (int k = 0; k < HEAD_DIM; ++k) {
        const T factor = static_cast<T>(scratch[k]);
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int i = min(8 * (lane + kLanes * j) + e, HEAD_DIM - 1);
                const T term = mul_rn(matrix[i * row_step + k * column_step], factor);
                sums[j][e] = k == 0 ? term : add_rn(sums[j][e], term);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const bool inside = 8 * (lane + kLanes * j) + e < HEAD_DIM;
            x[j][e] = inside ? static_cast<float>(sums[j][e]) : 0.0f;
        }
    }
}

// Negate where a head's sign bits (ceil(HEAD_DIM / 8) bytes, bit i of the row for element i) say so.
DEVICE void apply_signs(const u8* bits, Elements& x, int lane) {
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
        const int chunk = lane + kLanes * j;
        const u32 byte = chunk < kChunks ? ldg8(bits + chunk) : 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            x[j][e] = bits_float(float_bits(x[j][e]) ^ (byte << (31 - e) & 0x80000000u));
        }
    }
}

// x becomes sqrt(d) R x. `table` holds sign bits per head, or for dense rotations the matrices
// times sqrt(d) in float64.
template <bool dense>
DEVICE void rotate(const void* table, int head, Elements& x, int lane, float* scratch) {
    if constexpr (dense) {
        const double* matrices = static_cast<const double*>(table);
        multiply<double, false>(matrices + static_cast<i64>(head) * HEAD_DIM * HEAD_DIM, x, lane,
                                scratch);
    } else {
        apply_signs(static_cast<const u8*>(table) + head * kChunks, x, lane);
        hadamard(x, lane);
        if constexpr (kOdd > 1) hartley_parts(x);
    }
}

// `fold` for powers of two, in registers.
DEVICE float fold_power(const Elements& terms, int lane) {
    Elements half;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
#pragma unroll
        for (int e = 0; e < 8; ++e) half[j][e] = terms[j][e];
    }
#pragma unroll
    for (int count = kSpan / 2; count >= 1; count /= 2) {
#pragma unroll
        for (int j = 0; j < count; ++j) {
#pragma unroll
            for (int e = 0; e < 8; ++e) half[j][e] = add_rn(half[j][e], half[j + count][e]);
        }
    }
    // Across lanes: a lane keeps half of its sums and gives the other half away, while it has two.
    float(&s)[8] = half[0];
    int kept = 8;
#pragma unroll
    for (int bit = kLanes / 2; bit >= 1; bit /= 2) {
        if (kept > 1) {
            const bool upper = lane & bit;
            kept /= 2;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (e >= kept) continue;
                const float mine = upper ? s[e + kept] : s[e];
                const float given = upper ? s[e] : s[e + kept];
                s[e] = add_rn(mine, shfl_xor(given, bit));
            }
        } else {
            s[0] = add_rn(s[0], shfl_xor(s[0], bit));
        }
    }
    // Inside a chunk: strides 4, 2, 1, across lanes where the sums were given away.
#pragma unroll
    for (int bit = kLanes / 2, stride = 4; stride >= 1; bit /= 2, stride /= 2) {
        if (bit >= 1) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                if (e < kept) s[e] = add_rn(s[e], shfl_xor(s[e], bit));
            }
        } else {
            kept /= 2;
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                if (e < kept) s[e] = add_rn(s[e], s[e + kept]);
            }
        }
    }
    return s[0];
}

// Sum a vector's terms in the fixed order of the page format; every lane gets the sum. Elements
// beyond HEAD_DIM must be 0.
DEVICE float fold(const Elements& terms, int lane, float* scratch) {
    if constexpr (kOdd > 1) {
        share(terms, lane, scratch);
        int count = HEAD_DIM;
        while (count % 2 == 0) {
            count /= 2;
            for (int i = lane; i < count; i += kLanes) {
                scratch[i] = add_rn(scratch[i], scratch[i + count]);
            }
            sync_warp();
        }
        float sum = scratch[0];
        for (int i = 1; i < count; ++i) sum = add_rn(sum, scratch[i]);
        return sum;
    } else {
        return fold_power(terms, lane);
    }
}

// Sum integers over the lanes of a vector.
DEVICE int sum_lanes(int x) {
#pragma unroll
    for (int bit = kLanes / 2; bit >= 1; bit /= 2) x += shfl_xor(x, bit);
    return x;
}
