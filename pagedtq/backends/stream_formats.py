"""What a page's streams are to the attention kernels: format numbers, and which paths take them."""

from __future__ import annotations

from ..config import Codec, Exact, TurboQuant
from ..errors import UnsupportedError

#: Numbers of the exact formats in ``kernels/formats.cuh``; coded ones are their width.
EXACT_FORMATS = {"f16": 16, "bf16": 17, "f32": 32}

#: Largest head dim of which tiles are loaded ahead: ``kAheadDim`` of ``kernels/rows.cuh``.
AHEAD_DIM = 256


def stream_format(codec: Codec) -> int:
    """Return the number of a codec's format in ``kernels/formats.cuh``."""
    if isinstance(codec, Exact):
        return EXACT_FORMATS[codec.dtype]
    return coded(codec).code_bits


def is_prod(codec: Codec) -> bool:
    """Whether keys of a codec carry QJL signs."""
    return isinstance(codec, TurboQuant) and codec.estimator == "prod"


def coded(codec: Codec) -> TurboQuant:
    """Return a codec that the kernels decode, or refuse it."""
    if not isinstance(codec, TurboQuant):
        raise UnsupportedError(f"the kernels read TurboQuant and exact streams, got {codec}")
    return codec


def is_tuned(head_dim: int, form: int) -> bool:
    """Whether rows divide among lanes, and are decoded from registers: ``is_tuned`` of formats.cuh.

    Everything else is decoded element by element. Four lanes take whole words of a key row each;
    rows of 2-bit fields (widths 2 and 3) may leave half a word per lane over.
    """
    if head_dim % 16 or form not in (2, 3, 4, EXACT_FORMATS["f16"]):
        return False
    share = head_dim * (2 if form == 3 else form) // 8 // 4
    return share % 4 == 0 or (form < 4 and share % 4 == 2 and share > 2)


def takes_int8(head_dim: int, form: int, prod: bool = False) -> bool:
    """Whether keys may be multiplied as bytes: ``KEY_INT8`` of ``kernels/attend.cu``."""
    return not prod and 2 <= form <= 4 and head_dim <= 256 and is_tuned(head_dim, form)


def takes_int8_values(head_dim: int, form: int) -> bool:
    """Whether values may be: ``VALUE_INT8``. Registers hold 3 and 4 bits up to head dim 192."""
    return takes_int8(head_dim, form) and (form < 3 or head_dim <= 192)


def prefers_int8(head_dim: int, key_format: int, prod: bool) -> bool:
    """Whether keys are multiplied as bytes: where halves would load the integer pipe too much."""
    return key_format < 4 and takes_int8(head_dim, key_format, prod)


def prefers_int8_values(
    head_dim: int, key_format: int, value_format: int, column_tiles: int, page_size: int
) -> bool:
    """Whether values are multiplied as bytes, from sm_90 on: where that takes fewer instructions.

    Those are 2 bits beside keys of 2 bits, both as bytes, in tiles large enough to share the
    conversion of their sums.
    """
    narrow = key_format == value_format == 2 and takes_int8_values(head_dim, 2)
    return narrow and column_tiles == 1 and page_size >= 64


def column_tiles_of(
    head_dim: int, rows: int, key_format: int, value_format: int, prod: bool
) -> int:
    """Return how many times 8 query rows share a pass over pages: as many as registers hold.

    Two take 128 registers for sums at head dim 256; an exact stream takes 64 more for a tile.
    """
    exact = (key_format >= EXACT_FORMATS["f16"]) + (value_format >= EXACT_FORMATS["f16"])
    scarce = head_dim > (160, 192, 256)[2 - max(exact, int(prod))]
    return 1 if rows <= 8 or scarce else 2


def tile_tokens(
    head_dim: int,
    key_format: int,
    value_format: int,
    column_tiles: int,
    int8_keys: bool = False,
    prod: bool = False,
    int8_values: bool = False,
) -> int:
    """Return how many tokens a warp takes at once: as many as registers hold without spilling."""
    tuned = is_tuned(head_dim, key_format) and is_tuned(head_dim, value_format)
    if head_dim > AHEAD_DIM or not tuned:
        return 16
    if max(key_format, value_format) >= EXACT_FORMATS["f16"]:
        return 32 if head_dim <= 64 and column_tiles == 1 else 16
    if head_dim > 128 or column_tiles == 2:
        crowded = prod or (int8_values and not key_format == value_format == 2)
        scarce = column_tiles == 2 if head_dim <= 192 else column_tiles == 2 or crowded
        return 16 if head_dim > 128 and scarce else 32
    if int8_keys:
        return 64 if key_format < 4 else 32
    # Decoding values of 2 or 3 bits beside keys of another width takes most temporaries.
    return 32 if head_dim > 64 and value_format < 4 and key_format != 3 else 64
