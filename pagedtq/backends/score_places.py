"""Where scores and per-page statistics go in their ragged rows, and the statistics' launch.

Only the page table says which blocks are resident, so the host counts; kernels follow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..paging.table_views import Reads
from .page_launches import Launch

Array = npt.NDArray[Any]


class StatsPlaces(NamedTuple):
    """The pages of a batch that hold a readable position.

    Attributes
    ----------
    numbers : ndarray of int32 ``[batch, max_blocks]``
        Column of a block's page in the results; -1 where nothing of it is readable.
    indptr : ndarray of int64 ``[batch + 1]``
        Where each sequence begins in the results.
    blocks : ndarray of int64 ``[total_pages]``
        The logical blocks, as in `PageStats`.
    """

    numbers: Array
    indptr: Array
    blocks: Array


def block_counts(table: Array, reads: Reads, page_size: int) -> Array:
    """Count the readable positions of every block in resident pages: int64 ``[batch, max_blocks]``.

    Parameters
    ----------
    table : ndarray of int32 ``[batch, max_blocks]``
        Page of each block; 0 where evicted.
    reads : Reads
        Which positions are read.
    page_size : int
        Tokens per page.
    """
    begin = np.arange(table.shape[1], dtype=np.int64) * page_size
    low = np.maximum(begin, reads.first[:, None])
    high = np.minimum(begin + page_size, reads.stop[:, None])
    keep, start = reads.keep[:, None], reads.start[:, None]
    below = np.maximum(np.minimum(high, keep) - low, 0)
    above = np.maximum(high - np.maximum(low, start), 0)
    counts = np.where(keep >= start, np.maximum(high - low, 0), below + above)
    return np.where(table != 0, counts, 0)


def score_starts(table: Array, reads: Reads, page_size: int) -> tuple[Array, Array]:
    """Say where the scores of every sequence and block go in a ragged row.

    Parameters are those of `block_counts`.

    Returns
    -------
    sequence_starts : ndarray of int64 ``[batch + 1]``
    block_starts : ndarray of int64 ``[batch, max_blocks]``
        From the start of the sequence.
    """
    counts = block_counts(table, reads, page_size)
    ends = counts.cumsum(axis=1)
    totals = np.concatenate([[0], counts.sum(axis=1).cumsum()])
    return totals.astype(np.int64), ends - counts


def stats_places(counts: Array) -> StatsPlaces:
    """Give numbers to the pages that hold a readable position.

    Parameters
    ----------
    counts : ndarray of int64 ``[batch, max_blocks]``
        Readable positions of every block.
    """
    read = counts > 0
    numbers = np.full(read.shape, -1, np.int32)
    numbers[read] = np.arange(read.sum(), dtype=np.int32)
    indptr = np.concatenate([[0], read.sum(axis=1).cumsum()]).astype(np.int64)
    return StatsPlaces(numbers, indptr, np.nonzero(read)[1].astype(np.int64))


def page_stats(
    scores: Any,
    starts: tuple[Any, Any],
    numbers: Any,
    maximum: Any,
    mass: Any,
    sm_scale: float = 1.0,
) -> Launch:
    """Reduce scores to a maximum and a mass per page; the twin of `host_score.page_stats`.

    Parameters
    ----------
    scores : float32 ``[num_q_heads, total]``
        What ``score`` wrote.
    starts : tuple of int64 ``[batch + 1]`` and ``[batch, max_blocks]``
        As given to ``score`` (`score_starts`).
    numbers : int32 ``[batch, max_blocks]``
        From `stats_places`.
    maximum, mass : float32 ``[num_q_heads, total_pages]``
        Results.
    sm_scale : float
        Scale of the logits in the mass.
    """
    batch, stride = numbers.shape
    num_heads, num_pages = maximum.shape
    sizes = map(np.int32, (batch, stride, num_pages))
    return Launch(
        "page_stats.cu",
        "page_stats",
        {},
        (batch, num_heads),
        (scores, *starts, numbers, *sizes, maximum, mass, np.float32(sm_scale)),
    )
