"""Key bounds: per page and rotated channel the least and the largest decoded key, in float16.

They bound the score of every token of a page by a query without a look at its codes (the upper
bound of Quest, arXiv 2406.10774, equation 2, in the rotated space, where inner products are the
same)::

    score(t) = sum_c q_c k_tc  <=  sum_c max(q_c low_c, q_c high_c)

With Prod keys the sketch adds ``gamma_t * <s, signs_t>`` for a projected query ``s``, which is at
most ``max_t gamma_t * sum |s|`` whatever the signs. What the arithmetic of a score or of its bound
can round is added on top, so that no bound is below a score that the same backend computes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .dtypes import f16_towards
from .host_attend import Rows
from .page_reader import StreamReader

Array = npt.NDArray[Any]

_UNIT = 2.0**-53
# Pages whose bounds stand as float64 side by side.
_PAGES_AT_ONCE = 1024


class PageBounds(NamedTuple):
    """Upper bounds of the scores of whole pages.

    Attributes
    ----------
    values : ndarray ``[num_q_heads, n]``
        No token of the page scores higher.
    indptr : ndarray of int64 ``[batch + 1]``
        Where each sequence begins in ``values`` and ``blocks``.
    blocks : ndarray of int64 ``[n]``
        The logical blocks.
    """

    values: Array
    indptr: Array
    blocks: Array


class KeyBounds:
    """The bounds plane of one layer: written when pages are full, read to bound scores.

    Parameters
    ----------
    plane : ndarray of float16 ``[num_pages, num_kv_heads, 2, head_dim]``
        Least and largest key per channel.
    keys : StreamReader
        The layer's keys, TurboQuant codes. Their channels fit float16, as norms above 32752 are
        refused.
    """

    def __init__(self, plane: Array, keys: StreamReader) -> None:
        self._plane, self._keys = plane, keys

    def write(self, pages: Array) -> None:
        """Write the bounds of full pages, rounded outwards."""
        size = self._keys.page_size
        for head in range(self._plane.shape[1]):
            tile = self._keys.tile(pages, head).reshape(len(pages), size, -1)
            norms = self._keys.norms(pages, head)
            assert norms is not None
            tile = tile * norms.reshape(len(pages), size, 1)
            self._plane[pages, head, 0] = f16_towards(tile.min(axis=1), -np.inf)
            self._plane[pages, head, 1] = f16_towards(tile.max(axis=1), np.inf)

    def scores(self, pages: Array, head: int, rows: Rows) -> Array:
        """Bound the scores of full pages by query rows: float64 ``[rows, len(pages)]``."""
        bounds = np.empty((len(rows.keys), len(pages)))
        for begin in range(0, len(pages), _PAGES_AT_ONCE):
            part = slice(begin, begin + _PAGES_AT_ONCE)
            bounds[:, part] = self._scores(pages[part], head, rows)
        if rows.offset is not None:
            bounds += rows.offset[:, None]
        return bounds

    def _scores(self, pages: Array, head: int, rows: Rows) -> Array:
        low, high = self._plane[pages, head].astype(np.float64).swapaxes(0, 1)
        bound: Array = np.matmul(np.maximum(rows.keys, 0), high.T)
        bound += np.matmul(np.minimum(rows.keys, 0), low.T)
        largest = np.maximum(np.abs(low), np.abs(high)).max(axis=1)
        bound += _rounding(rows.keys) * largest
        if rows.qjl is not None:
            gamma = self._keys.residual_norms(pages, head).reshape(len(pages), -1).max(axis=1)
            bound += (np.abs(rows.qjl).sum(axis=1)[:, None] + _rounding(rows.qjl)) * gamma
        return bound


def _rounding(rows: Array) -> Array:
    """Bound what sums of ``n`` products with a row can round, per unit of the other factor.

    A sum in any order is off by ``n u / (1 - n u)`` of the sum of magnitudes (Higham, Accuracy and
    Stability of Numerical Algorithms, section 3.1). Score and bound are each one such sum times a
    norm, plus another one; four times as much covers both.
    """
    return np.asarray(4 * (rows.shape[1] + 8) * _UNIT * np.abs(rows).sum(axis=1)[:, None])
