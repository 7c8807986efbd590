"""What a forward call brings: how many tokens per row, and where the padding is."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import ArgumentError

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]


class Arrival(NamedTuple):
    """Tokens that come with one forward call, checked.

    Attributes
    ----------
    rows, num_tokens : int
        Shape of the padded input.
    pads : ndarray of int64 ``[rows]``
        Leading pads of each row, those of earlier calls included.
    counts : ndarray of int64 ``[rows]``
        New real tokens of each row.
    places : ndarray of int64 ``[sum(counts)]`` or None
        Where the real tokens lie in the flattened ``[rows * num_tokens]`` input; None if they are
        all of it.
    """

    rows: int
    num_tokens: int
    pads: Int64
    counts: Int64
    places: Int64 | None


def check_arrival(
    rows: int, num_tokens: int, mask: npt.NDArray[np.bool_] | None, length: int, old: Int64
) -> Arrival:
    """Check the padding of a forward call against that of earlier ones.

    Parameters
    ----------
    rows, num_tokens : int
        Shape of the call's input.
    mask : ndarray of bool ``[rows, length + num_tokens]`` or None
        False for pads.
    length : int
        Padded length before the call.
    old : ndarray of int64 ``[rows]``
        Pads of each row before the call.

    Raises
    ------
    ArgumentError
        A mask of another shape, with holes, or with other padding than before.
    """
    total = length + num_tokens
    if mask is not None:
        pads = _leading_pads(rows, total, mask)
        # A row that has tokens keeps its pads; one that is all pads so far may have more.
        changed = np.where(old < length, pads != old, pads < length)
        if changed.any():
            row = int(changed.argmax())
            raise ArgumentError(
                f"attention_mask of row {row} has {pads[row]} pads, it had {old[row]} in earlier "
                f"calls; call reset() for a new batch"
            )
    elif old.any():
        raise ArgumentError(
            f"the batch has padding, so attention_mask must be given, of shape [{rows}, {total}]"
        )
    else:
        pads = old
    counts = total - np.maximum(pads, length)
    places = None
    if int(counts.sum()) != rows * num_tokens:
        places = np.flatnonzero(np.arange(num_tokens) >= (num_tokens - counts)[:, None])
    return Arrival(rows, num_tokens, pads, counts, places)


def _leading_pads(rows: int, total: int, mask: Array) -> Int64:
    if mask.shape != (rows, total):
        raise ArgumentError(
            f"attention_mask must have shape [{rows}, {total}] (all tokens so far and the new "
            f"ones), got {list(mask.shape)}"
        )
    pads = np.where(mask.any(axis=1), mask.argmax(axis=1), total).astype(np.int64)
    holes = (mask != (np.arange(total) >= pads[:, None])).any(axis=1)
    if holes.any():
        raise ArgumentError(
            f"attention_mask of row {int(holes.argmax())} has a 0 behind a 1: only left padding "
            f'is supported (tokenizer.padding_side = "left")'
        )
    return pads
