"""A chunk's own raw keys and values as exact pages, so that the page kernels attend over them.

The exact part of a prefill step is causal attention of the chunk over itself. Written by ``store``
into scratch pages of an exact layout, it is one more layer to ``rotate_queries``, ``attend`` and
``merge``: matrix instructions, tiles of query rows, splits and sliding windows come with them. The
host's twin is `host_chunk.attend_chunk`.

Scratch pages hold f16 whatever ``kv_dtype`` is, because f16 is what matrix instructions multiply;
rounding to ``kv_dtype`` comes first, and magnitudes beyond 65504 saturate. A sequence's chunk
begins on a page of its own, and positions count from the chunk's first token: causality and windows
compare differences of positions only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import CacheConfig, Exact
from ..errors import ArgumentError
from ..paging.layout import PageLayout
from ..paging.table_views import Reads

Array = npt.NDArray[Any]

PAGE_SIZE = 64


def chunk_layout(config: CacheConfig, batch: int, chunk_tokens: int) -> PageLayout:
    """Return the layout of scratch pages for a step; its ``pool_bytes`` are what it needs.

    Parameters
    ----------
    config : CacheConfig
        Of the cache: heads, dimension and ``kv_dtype``.
    batch, chunk_tokens : int
        Sequences, and most query tokens of one of them.
    """
    exact = Exact(dtype="f16")
    shape = config.num_kv_heads, config.head_dim
    return PageLayout(
        CacheConfig(
            num_layers=1,
            num_kv_heads=shape[0],
            head_dim=shape[1],
            num_pages=1 + batch * _blocks(chunk_tokens),
            page_size=PAGE_SIZE,
            window=0,
            keys=exact,
            values=exact,
            kv_dtype=config.kv_dtype,
        )
    )


def chunk_table(batch: int, chunk_tokens: int) -> npt.NDArray[np.int32]:
    """Return the page table ``int32[batch, blocks]``; it does not depend on the step."""
    blocks = _blocks(chunk_tokens)
    return np.arange(1, 1 + batch * blocks, dtype=np.int32).reshape(batch, blocks)


def chunk_slots(q_lens: Array, chunk_tokens: int) -> npt.NDArray[np.int64]:
    """Return where ``store`` puts the query tokens, ``int64[tokens]``.

    Parameters
    ----------
    q_lens : ndarray of int ``[batch]``
        Query tokens of each sequence.
    chunk_tokens : int
        As for `chunk_layout`.

    Raises
    ------
    ArgumentError
        If a chunk is longer.
    """
    lens = np.asarray(q_lens, np.int64)
    if lens.max(initial=0) > chunk_tokens:
        raise ArgumentError(f"chunks have at most {chunk_tokens} tokens, got one of {lens.max()}")
    first = (1 + np.arange(len(lens)) * _blocks(chunk_tokens)) * PAGE_SIZE
    starts = np.cumsum(lens) - lens
    return np.repeat(first - starts, lens) + np.arange(int(lens.sum()))


def chunk_reads(q_lens: Array) -> Reads:
    """Return the read ranges of chunks: all of each."""
    lens = np.asarray(q_lens, np.int64)
    nothing = np.zeros_like(lens)
    return Reads(lens, nothing, lens, nothing, nothing)


def _blocks(chunk_tokens: int) -> int:
    return max(1, -(-chunk_tokens // PAGE_SIZE))
