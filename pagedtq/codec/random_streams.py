"""All randomness of the codec: SplitMix64 as a counter, so that any entry can be drawn alone.

Entry ``i`` of the stream with key ``k`` is ``mix(k + (i + 1) * GOLDEN) mod 2**64``, which is the
``i``-th output of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) seeded with ``k``. A stream key
folds seed, layer, stream number and *global* head index, one ``mix`` each; so a head's stream does
not depend on how heads are spread over ranks.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError

GOLDEN = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1

#: Numbers of the named streams; part of the format, never renumbered.
STREAMS = {"key": 1, "value": 2, "key_qjl": 3}

#: Gaussians are multiples of this: coarse enough that a last-bit difference between two platforms'
#: logarithms cannot show, exact in float32 (|g| < 9 needs 20 significant bits), and its rounding
#: changes the variance by 2**-32 / 12.
GAUSSIAN_STEP = 2.0**-16


def stream_key(seed: int, layer: int, stream: str, head: int) -> int:
    """Return the 64-bit key of one head's stream.

    Parameters
    ----------
    seed : int
        The cache's seed.
    layer, head : int
        Layer index and global KV head index.
    stream : {"key", "value", "key_qjl"}
        What the stream is for.

    Raises
    ------
    ArgumentError
        If there is no such stream.
    """
    if stream not in STREAMS:
        raise ArgumentError(f"stream must be one of {', '.join(STREAMS)}; got {stream!r}")
    key = _mix_int(seed + GOLDEN)
    for word in (layer, STREAMS[stream], head):
        key = _mix_int((key ^ word) + GOLDEN)
    return key


def random_words(key: int, count: int, start: int = 0) -> npt.NDArray[np.uint64]:
    """Return entries ``start .. start + count - 1`` of a stream as ``uint64[count]``."""
    state = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    state *= np.uint64(GOLDEN)
    state += np.uint64(key)
    state ^= state >> np.uint64(30)
    state *= np.uint64(_MIX_1)
    state ^= state >> np.uint64(27)
    state *= np.uint64(_MIX_2)
    state ^= state >> np.uint64(31)
    return state


def random_signs(key: int, count: int) -> npt.NDArray[np.float32]:
    """Return ``float32[count]`` of +1 and -1: -1 where the top bit of the word is set."""
    top = random_words(key, count) >> np.uint64(63)
    return (1.0 - 2.0 * top.astype(np.float32)).astype(np.float32)


def random_gaussians(key: int, count: int) -> npt.NDArray[np.float64]:
    """Return ``float64[count]`` standard normals, multiples of ``GAUSSIAN_STEP``.

    Box-Muller in float64: words ``2 i`` and ``2 i + 1``, shifted right by 11 to 53 bits, give
    ``u = (a + 1) / 2**53`` and ``v = b / 2**53``; normals ``2 i`` and ``2 i + 1`` are
    ``sqrt(-2 log u)`` times ``cos(2 pi v)`` and ``sin(2 pi v)``, rounded to the step.
    """
    words = (random_words(key, count + count % 2) >> np.uint64(11)).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log((words[0::2] + 1.0) * 2.0**-53))
    angle = (2.0 * np.pi * 2.0**-53) * words[1::2]
    normals = np.stack((radius * np.cos(angle), radius * np.sin(angle)), axis=1).reshape(-1)
    return np.rint(normals[:count] / GAUSSIAN_STEP) * GAUSSIAN_STEP


def _mix_int(z: int) -> int:
    z &= _MASK
    z = (z ^ (z >> 30)) * _MIX_1 & _MASK
    z = (z ^ (z >> 27)) * _MIX_2 & _MASK
    return z ^ (z >> 31)
