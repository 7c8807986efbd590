"""Means of keys, for key centring: gathered from real tokens, refused where they mean nothing.

Subtracting a fixed vector ``mu`` from every key of a head lowers all logits of a query by the same
``q . mu``, so softmax does not change; what is left to encode is smaller (SageAttention, arXiv
2410.02367, section 4.2, calls it smoothing K).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError, NonFiniteError
from .validation import check_vectors

#: Fewest tokens that means are made from.
MIN_TOKENS = 128

# A head whose keys vary by less than this share of their size holds one key, many times.
_LEAST_SPREAD = 1e-6


class KeyMeanAccumulator:
    """Sums keys layer by layer, in float64.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim : int
        The model's shape.
    """

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        shape = num_layers, num_kv_heads, head_dim
        self.num_tokens = np.zeros(num_layers, np.int64)
        self._sums = np.zeros(shape)
        # Around the first tokens' mean: a large offset would swallow the spread.
        self._origin = np.zeros(shape)
        self._squares = np.zeros(shape[:2])

    def add(self, layer: int, keys: npt.NDArray[np.float32]) -> None:
        """Add keys ``float32[n, num_kv_heads, head_dim]`` of one layer, as they are stored.

        Raises
        ------
        ArgumentError, ArgumentTypeError, NonFiniteError
            For a layer that does not exist, another shape or type, NaN or infinity; nothing was
            added.
        """
        if not 0 <= layer < len(self._sums):
            raise ArgumentError(f"layer must be in [0, {len(self._sums) - 1}], got {layer}")
        heads, dim = self._sums.shape[1:]
        check_vectors(keys, (heads, dim), "key", None, False, np.inf)
        if not len(keys):
            return
        if not self.num_tokens[layer]:
            self._origin[layer] = keys.mean(axis=0, dtype=np.float64)
        centred = keys.astype(np.float64) - self._origin[layer]
        self._sums[layer] += centred.sum(axis=0)
        self._squares[layer] += np.square(centred).sum(axis=(0, 2))
        self.num_tokens[layer] += len(keys)

    def means(self, min_tokens: int = MIN_TOKENS) -> npt.NDArray[np.float32]:
        """Return the means, ``float32[num_layers, num_kv_heads, head_dim]``.

        Parameters
        ----------
        min_tokens : int
            Fewest tokens that are enough.

        Raises
        ------
        ArgumentError
            If a layer has seen fewer tokens, or the keys of a head are all the same: the mean
            would be that key, and say nothing of others.
        NonFiniteError
            If a mean does not fit float32.
        """
        fewest = int(self.num_tokens.argmin())
        if self.num_tokens[fewest] < min_tokens:
            raise ArgumentError(
                f"key means need at least {min_tokens} tokens, layer {fewest} has seen "
                f"{self.num_tokens[fewest]}; calibrate on a longer text"
            )
        counts: npt.NDArray[Any] = self.num_tokens[:, None, None].astype(np.float64)
        shift = self._sums / counts
        means = self._origin + shift
        spread = self._squares / counts[:, :, 0] - np.square(shift).sum(axis=2)
        size = np.square(means).sum(axis=2)
        same = np.argwhere(spread <= _LEAST_SPREAD**2 * size)
        if len(same):
            layer, head = same[0]
            raise ArgumentError(
                f"all keys of layer {layer}, head {head} are the same; calibrate on real text"
            )
        with np.errstate(over="ignore"):
            rounded: npt.NDArray[np.float32] = means.astype(np.float32)
        if not np.isfinite(rounded).all():
            raise NonFiniteError("a key mean does not fit float32")
        return rounded
