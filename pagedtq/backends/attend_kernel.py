"""Which specialisation of the attention kernel reads a layer.

A specialisation fixes what a page holds and how many query rows share a pass over it; everything
else is an argument.
"""

from __future__ import annotations

from typing import NamedTuple

from ..config import Codec
from ..errors import UnsupportedError
from ..paging.layout import PageLayout
from .stream_formats import (
    column_tiles_of,
    is_prod,
    prefers_int8,
    prefers_int8_values,
    stream_format,
    takes_int8,
    takes_int8_values,
    tile_tokens,
)

#: Largest head dim whose partial outputs, of 16 query rows, fit a block's static shared memory.
MAX_HEAD_DIM = 512

#: Soft caps that the kernels compute. Above, ``cap * (1 - 2 / (1 + exp(2 x / cap)))`` cancels: a
#: logit is wrong by up to 1e-6 of the cap with a device's approximate exponentials. Below, ``1 /
#: cap`` nears the end of float32.
MIN_SOFT_CAP, MAX_SOFT_CAP = 1e-6, 1000.0


class AttendKernel(NamedTuple):
    """A specialisation of the attention kernel.

    Attributes
    ----------
    head_dim : int
        Dimension of keys and values.
    key_format, value_format : int
        What a page holds: 1 to 8, width of codes; 16, 17, 32: exact f16, bf16, f32.
    prod : bool
        Keys carry QJL signs.
    column_tiles : int
        Query rows of one pass, in eights.
    soft_cap : bool
        Logits are capped.
    tile_tokens : int
        Tokens of one step of a warp; at most the page size.
    int8_keys : bool
        Keys are multiplied as bytes, with query rows in two 8-bit terms, instead of as halves.
    cuda_cores : bool
        Products without matrix instructions.
    int8_values : bool
        Values are multiplied as bytes, with weights in two 8-bit terms, instead of as halves.
    """

    head_dim: int
    key_format: int
    value_format: int
    prod: bool
    column_tiles: int
    soft_cap: bool
    tile_tokens: int
    int8_keys: bool
    cuda_cores: bool = False
    int8_values: bool = False

    @property
    def columns(self) -> int:
        """Query rows of one unit of work."""
        return 8 * self.column_tiles

    def macros(self) -> dict[str, int]:
        """Return the definitions the kernel is compiled with."""
        return {
            "HEAD_DIM": self.head_dim,
            "KEY_FORMAT": self.key_format,
            "VALUE_FORMAT": self.value_format,
            "KEY_PROD": int(self.prod),
            "COLUMN_TILES": self.column_tiles,
            "SOFT_CAP": int(self.soft_cap),
            "TILE_TOKENS": self.tile_tokens,
            "KEY_INT8": int(self.int8_keys),
            "VALUE_INT8": int(self.int8_values),
            "CUDA_CORES": int(self.cuda_cores),
        }


def attend_kernel(
    layout: PageLayout,
    layer: int,
    rows: int,
    soft_cap: bool,
    int8_keys: bool | None = None,
    arch: int = 80,
    int8_values: bool | None = None,
) -> AttendKernel:
    """Choose the specialisation for a layer.

    Parameters
    ----------
    layout : PageLayout
        The pages.
    layer : int
        The layer.
    rows : int
        Most query rows of a KV head in one sequence: query tokens times group.
    soft_cap : bool
        Whether logits are capped.
    int8_keys : bool, optional
        Multiply keys as bytes; by default where `prefers_int8`, from sm_80 on.
    arch : int
        The device's compute capability without the dot, or what it can run: 80 and more have all
        matrix instructions, 75 those on halves, less none.
    int8_values : bool, optional
        Multiply values as bytes, 8 query rows at a time; by default where `prefers_int8_values`,
        from sm_90 on.

    Raises
    ------
    UnsupportedError
        If keys that `takes_int8` refuses, or values that `takes_int8_values` does, are to be
        multiplied as bytes; for a head dim above `MAX_HEAD_DIM`.
    """
    config = layout.config
    if config.head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"attention kernels take head dims up to {MAX_HEAD_DIM}, got {config.head_dim}"
        )
    keys, values = (stream_format(codec) for codec in config.layer_codecs(layer))
    prod = is_prod(config.layer_codecs(layer)[0])
    column_tiles = column_tiles_of(config.head_dim, rows, keys, values, prod)
    if int8_keys is None:
        int8_keys = arch >= 80 and prefers_int8(config.head_dim, keys, prod)
    elif int8_keys:
        _require_int8("keys", config.layer_codecs(layer)[0], config.head_dim, arch)
    if int8_values is None:
        int8_values = (arch >= 90 and int8_keys) and prefers_int8_values(
            config.head_dim, keys, values, column_tiles, config.page_size
        )
    elif int8_values:
        _require_int8("values", config.layer_codecs(layer)[1], config.head_dim, arch)
        column_tiles = 1
    cuda_cores = arch < 75
    tile = tile_tokens(config.head_dim, keys, values, column_tiles, int8_keys, prod, int8_values)
    return AttendKernel(
        config.head_dim,
        keys,
        values,
        prod,
        column_tiles,
        soft_cap,
        16 if cuda_cores else min(tile, config.page_size),
        int8_keys,
        cuda_cores,
        int8_values,
    )


def refuse_cap(soft_cap: float | None) -> None:
    """Refuse soft caps that the kernels do not compute well.

    Raises
    ------
    UnsupportedError
        Naming those that they do.
    """
    if soft_cap is not None and not MIN_SOFT_CAP <= soft_cap <= MAX_SOFT_CAP:
        raise UnsupportedError(
            f"the CUDA backend supports soft caps of {MIN_SOFT_CAP:g} to {MAX_SOFT_CAP:g}, got "
            f"{soft_cap:g}: pass None where no logit comes near the cap, or use backend='host'"
        )


def _require_int8(stream: str, codec: Codec, head_dim: int, arch: int) -> None:
    """Refuse to multiply a stream as bytes where the kernels cannot."""
    if arch < 80:
        raise UnsupportedError(f"{stream} are multiplied as bytes from sm_80 on, got sm_{arch}")
    form = stream_format(codec)
    values = stream == "values"
    able = takes_int8_values(head_dim, form) if values else takes_int8(head_dim, form)
    if not able or is_prod(codec):
        raise UnsupportedError(
            f"{stream} are multiplied as bytes for the MSE estimator of 2 to 4 bits in head dims "
            f"that are multiples of 32 (below 4 bits from 64 on) up to 256"
            f"{' (3 and 4 bits: 192)' if values else ''}; got {codec} with head_dim {head_dim}"
        )
