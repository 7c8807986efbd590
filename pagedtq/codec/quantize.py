"""Nearest magnitudes of a codebook, exactly, for planes of coordinates.

The magnitude index of a coordinate is the number of midpoints ``m`` with ``|u| >= m``, a float32
comparison. Narrow codes count comparisons; wide ones look the count up by ``|u|`` cut into cells
narrower than any gap between midpoints, and settle it with the one comparison that is left.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from .codebook import Codebook
from .planar import Array, scratch

#: From this width on the lookup is faster than the comparisons.
LOOKUP_WIDTH = 6


class MagnitudeQuantizer:
    """Turns coordinates into magnitude indices of one codebook.

    Parameters
    ----------
    book : Codebook
        Its midpoints decide.
    """

    def __init__(self, book: Codebook) -> None:
        self.book = book
        if book.width < LOOKUP_WIDTH:
            return
        midpoints = book.midpoints.astype(np.float64)
        # A power of two, so that the product |u| * cells_per_unit is exact.
        self._cells_per_unit = 2.0 ** math.ceil(-math.log2(np.diff(midpoints).min()))
        cells = math.ceil(midpoints[-1] * self._cells_per_unit) + 1
        lower = np.arange(cells) / self._cells_per_unit
        passed = np.searchsorted(midpoints, lower, side="right")
        self._passed = passed.astype(np.uint8)
        self._next = np.append(midpoints, np.inf)[passed].astype(np.float32)

    def indices(self, magnitudes: Array, out: npt.NDArray[np.uint8]) -> None:
        """Write the magnitude indices of ``|u|``.

        Parameters
        ----------
        magnitudes : float32[...]
            Absolute coordinates, contiguous.
        out : uint8[...]
            Same shape, contiguous.
        """
        self._count(magnitudes, out, None)

    def indices_and_energy(
        self, magnitudes: Array, out: npt.NDArray[np.uint8]
    ) -> npt.NDArray[np.int64]:
        """Write magnitude indices and sum ``odd_steps[index]**2`` down the planes.

        The sums are integers, so their order does not matter. Only for widths 1 to 4.

        Parameters
        ----------
        magnitudes, out
            As for `indices`, of shape ``[planes, n]``.

        Returns
        -------
        int64[n]
        """
        assert self.book.odd_steps is not None
        squares = np.square(self.book.odd_steps.astype(np.int64))
        energy = np.full(magnitudes.shape[1], squares[0] * magnitudes.shape[0])
        self._count(magnitudes, out, (energy, np.diff(squares)))
        return energy

    def _count(
        self,
        magnitudes: Array,
        out: npt.NDArray[np.uint8],
        energy: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None,
    ) -> None:
        if self.book.width >= LOOKUP_WIDTH:
            self._look_up(magnitudes, out)
            return
        # Per plane at most one passes, so a byte holds the count of up to 255 planes.
        narrow = np.uint8 if magnitudes.shape[0] < 256 else np.uint16
        passed = scratch("passed", magnitudes.size, np.bool_).reshape(magnitudes.shape)
        out[...] = 0
        for i, midpoint in enumerate(self.book.midpoints):
            np.greater_equal(magnitudes, midpoint, out=passed)
            np.add(out, passed.view(np.uint8), out=out)
            if energy is not None:
                total, increments = energy
                total += increments[i] * np.add.reduce(passed.view(np.uint8), 0, narrow)

    def _look_up(self, magnitudes: Array, out: npt.NDArray[np.uint8]) -> None:
        scaled = scratch("scaled", magnitudes.size, np.float32).reshape(magnitudes.shape)
        cell = scratch("cell", magnitudes.size, np.intp).reshape(magnitudes.shape)
        passed = scratch("passed", magnitudes.size, np.bool_).reshape(magnitudes.shape)
        np.multiply(magnitudes, np.float32(self._cells_per_unit), out=scaled)
        np.minimum(scaled, np.float32(self._passed.size - 1), out=scaled)
        # Truncation is the floor: nothing here is negative.
        np.copyto(cell, scaled, casting="unsafe")
        np.take(self._passed, cell, out=out, mode="clip")
        np.take(self._next, cell, out=scaled, mode="clip")
        np.greater_equal(magnitudes, scaled, out=passed)
        np.add(out, passed.view(np.uint8), out=out)
