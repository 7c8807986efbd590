"""Scores of one query token per sequence: keys in pages by the kernel, exact ones beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..paging.table_views import Reads
from .cuda_operands import Operands
from .cuda_window import CudaWindow
from .device import DeviceArray
from .dtypes import check_shape
from .host_score import PageStats, Scores
from .score_places import page_stats as stats_launch
from .score_places import score_starts, stats_places

if TYPE_CHECKING:
    from .cuda import CudaBackend
    from .cuda_plan import AttendPlan

Array = npt.NDArray[Any]

# Elements of one piece of products of exact keys.
_PIECE_ELEMENTS = 1 << 24


class ScorePlaces(NamedTuple):
    """Which positions are scored, and where; all on the host.

    Attributes
    ----------
    owners, positions : ndarray of int64 ``[total]``
        Sequence and position of each score.
    sinks, ring : ndarray of bool ``[total]``
        Which of them are read from the exact window.
    indptr : ndarray of int64 ``[batch + 1]``
        Where each sequence begins.
    """

    owners: Array
    positions: Array
    sinks: Array
    ring: Array
    indptr: Array


def score_places(table: Array, reads: Reads, page_size: int, exact: bool) -> ScorePlaces:
    """List what is readable of a batch, in order; ``exact``: sinks and ring too."""
    kv_lens, first, stop, keep, start = (field[:, None] for field in reads)
    place = np.arange(int(reads.kv_lens.max(initial=0)))
    blocks = np.minimum(place // page_size, max(0, table.shape[1] - 1))
    resident = table[:, blocks] != 0 if table.shape[1] else np.zeros((len(table), 0), bool)
    allowed = (place < keep) | (place >= start)
    body = (place >= first) & (place < stop) & allowed & resident
    sinks = (place < first) & allowed
    ring = (place >= stop) & (place < kv_lens)
    chosen = body | sinks | ring if exact else body
    owners, positions = np.nonzero(chosen)
    indptr = np.concatenate([[0], chosen.sum(axis=1).cumsum()]).astype(np.int64)
    return ScorePlaces(owners, positions, sinks[chosen], ring[chosen], indptr)


def score(
    backend: CudaBackend,
    plan: AttendPlan,
    layer: int,
    queries: Any,
    table: Array,
    reads: Reads,
    window: tuple[Array, Array] | None,
) -> Scores:
    """Score as `CudaBackend.score` does; arguments are checked, the plan is up to date."""
    store = backend.layer(layer).window
    places = score_places(table, reads, backend.config.page_size, window is not None)
    _, block_starts = score_starts(table, reads, backend.config.page_size)
    if window is not None:
        # The kernel leaves room for the sinks of each sequence; its ring comes last.
        block_starts = block_starts + np.bincount(
            places.owners, places.sinks, len(reads.kv_lens)
        ).astype(np.int64).reshape(-1, 1)
    values = plan.score(layer, queries, places.indptr, block_starts)
    if window is not None and store is not None:
        array, kind = backend.operands.queries(queries)
        with backend.device.active():
            wide = array.astype(np.float32)
            if kind == "bf16":
                wide = (array.astype(np.uint32) << np.uint32(16)).view(np.float32)
        for ring, chosen, slots in (
            (False, places.sinks, window[1]),
            (True, places.ring, window[0]),
        ):
            _fill(backend, store, values, wide, places, ring, np.flatnonzero(chosen), slots)
    return Scores(values, places.indptr, places.positions)


def page_stats(operands: Operands, scores: Scores, page_size: int, sm_scale: float) -> PageStats:
    """Reduce scores on the device; what comes to the host is a number or two per head and page."""
    device = operands.device
    check_shape(
        scores.values, "scores.values", (None, len(scores.positions)), "query heads, positions"
    )
    values = operands.floats(scores.values, "scores.values")
    batch = len(scores.indptr) - 1
    blocks = scores.positions // page_size
    stride = int(blocks.max(initial=-1)) + 1
    owners = np.repeat(np.arange(batch), np.diff(scores.indptr))
    counts = np.bincount(owners * stride + blocks, minlength=batch * stride).reshape(batch, stride)
    pages = stats_places(counts)
    shape = (len(scores.values), int(pages.indptr[-1]))
    maximum, mass = (device.empty(shape, np.float32) for _ in range(2))
    if shape[1]:
        starts = scores.indptr, (counts.cumsum(axis=1) - counts).astype(np.int64)
        places = device.upload(starts[0]), device.upload(starts[1])
        device.launch(
            stats_launch(values, places, device.upload(pages.numbers), maximum, mass, sm_scale)
        )
    return PageStats(device.download(maximum), device.download(mass), pages.indptr, pages.blocks)


def _fill(
    backend: CudaBackend,
    window: CudaWindow,
    values: DeviceArray,
    queries: DeviceArray,
    places: ScorePlaces,
    ring: bool,
    columns: Array,
    slots: Array,
) -> None:
    """Write the scores of rows of the exact window into their columns."""
    upload = backend.device.upload
    per_piece = max(1, _PIECE_ELEMENTS // int(np.prod(queries.shape[1:])))
    for begin in range(0, columns.size, per_piece):
        piece = columns[begin : begin + per_piece]
        owners = places.owners[piece]
        keys, _ = window.positions(ring, slots[owners], places.positions[piece])
        heads, dim = keys.shape[1:]
        rows, into = upload(owners), upload(piece)
        with backend.device.active():
            grouped = queries[rows].reshape(piece.size, heads, -1, dim)
            products = (grouped * keys[:, :, None]).sum(axis=3).reshape(piece.size, -1)
            values[:, into] = products.T
