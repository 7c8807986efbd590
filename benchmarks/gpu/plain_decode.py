"""Our own decode attention over plain pages, bfloat16 and e4m3, written to be compared with.

Pages lie in no order, a group of query heads reads a page once, sequences are cut to fill the
device: what compressed pages gain against this is not gained against a weak opponent.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedtq.backends.page_launches import Launch

Array = npt.NDArray[Any]

KERNELS = Path(__file__).parent / "kernels"
#: Columns of the matrix instruction: the largest group.
COLUMNS = 8
#: Tokens below which a part is not worth its partial state.
MIN_PART_TOKENS = 256


def kernel_macros(head_dim: int, fp8: bool) -> dict[str, int]:
    """Return the specialisation; compilers' caches do not look into included files."""
    sources = b"".join(path.read_bytes() for path in sorted(KERNELS.iterdir()))
    return {"HEAD_DIM": head_dim, "KV_FP8": int(fp8), "PLAIN_SOURCES": zlib.crc32(sources)}


class Units(NamedTuple):
    """How sequences are cut; see ``kernels/plain_decode.cu``.

    Attributes
    ----------
    units : ndarray of int32 ``[n, 4]``
        Sequence, begin, end, and the part (-1: the whole sequence).
    cuts : ndarray of int32 ``[m, 3]``
        Sequences of several parts: sequence, first part, one past its last.
    """

    units: Array
    cuts: Array

    @property
    def parts(self) -> int:
        """Partial states."""
        return int(self.cuts[-1, 2]) if len(self.cuts) else 0


def cut_sequences(lengths: Array, wanted: int) -> Units:
    """Cut sequences into about ``wanted`` equal runs of tokens, begun at multiples of 32.

    Parameters
    ----------
    lengths : ndarray of int ``[batch]``
        Tokens of each, at least 1.
    wanted : int
        Units that fill the device.
    """
    run = max(MIN_PART_TOKENS, -(-int(lengths.sum()) // max(wanted, 1)))
    units, cuts, part = [], [], 0
    for sequence, length in enumerate(lengths.tolist()):
        count = -(-length // run)
        size = 32 * math.ceil(length / count / 32)
        count = -(-length // size)
        if count > 1:
            cuts.append((sequence, part, part + count))
        for i in range(count):
            units.append(
                (sequence, i * size, min(length, (i + 1) * size), part if count > 1 else -1)
            )
            part += count > 1
    return Units(np.array(units, np.int32).reshape(-1, 4), np.array(cuts, np.int32).reshape(-1, 3))


class PlainDecode:
    """Pools of plain pages and attention over them.

    Parameters
    ----------
    device : Device
        Where.
    head_dim, page_size, num_kv_heads, group : int
        ``head_dim`` 64 or 128, a page size that is a power of two of at least 16, a group of at
        most 8.
    num_pages : int
        Of each pool.
    fp8 : bool
        e4m3 with one scale per pool, instead of bfloat16.
    """

    def __init__(
        self,
        device: Any,
        head_dim: int,
        page_size: int,
        num_kv_heads: int,
        group: int,
        num_pages: int,
        fp8: bool = False,
    ) -> None:
        if head_dim not in (64, 128) or group > COLUMNS or page_size & (page_size - 1):
            raise ValueError(f"no plain kernel for d={head_dim}, group={group}, page={page_size}")
        self.device, self.fp8 = device, fp8
        self.head_dim, self.page_size = head_dim, page_size
        self.heads, self.group = num_kv_heads, group
        shape = (num_pages, num_kv_heads, page_size, head_dim)
        kind = np.uint8 if fp8 else np.uint16
        self.keys, self.values = (device.empty(shape, kind) for _ in range(2))
        self.key_scale = self.value_scale = 1.0

    def token_bytes(self) -> int:
        """Bytes of keys and values of a token, all heads."""
        return 2 * self.heads * self.head_dim * (1 if self.fp8 else 2)

    def fill(self, keys: Array, values: Array) -> None:
        """Repeat some pages ``[n, num_kv_heads, page_size, head_dim]`` of bits over the pools."""
        for pool, some in ((self.keys, keys), (self.values, values)):
            chunk = self.device.upload(some)
            for begin in range(0, len(pool), len(chunk)):
                part = pool[begin : begin + len(chunk)]
                part[...] = chunk[: len(part)]

    def plan(
        self, block_table: Array, lengths: Array, queries: Any, blocks_per_processor: int
    ) -> list[Launch]:
        """Return the launches of one step.

        Parameters
        ----------
        block_table : ndarray of int32 ``[batch, max_blocks]``
            Page of each block.
        lengths : ndarray of int ``[batch]``
            Tokens of each sequence.
        queries : array of uint16 ``[batch, num_kv_heads * group, head_dim]``, on the device
            bfloat16 bits.
        blocks_per_processor : int
            How finely sequences are cut.
        """
        wanted = blocks_per_processor * self.device.multiprocessors // self.heads
        units = cut_sequences(lengths, wanted)
        upload, empty = self.device.upload, self.device.empty
        states = (max(1, units.parts), self.heads, COLUMNS)
        out = empty(queries.shape, np.float32)
        part_outs, part_masses = (
            empty((*states, self.head_dim), np.float32),
            empty(states, np.float32),
        )
        file = str(KERNELS / "plain_decode.cu")
        macros = kernel_macros(self.head_dim, self.fp8)
        scale = self.head_dim**-0.5 * math.log2(math.e) * self.key_scale
        launches = [
            Launch(
                file,
                "plain_decode",
                macros,
                (len(units.units), self.heads),
                (
                    self.keys,
                    self.values,
                    queries,
                    upload(np.ascontiguousarray(block_table, np.int32)),
                    np.int32(block_table.shape[1]),
                    np.int32(self.page_size.bit_length() - 1),
                    np.int32(self.group),
                    np.float32(scale),
                    np.float32(self.value_scale),
                    upload(units.units),
                    part_outs,
                    part_masses,
                    out,
                ),
            )
        ]
        if len(units.cuts):
            arguments = (upload(units.cuts), np.int32(self.group), part_outs, part_masses, out)
            grid = (len(units.cuts), self.heads)
            launches.append(Launch(file, "merge_units", macros, grid, arguments))
        return launches


def bfloat16_bits(values: Array) -> Array:
    """Return float32 values as bfloat16 bits, to nearest even; finite input."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def e4m3_table() -> npt.NDArray[np.float32]:
    """Return the value of every e4m3 code: 4 exponent bits, 3 of mantissa, no infinities."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent > 0, np.ldexp(8.0 + mantissa, exponent - 10), mantissa / 512)
    size = np.where((code & 127) == 127, np.nan, size)
    return np.where(code >= 128, -size, size).astype(np.float32)


def e4m3_codes(values: Array) -> npt.NDArray[np.uint8]:
    """Return the nearest e4m3 code of each value, saturating; ties go to the smaller magnitude."""
    positive = e4m3_table()[:127]
    midpoints = (positive[1:] + positive[:-1]) / 2
    index = np.searchsorted(midpoints, np.abs(values)).astype(np.uint8)
    return np.where(np.signbit(values), index | 128, index).astype(np.uint8)
