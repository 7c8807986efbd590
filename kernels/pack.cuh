// Packing a vector's codes into the rows of its token.
//
// what      the row formats of keys and values, and where a token's bytes go
// mapping   kLanes lanes per vector, chunks of 8 elements (rotation.cuh); a chunk of w-bit codes is
//           w whole bytes, which no other lane writes
// bytes     writes the token's code row and sign row
// host twin pagedtq/codec/bitpack.py, pagedtq/backends/page_writer.py

#pragma once

#include "page.cuh"
#include "rotation.cuh"

// Where a vector goes. `joined`: the lanes of the token pair's other vector hold it, `kLanes` away
// in the same warp, and both are written together.
struct Target {
    Place place;
    bool active, joined;
};

// Codes of a lane's elements: magnitude indices of 4 bits (8 above width 4) and sign bits, and the
// sum of squared odd steps.
template <class Form>
struct Codes {
    static constexpr int pitch = Form::bits <= 4 ? 4 : 8;
    u64 magnitudes[kSpan];
    u32 signs[kSpan];
    int energy;

    DEVICE int magnitude(int j, int e) const {
        return static_cast<int>(magnitudes[j] >> pitch * e) & ((1 << pitch) - 1);
    }
    DEVICE bool negative(int j, int e) const { return signs[j] >> e & 1; }
};

DEVICE bool exists(int lane, int j, int e) { return 8 * (lane + kLanes * j) + e < HEAD_DIM; }

// Write a chunk's `count` bytes into a plane of rows; the last chunk's may be cut at `end`.
template <class Form, int count>
DEVICE void put_chunk(const Target& to, int plane_at, int row_bytes, int first, u64 bytes) {
    // Whole rows of words; otherwise rows need not start on a word.
    constexpr bool words = HEAD_DIM % 16 == 0;
    if constexpr (Form::paired) {
        if constexpr (kLanes < WARP_SIZE && words &&
                      (count == 1 || count == 2 || count == 4 || count == 8)) {
            // The pair's bytes alternate: each of the two lanes writes one half of them.
            const u64 theirs = shfl_xor(bytes, kLanes);
            if (to.active && to.joined) {
                const bool odd = to.place.offset % 2;
                const u64 even_bytes = odd ? theirs : bytes, odd_bytes = odd ? bytes : theirs;
                u8* at = to.place.pair_row(plane_at, row_bytes) - odd + 2 * first;
                const u32 even_low = static_cast<u32>(even_bytes >> (odd ? 4 * count : 0));
                const u32 odd_low = static_cast<u32>(odd_bytes >> (odd ? 4 * count : 0));
                const u32 low = prmt(even_low, odd_low, 0x5140);
                const u32 high = prmt(even_low, odd_low, 0x7362);
                if constexpr (count == 8) {
                    *reinterpret_cast<uint2*>(at + 8 * odd) = make_uint2(low, high);
                } else if constexpr (count == 4) {
                    *reinterpret_cast<u32*>(at + 4 * odd) = low;
                } else if constexpr (count == 2) {
                    *reinterpret_cast<u16*>(at + 2 * odd) = static_cast<u16>(low);
                } else if (!odd) {
                    *reinterpret_cast<u16*>(at) = static_cast<u16>(low);
                }
                return;
            }
        }
        if (!to.active) return;
        u8* at = to.place.pair_row(plane_at, row_bytes) + 2 * first;
#pragma unroll
        for (int i = 0; i < count; ++i) {
            if (first + i < row_bytes) at[2 * i] = static_cast<u8>(bytes >> 8 * i);
        }
    } else {
        if (!to.active) return;
        u8* at = to.place.row(plane_at, row_bytes) + first;
        if constexpr (words && count == 8) {
            *reinterpret_cast<uint2*>(at) =
                make_uint2(static_cast<u32>(bytes), static_cast<u32>(bytes >> 32));
        } else if constexpr (words && count == 4) {
            *reinterpret_cast<u32*>(at) = static_cast<u32>(bytes);
        } else if constexpr (words && count == 2) {
            *reinterpret_cast<u16*>(at) = static_cast<u16>(bytes);
        } else {
#pragma unroll
            for (int i = 0; i < count; ++i) {
                if (first + i < row_bytes) at[i] = static_cast<u8>(bytes >> 8 * i);
            }
        }
    }
}

