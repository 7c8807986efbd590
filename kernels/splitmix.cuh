// SplitMix64 as a counter: every entry of a random stream is drawn alone, in any order.
//
// what      the codec's random words and signs; no state, no memory
// mapping   none: plain device functions, one call per entry
// bytes     none moved
// host twin pagedtq/codec/random_streams.py (same names); integer arithmetic modulo 2^64, so the
//           twins agree bit for bit on every device
// source    Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014
//
// Word i of the stream with key k is mix(k + (i + 1) * GOLDEN). A key folds seed, layer, stream
// number and global KV head index, so a head's stream does not depend on the rank that owns it.
// Gaussians (the QJL matrix) are drawn on the host only: their logarithm and cosine are not
// specified to the last bit on a device.

#pragma once

#define SPLITMIX_GOLDEN 0x9E3779B97F4A7C15ull

// Numbers of the named streams; part of the page format, never renumbered.
#define STREAM_KEY 1
#define STREAM_VALUE 2
#define STREAM_KEY_QJL 3

__device__ __forceinline__ unsigned long long splitmix_mix(unsigned long long z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

__device__ __forceinline__ unsigned long long stream_key(unsigned long long seed, unsigned layer,
                                                         unsigned stream, unsigned head) {
    unsigned long long key = splitmix_mix(seed + SPLITMIX_GOLDEN);
    key = splitmix_mix((key ^ layer) + SPLITMIX_GOLDEN);
    key = splitmix_mix((key ^ stream) + SPLITMIX_GOLDEN);
    return splitmix_mix((key ^ head) + SPLITMIX_GOLDEN);
}

__device__ __forceinline__ unsigned long long random_word(unsigned long long key, unsigned index) {
    return splitmix_mix(key + (index + 1ull) * SPLITMIX_GOLDEN);
}

// Top bit of word `index`: 1 where the host twin's random_signs holds -1. XOR it, shifted to bit
// 31, into a float to apply the sign.
__device__ __forceinline__ unsigned random_sign_bit(unsigned long long key, unsigned index) {
    return static_cast<unsigned>(random_word(key, index) >> 63);
}
