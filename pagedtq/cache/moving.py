"""Moving all sequences of a cache into one of another size."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError
from .kv_cache import PagedKVCache

# Pages that are copied together: some tens of megabytes of slabs for a large model.
_PIECE_PAGES = 32


def move_sequences(source: PagedKVCache, target: PagedKVCache) -> npt.NDArray[np.int64]:
    """Copy all sequences of a cache into another one, byte for byte; forks still share pages.

    Parameters
    ----------
    source : PagedKVCache
        Where they are; unchanged, no step may be open.
    target : PagedKVCache
        Where they go. Its configuration may differ in ``num_pages``, ``num_window_slots`` and
        ``pool_order``; key means are the same.

    Returns
    -------
    ndarray of int64 ``[n]``
        Their ids in ``target``, in the order of ``source.tables.sequence_ids()``.

    Raises
    ------
    ArgumentError
        If the two store other bytes for the same tokens.
    OutOfPages, OutOfWindowSlots
        If ``target`` is too small; it is unchanged.
    StepError
        If a step is open in either.
    """
    _refuse_other_bytes(source, target)
    config = source.config
    overlay = [layer for layer in range(config.num_layers) if config.has_overlay(layer)]
    sealed_only = len(overlay) == config.num_layers
    image, pages, slots = source.tables.extract(source.tables.sequence_ids(), sealed_only)
    plan = target.tables.plan_adoption(image, sealed_only)
    filled = image.num_filled
    for begin in range(0, filled, _PIECE_PAGES):
        part = slice(begin, min(begin + _PIECE_PAGES, filled))
        target.backend.scatter(source.backend.gather(pages[part]), plan.pages[part])
    # As of any new page: a norm that was never written must not be NaN.
    target.backend.clear_norms(plan.pages[filled:])
    records = source.tables.windows.sink_record[pages[plan.first_pages]]
    for layer in overlay:
        old, new = source.backend.window(layer), target.backend.window(layer)
        for ring, count, owners, heirs in (
            (True, config.window_tokens, slots, plan.slots),
            (False, config.num_sinks, records, plan.records),
        ):
            rows = np.arange(count)
            for owner, heir in zip(owners.tolist(), heirs.tolist()):
                new.put_rows(ring, heir, rows, old.take_rows(ring, owner, rows))
    ids = target.tables.adopt(plan)
    if target.debug:
        target.check_integrity()
    return ids


def _refuse_other_bytes(source: PagedKVCache, target: PagedKVCache) -> None:
    ours, theirs = source.config.format_fields(), target.config.format_fields()
    changed = [name for name in ours if ours[name] != theirs[name]]
    # No means become an array of None, equal to none but its like.
    mine, other = np.asarray(source.backend.key_means), np.asarray(target.backend.key_means)
    if not np.array_equal(mine, other):
        changed.append("key_means")
    if changed:
        raise ArgumentError(f"the caches must store the same bytes, they differ in {changed}")