// Move 8 bits to every fourth bit, or 8 nibbles' low pairs next to each other.
DEVICE u32 spread_bits(u32 x) {
    x = (x | x << 12) & 0x000f000fu;
    x = (x | x << 6) & 0x03030303u;
    return (x | x << 3) & 0x11111111u;
}
DEVICE u32 join_pairs(u32 x) {
    x = (x | x >> 2) & 0x0f0f0f0fu;
    x = (x | x >> 4) & 0x00ff00ffu;
    return (x | x >> 8) & 0xffffu;
}

// Bytes of a chunk's codes in the stream's row format (bitpack.py), width 3's signs apart.
template <class Form>
DEVICE u64 pack_chunk(const Codes<Form>& codes, int j) {
    const u32 nibbles = static_cast<u32>(codes.magnitudes[j]), signs = codes.signs[j];
    if constexpr (Form::sign_row > 0) {
        return join_pairs(nibbles);
    } else if constexpr (Form::is_key && Form::bits == 4 && HEAD_DIM % 16 == 0) {
        // Four bits times 1 + 2^7 + 2^14 + 2^21: each to the bottom of a byte.
        const u32 low = (signs & 15u) * 0x00204081u & 0x01010101u;
        const u32 high = (signs >> 4) * 0x00204081u & 0x01010101u;
        return nibbles | low << 7 | high << 3;
    } else if constexpr (Form::bits == 4) {
        return nibbles | spread_bits(signs) << 3;
    } else if constexpr (Form::bits == 2) {
        return join_pairs(nibbles | spread_bits(signs) << 1);
    } else if constexpr (Form::bits == 1) {
        return signs;
    } else {
        u64 bytes = 0;
#pragma unroll
        for (int e = 0; e < 8; ++e) {
            const u64 magnitude = codes.magnitude(j, e), sign = codes.negative(j, e);
            bytes |= (sign << (Form::bits - 1) | magnitude) << Form::bits * e;
        }
        return bytes;
    }
}

// Width 3: the sign nibbles of a chunk's two code bytes, at bits 0, 1, 4, 5 of two bytes.
DEVICE u32 sign_nibbles(u32 signs) {
    const u32 nibble = (signs & 0x03u) | (signs & 0x0cu) << 2;
    const u32 next = (signs >> 4 & 0x03u) | (signs >> 4 & 0x0cu) << 2;
    return nibble | next << 8;
}

template <class Form>
DEVICE void put_codes(const Codes<Form>& codes, const Target& to, int lane) {
    constexpr int bytes = Form::sign_row > 0 ? 2 : Form::bits;
#pragma unroll
    for (int j = 0; j < kSpan; ++j) {
        const int chunk = lane + kLanes * j;
        Target at = to;
        at.active = to.active && chunk < kChunks;
        put_chunk<Form, bytes>(at, Form::codes_at, Form::row, chunk * bytes,
                               pack_chunk<Form>(codes, j));
    }
    if constexpr (Form::sign_row > 0) {
        // Two chunks share sign bytes; the lower one writes them, its partner's signs above its own.
        constexpr int distance = Form::sign_distance;
#pragma unroll
        for (int j = 0; j < kSpan; ++j) {
            const int chunk = lane + kLanes * j;
            u32 theirs = 0;
            if constexpr (distance < kLanes) {
                theirs = shfl_xor(sign_nibbles(codes.signs[j]), distance);
            } else {
                constexpr int apart = distance / kLanes;
                const int partner = j ^ apart;
                theirs = partner < kSpan ? sign_nibbles(codes.signs[partner < kSpan ? partner : 0])
                                         : 0u;
            }
            Target at = to;
            at.active = to.active && chunk < kChunks && (chunk & distance) == 0;
            const int first = chunk / (2 * distance) * 2 * distance + chunk % distance * 2;
            put_chunk<Form, 2>(at, Form::signs_at, Form::sign_row, first,
                               sign_nibbles(codes.signs[j]) | theirs << 2);
        }
    }
}

DEVICE void put_half(const Place& place, int plane_at, u16 bits) {
    *reinterpret_cast<u16*>(place.row(plane_at, 2)) = bits;
}
