"""Work arrays of the host backend: per thread, by name, reused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..codec.planar import scratch

# Above this an array is allocated afresh, so that one huge call does not keep its memory.
_KEEP_BYTES = 1 << 25


def work_array(name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return an uninitialised array that lasts until this thread asks for the same name.

    Fresh arrays of a megabyte cost more in page faults than in arithmetic.
    """
    size = math.prod(shape)
    if size * np.dtype(dtype).itemsize > _KEEP_BYTES:
        return np.empty(shape, dtype)
    return scratch("host." + name, size, dtype).reshape(shape)
