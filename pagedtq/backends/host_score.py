"""What scoring returns, and the per-page statistics that eviction policies take from it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Scores(NamedTuple):
    """Inner products of queries with the readable keys of each sequence.

    Attributes
    ----------
    values : ndarray ``[num_q_heads, total]``
        True inner products, sequences one after the other.
    indptr : ndarray of int64 ``[batch + 1]``
        Where each sequence begins in ``values`` and ``positions``.
    positions : ndarray of int64 ``[total]``
        The token positions, ascending within a sequence.
    """

    values: Array
    indptr: Array
    positions: Array

    def of(self, index: int) -> tuple[Array, Array]:
        """Return ``(values [num_q_heads, n], positions [n])`` of one sequence of the batch."""
        part = slice(int(self.indptr[index]), int(self.indptr[index + 1]))
        return self.values[:, part], self.positions[part]


class PageStats(NamedTuple):
    """Per-page by-products of scoring.

    Attributes
    ----------
    maximum, mass : ndarray ``[num_q_heads, total_pages]``
        Largest score in each page, and the sum of ``exp(sm_scale * (score - the
        sequence's largest))``.
    indptr : ndarray of int64 ``[batch + 1]``
        Where each sequence begins.
    blocks : ndarray of int64 ``[total_pages]``
        The logical blocks.
    """

    maximum: Array
    mass: Array
    indptr: Array
    blocks: Array


def page_stats(scores: Scores, page_size: int, sm_scale: float = 1.0) -> PageStats:
    """Reduce scores to a maximum and a mass per page.

    Parameters
    ----------
    scores : Scores
        Of any number of sequences.
    page_size : int
        Tokens per page.
    sm_scale : float
        Scale of the logits in the mass. With attention's own the masses of a sequence are
        proportional to its attention weights.
    """
    batch = len(scores.indptr) - 1
    blocks = scores.positions // page_size
    owner = np.repeat(np.arange(batch), np.diff(scores.indptr))
    edge = np.ones(len(blocks), bool)
    edge[1:] = (np.diff(blocks) != 0) | (np.diff(owner) != 0)
    starts = np.flatnonzero(edge)
    indptr = np.searchsorted(owner[starts], np.arange(batch + 1)).astype(np.int64)
    if not starts.size:
        empty = np.zeros((len(scores.values), 0), scores.values.dtype)
        return PageStats(empty, empty, indptr, starts)
    maximum = np.maximum.reduceat(scores.values, starts, axis=1)
    # Sequences without tokens have no peak; the others are numbered in order.
    members, number = np.unique(owner, return_inverse=True)
    peaks = np.maximum.reduceat(scores.values, scores.indptr[members], axis=1)
    mass = np.add.reduceat(np.exp(sm_scale * (scores.values - peaks[:, number])), starts, axis=1)
    return PageStats(maximum, mass, indptr, blocks[starts])
