"""Rankings that look at what pages hold: norms, key bounds, attention.

Each reads one cache and scores its blocks for `EvictLowest` or `PagedKVCache.free_pages`. A page
holds all layers and KV heads, so their opinions are averaged: every (layer, head) spreads one vote
over the pages of a sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backends.dtypes import check_shape
from ..backends.host_score import PageStats
from ..errors import ArgumentError, ArgumentTypeError
from ..paging.arguments import Int32, Int64, Integers, integers
from ..paging.candidates import sealed_blocks
from ..paging.page_scores import PageScores, places_in
from ..paging.page_tables import PageTables
from .reads import CacheReads, SeqIds

Array = npt.NDArray[Any]


class NormRatio:
    """Value norm by key norm, the mean over a page's tokens (arXiv 2509.04377).

    Reads the norm planes only: 4 bytes per token, layer and KV head. Keys with a small norm tend to
    attract attention, values with a large one move the output. Norms of keys are those of the
    centred keys.

    Parameters
    ----------
    cache : PagedKVCache
        The cache.
    layers : sequence of int, optional
        Layers to look at; by default all that keep norms of both streams.

    Raises
    ------
    UnsupportedError
        When it scores, if a layer named here keeps no norms apart.
    ArgumentError
        If no layer is left.
    """

    def __init__(self, cache: CacheReads, layers: Sequence[int] | None = None) -> None:
        self._cache = cache
        if layers is None:
            layers = [layer for layer, one in enumerate(cache.backend.layers) if one.norms.complete]
        self.layers = checked_layers(cache, layers)

    def score(self, tables: PageTables, seq_ids: Integers) -> PageScores:
        """Score blocks by their norms; see `PageRanking`."""
        _check_tables(self._cache, tables)
        ids, found = integers("seq_ids", seq_ids), sealed_blocks(tables, seq_ids)
        total = np.zeros(found.blocks.size)
        for layer in self.layers:
            ratios = self._cache.backend.norm_ratios(layer, found.pages)
            total += _votes(ratios.T, found.members)
        return PageScores(ids, found, total / len(self.layers))


class QueryBounds:
    """What queries could find in a page at best, from the key bounds (arXiv 2406.10774).

    Reads 4 bytes per channel, layer and KV head of a page. The vote of a query head is the softmax
    of the pages' bounds.

    Parameters
    ----------
    cache : PagedKVCache
        A cache with ``key_bounds=True``.
    seq_ids : int or sequence of int
        Sequences the queries belong to.
    queries : mapping of layer to ndarray ``[batch, num_q_heads, head_dim]``
        One query token per sequence, of one or more layers with TurboQuant keys.
    sm_scale : float, optional
        Scale of the logits, ``1 / sqrt(head_dim)`` by default.
    """

    def __init__(
        self,
        cache: CacheReads,
        seq_ids: SeqIds,
        queries: Mapping[int, Array],
        sm_scale: float | None = None,
    ) -> None:
        self._cache = cache
        self._ids = cache._ids(seq_ids)
        self.layers = checked_layers(cache, list(queries))
        shape = (self._ids.size, None, cache.config.head_dim)
        for layer, one in queries.items():
            check_shape(one, f"queries of layer {layer}", shape, "sequences, heads, head_dim")
        self._queries = dict(queries)
        self._scale = cache.config.head_dim**-0.5 if sm_scale is None else sm_scale

    def score(self, tables: PageTables, seq_ids: Integers) -> PageScores:
        """Score blocks by their bounds; see `PageRanking`.

        Raises
        ------
        ArgumentError
            If a sequence has no queries here.
        UnsupportedError
            If a layer keeps no bounds.
        """
        _check_tables(self._cache, tables)
        ids = integers("seq_ids", seq_ids)
        rows = places_in(self._ids, ids)
        if (rows < 0).any():
            raise ArgumentError(f"there are no queries of sequence {int(ids[rows < 0][0])}")
        found = sealed_blocks(tables, ids)
        total = np.zeros(found.blocks.size)
        for layer in self.layers:
            bounds = self._cache.score_bounds(layer, self._queries[layer][rows], ids)
            logits = bounds.values.astype(np.float64) * self._scale
            total += _votes(_softmax_weights(logits, found.members), found.members)
        return PageScores(ids, found, total / len(self.layers))


class AttentionMass:
    """How much attention pages received over the last steps (as arXiv 2306.14048, by page).

    Every `observe` or `add` is a step: older mass is multiplied with ``decay``, the new step's
    attention weights, averaged over layers and query heads, are added.

    Parameters
    ----------
    cache : PagedKVCache
        The cache.
    decay : float
        What is left of the mass after a step, in [0, 1]; 1 never forgets.

    Notes
    -----
    Memory is 12 bytes per block of the sequences seen; closed ones are dropped now and then, or at
    once by `forget`. A block whose page was replaced since it was seen has no score.
    """

    def __init__(self, cache: CacheReads, decay: float = 0.9) -> None:
        if isinstance(decay, bool) or not isinstance(decay, float | int):
            raise ArgumentTypeError(f"decay must be a number, got {type(decay).__name__}")
        if not 0 <= decay <= 1:
            raise ArgumentError(f"decay must be in [0, 1], got {decay}")
        self._cache, self.decay = cache, float(decay)
        self._seen: dict[int, tuple[Int32, npt.NDArray[np.float64]]] = {}

    def observe(
        self, seq_ids: SeqIds, queries: Mapping[int, Array], sm_scale: float | None = None
    ) -> None:
        """Score one query token per sequence in some layers, and add what it attends to.

        Parameters
        ----------
        seq_ids : int or sequence of int
            The batch.
        queries : mapping of layer to ndarray ``[batch, num_q_heads, head_dim]``
            Queries of each layer to look at.
        sm_scale : float, optional
            Scale of the logits, ``1 / sqrt(head_dim)`` by default.
        """
        cache = self._cache
        scale = cache.config.head_dim**-0.5 if sm_scale is None else sm_scale
        stats = [
            cache.page_stats(cache.score(layer, queries[layer], seq_ids), scale)
            for layer in checked_layers(cache, list(queries))
        ]
        self.add(seq_ids, stats)

    def add(self, seq_ids: SeqIds, stats: Sequence[PageStats]) -> None:
        """Add one step from statistics at hand, one per layer, made with attention's scale."""
        ids = self._cache._ids(seq_ids)
        self._cache.tables.check_distinct(ids)
        if not stats:
            raise ArgumentError("expected the statistics of one layer or more, got none")
        for one in stats:
            if len(one.indptr) != ids.size + 1:
                raise ArgumentError(
                    f"expected statistics of {ids.size} sequences, got {len(one.indptr) - 1}"
                )
        table = self._cache.tables.block_table(ids)
        fresh = np.zeros(table.shape)
        for one in stats:
            owner = np.repeat(np.arange(ids.size), np.diff(one.indptr))
            votes = _votes(one.mass.astype(np.float64), owner)
            np.add.at(fresh, (owner, one.blocks), votes / len(stats))
        for seq_id, pages, mass in zip(ids.tolist(), table, fresh, strict=True):
            old = self._seen.get(seq_id)
            if old is not None:
                count = min(old[0].size, pages.size)
                same = old[0][:count] == pages[:count]
                mass[:count] += np.where(same, self.decay * old[1][:count], 0)
            self._seen[seq_id] = pages.copy(), mass.copy()
        self._drop_closed()

    def forget(self, seq_ids: SeqIds) -> None:
        """Drop what is known of sequences; those never seen are skipped."""
        for seq_id in self._cache._ids(seq_ids).tolist():
            self._seen.pop(seq_id, None)

    def score(self, tables: PageTables, seq_ids: Integers) -> PageScores:
        """Score blocks by their mass; those never seen have none. See `PageRanking`."""
        _check_tables(self._cache, tables)
        ids, found = integers("seq_ids", seq_ids), sealed_blocks(tables, seq_ids)
        values = np.full(found.blocks.size, np.nan)
        for member, seq_id in enumerate(ids.tolist()):
            seen = self._seen.get(seq_id)
            if seen is None:
                continue
            mine = np.flatnonzero(found.members == member)
            blocks = found.blocks[mine]
            mine, blocks = mine[blocks < seen[0].size], blocks[blocks < seen[0].size]
            same = seen[0][blocks] == found.pages[mine]
            values[mine[same]] = seen[1][blocks[same]]
        known = ~np.isnan(values)
        return PageScores(ids, found.where(known), values[known])

    def _drop_closed(self) -> None:
        tables = self._cache.tables
        if len(self._seen) > 2 * max(16, tables.num_sequences):
            for seq_id in set(self._seen).difference(tables.sequence_ids().tolist()):
                del self._seen[seq_id]


