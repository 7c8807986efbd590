"""What may be encoded: checks of a batch of vectors, before anything is written."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import (
    ArgumentError,
    ArgumentTypeError,
    NonFiniteError,
    NotUnitNormError,
    OverflowingError,
)

#: Vectors with a larger norm are refused: their stored norm might not fit fp16.
MAX_NORM = 32752.0
#: Tolerance of the strict unit-norm mode.
UNIT_TOLERANCE = 1e-5

Vectors = npt.NDArray[np.float32]


def check_vectors(
    vectors: Any,
    shape: tuple[int, int],
    name: str,
    mean: Vectors | None,
    unit_norm: bool,
    max_norm: float = MAX_NORM,
) -> None:
    """Check vectors of shape ``float32[T, *shape]``.

    Parameters
    ----------
    vectors : array
        What is to be encoded.
    shape : (int, int)
        KV heads and head dimension.
    name : str
        The stream, for messages.
    mean : float32[H, d] or None
        What will be subtracted.
    unit_norm : bool
        Whether norms (of the vectors as they come) must be 1.
    max_norm : float
        Largest norm that can be stored.

    Raises
    ------
    ArgumentTypeError
        If it is not a float32 array.
    ArgumentError
        If the shape is wrong.
    NonFiniteError
        If there is NaN or infinity.
    OverflowingError
        If a norm, less the mean, exceeds ``max_norm``.
    NotUnitNormError
        With ``unit_norm``, if a norm is off by more than 1e-5.
    """
    if not isinstance(vectors, np.ndarray) or vectors.dtype != np.float32:
        got = getattr(vectors, "dtype", type(vectors).__name__)
        raise ArgumentTypeError(f"{name} vectors must be a float32 array, got {got}")
    if vectors.ndim != 3 or vectors.shape[1:] != shape:
        raise ArgumentError(
            f"{name} vectors must have shape [T, {shape[0]}, {shape[1]}], got {vectors.shape}"
        )
    if vectors.size == 0:
        return
    # NaN survives max and min, so two passes also find what is not finite.
    largest = max(float(vectors.max()), -float(vectors.min()))
    if not math.isfinite(largest):
        token, head, channel = np.argwhere(~np.isfinite(vectors))[0]
        raise NonFiniteError(
            f"expected finite {name} vectors, got {vectors[token, head, channel]} at token "
            f"{token}, head {head}, channel {channel}"
        )
    if mean is not None:
        largest += float(np.abs(mean).max())
    # Only large coordinates can make a large norm; nearly always that settles it.
    if largest * math.sqrt(shape[1]) > max_norm:
        _check_norms_fit(_norms(vectors, mean), name, max_norm)
    if unit_norm:
        _check_unit_norms(_norms(vectors, None), name)


def checked_mean(mean: npt.ArrayLike | None, shape: tuple[int, int]) -> Vectors | None:
    """Return a read-only float32 copy of a mean ``[H, d]``; None stays None.

    Raises
    ------
    ArgumentError
        If the shape is wrong.
    NonFiniteError
        If it is not finite.
    """
    if mean is None:
        return None
    array = np.array(mean, np.float32)
    if array.shape != shape:
        raise ArgumentError(f"mean must have shape [{shape[0]}, {shape[1]}], got {array.shape}")
    if not np.isfinite(array).all():
        raise NonFiniteError("expected a finite mean, got NaN or infinity")
    array.setflags(write=False)
    return array


def _norms(vectors: Vectors, mean: Vectors | None) -> npt.NDArray[np.float64]:
    centred = vectors.astype(np.float64)
    if mean is not None:
        centred -= mean
    norms: npt.NDArray[np.float64] = np.sqrt(np.sum(np.square(centred), axis=2))
    return norms


def _check_norms_fit(norms: npt.NDArray[np.float64], name: str, max_norm: float) -> None:
    if norms.max() > max_norm:
        token, head = np.argwhere(norms > max_norm)[0]
        raise OverflowingError(
            f"the norm of a {name} vector must be at most {max_norm:.5g}, got "
            f"{norms[token, head]:.6g} at token {token}, head {head}"
        )


def _check_unit_norms(norms: npt.NDArray[np.float64], name: str) -> None:
    off = np.abs(norms - 1.0) > UNIT_TOLERANCE
    if off.any():
        token, head = np.argwhere(off)[0]
        norm = float(norms[token, head])
        raise NotUnitNormError(
            f"expected {name} vectors of norm 1 within {UNIT_TOLERANCE}, got {norm:.7g} at token "
            f"{token}, head {head}",
            norm,
        )
