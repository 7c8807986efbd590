// Page geometry of one layer: what `PageLayout.kernel_macros` defines, as types.
//
// what      where the planes of an extent lie, and how a stream is coded
// mapping   none
// bytes     none moved
// host twin pagedtq/paging/layout.py
//
// Page size and strides are known at run time only. A plane starts at its bytes per token, times
// the page size: pages hold a multiple of 16 tokens, so planes need no padding between them.

#pragma once

#include "device.cuh"

#define F16 1
#define BF16 2
#define F32 3

#define SCALE_NONE 0
#define SCALE_NORM_CORRECTED 1
#define SCALE_UNBIASED 2
#define SCALE_SEARCHED 3

#define QJL_NONE 0
#define QJL_GAUSSIAN 1
#define QJL_ORTHOGONAL 2

// `exact` is the stored type, 0 where the stream is coded. `sign_distance`: in chunks of 8
// elements, the distance of the two that share sign bytes (width 3).
struct KeyForm {
    static constexpr bool paired = false, is_key = true;
    static constexpr bool dense = KEY_DENSE;
    static constexpr int exact = KEY_EXACT, bits = KEY_BITS, scale = KEY_SCALE, qjl = KEY_QJL;
    static constexpr int row = KEY_ROW, sign_row = KEY_SIGN_ROW, sign_distance = 2;
    static constexpr int codes_at = KEY_CODES_AT, signs_at = KEY_SIGNS_AT;
    static constexpr int norms_at = KEY_NORMS_AT, qjl_at = KEY_QJL_AT;
    static constexpr int residual_norms_at = KEY_RESIDUAL_NORMS_AT;
};

struct ValueForm {
    static constexpr bool paired = VALUE_EXACT == 0, is_key = false;
    static constexpr bool dense = VALUE_DENSE;
    static constexpr int exact = VALUE_EXACT, bits = VALUE_BITS, scale = VALUE_SCALE, qjl = QJL_NONE;
    static constexpr int row = VALUE_ROW, sign_row = VALUE_SIGN_ROW, sign_distance = 1;
    static constexpr int codes_at = VALUE_CODES_AT, signs_at = VALUE_SIGNS_AT;
    static constexpr int norms_at = VALUE_NORMS_AT, qjl_at = 0, residual_norms_at = 0;
};

// One token's place in the extent of one head.
struct Place {
    u8* extent;
    int page_size;
    int offset;

    // Start of a token's row in a plane of whole rows.
    DEVICE u8* row(int plane_at, int row_bytes) const {
        return extent + static_cast<i64>(plane_at) * page_size + offset * row_bytes;
    }
    // Start of a token's bytes in a plane that interleaves token pairs: they lie 2 apart.
    DEVICE u8* pair_row(int plane_at, int row_bytes) const {
        return extent + static_cast<i64>(plane_at) * page_size + offset / 2 * 2 * row_bytes +
               offset % 2;
    }
    template <class Form>
    DEVICE u8* stream_row(int plane_at, int row_bytes) const {
        return Form::paired ? pair_row(plane_at, row_bytes) : row(plane_at, row_bytes);
    }
};

DEVICE Place place_of(u8* pool, i64 page_stride, i64 head_stride, int page_size, i64 slot,
                      int head) {
    const i64 page = slot / page_size;
    Place place;
    place.extent = pool + page * page_stride + head * head_stride;
    place.page_size = page_size;
    place.offset = static_cast<int>(slot - page * page_size);
    return place;
}