def checked_layers(cache: CacheReads, layers: Sequence[int]) -> list[int]:
    """Return layers, each a layer of the cache and given once; at least one."""
    chosen = list(layers)
    if not chosen or len(set(chosen)) != len(chosen):
        raise ArgumentError(f"expected one or more distinct layers, got {chosen}")
    for layer in chosen:
        cache._check_layer(layer)
    return chosen


def _check_tables(cache: CacheReads, tables: PageTables) -> None:
    if tables is not cache.tables:
        raise ArgumentError("this ranking reads another cache than the one these tables belong to")


def _softmax_weights(logits: Array, members: Int64) -> Array:
    """Return ``exp(logit - largest of the sequence)``, ``[heads, n]``."""
    starts = _starts(members)
    if not starts.size:
        return logits
    peaks = np.maximum.reduceat(logits, starts, axis=1)
    return np.asarray(np.exp(logits - np.repeat(peaks, _counts(starts, members), axis=1)))


def _votes(weights: Array, members: Int64) -> Array:
    """Let every row spread one vote over the blocks of each sequence, and average: ``[n]``.

    ``weights`` is ``[rows, n]``, not negative, blocks sequence by sequence; a row of zeros votes
    for nobody.
    """
    starts = _starts(members)
    if not starts.size:
        return np.zeros(0)
    sums = np.add.reduceat(weights, starts, axis=1)
    shares = weights / np.repeat(np.where(sums > 0, sums, 1), _counts(starts, members), axis=1)
    return np.asarray(shares.mean(axis=0))


def _starts(members: Int64) -> Int64:
    return np.flatnonzero(np.diff(members, prepend=-1))


def _counts(starts: Int64, members: Int64) -> Int64:
    return np.diff(starts, append=members.size)
