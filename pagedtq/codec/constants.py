"""How much memory codecs take for what never changes: tables, rotations, projections, means."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt


def constant_bytes(codecs: object) -> int:
    """Return the bytes of all arrays that codecs hold, each array once.

    Arrays are found by following attributes, so that nothing a codec keeps can be forgotten here.

    Parameters
    ----------
    codecs : object
        Codecs, in lists or tuples of any depth; None stands for a stream without one.
    """
    seen: dict[int, object] = {}
    arrays: dict[int, npt.NDArray[Any]] = {}
    waiting = [codecs]
    while waiting:
        item = waiting.pop()
        if id(item) in seen:
            continue
        # Kept, so that no id is used a second time.
        seen[id(item)] = item
        if isinstance(item, np.ndarray):
            while isinstance(item.base, np.ndarray):
                item = item.base
            arrays[id(item)] = item
        elif isinstance(item, list | tuple):
            waiting += item
        elif hasattr(item, "__dict__") and not isinstance(item, type):
            waiting += vars(item).values()
    return sum(array.nbytes for array in arrays.values())
