"""Codebooks: Lloyd-Max quantizers of a rotated coordinate, rounded to what pages and kernels hold.

A coordinate of a uniformly random unit vector, times ``sqrt(d)``, has the density

    p(u) = Gamma(d/2) / (sqrt(pi d) Gamma((d-1)/2)) * (1 - u**2/d)**((d-3)/2),    u**2 <= d,

of variance 1, which tends to N(0, 1). It is symmetric, so a codebook of width ``w`` is
``n = 2**(w-1)`` ascending magnitudes, and a code is ``sign << (w-1) | magnitude index``.

Widths 1 to 4 ship magnitudes ``(j + 1/2) * unit`` with integers ``j`` in 0..127, which 8-bit and
fp16 kernels read exactly; widths 5 to 8 ship the optimum rounded to fp16. The decoder multiplies
``table[code]``, magnitudes divided by a power of two (and by ``unit``), with the stored norm, into
which ``factor`` is folded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ..errors import ArgumentError

#: Widths whose magnitudes are half-integers times a unit, and the largest such integer.
HALF_INTEGER_WIDTHS = (1, 2, 3, 4)
MAX_STEP = 127

#: The density beyond this many standard deviations is below 1e-40 and is left out.
_CUTOFF = 14.0
_PANELS, _NODES = 8, 24

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Codebook:
    """A shipped codebook and what to expect of it.

    Attributes
    ----------
    head_dim, width : int
        Dimension of the density, bits of a code.
    magnitudes : float64[2**(width-1)]
        Decoded magnitudes for a coordinate of variance 1, as shipped (rounded).
    optimum : float64[2**(width-1)]
        The Lloyd-Max magnitudes before rounding.
    midpoints : float32[2**(width-1) - 1]
        Decision levels, midway between the shipped magnitudes (exact); a magnitude equal to a
        level belongs to the upper cell.
    odd_steps : int32[2**(width-1)] or None
        ``2 j + 1`` for widths 1 to 4, whose magnitudes are ``odd_steps * unit / 2``.
    table : float32[2**width]
        By code; magnitudes over ``unit * 2**exponent`` (``unit`` is 1 for widths 5 to 8).
    exponent : int
        Chosen so that ``factor`` lies in [0.5, 1).
    factor : float32
        ``unit * 2**exponent / sqrt(head_dim)``: ``norm * factor * table[code]`` is a coordinate.
    distortion, optimal_distortion : float
        Expected squared error per unit squared norm, of this codebook and of ``optimum``.
    """

    head_dim: int
    width: int
    magnitudes: Floats
    optimum: Floats
    midpoints: npt.NDArray[np.float32]
    odd_steps: npt.NDArray[np.int32] | None
    table: npt.NDArray[np.float32]
    exponent: int
    factor: np.float32
    distortion: float
    optimal_distortion: float


@lru_cache(maxsize=256)
def codebook(head_dim: int, width: int) -> Codebook:
    """Return the codebook of a dimension and width; its arrays are read-only.

    Parameters
    ----------
    head_dim : int
        At least 3.
    width : int
        1 to 8.

    Raises
    ------
    ArgumentError
        If either is out of range.
    """
    if head_dim < 3:
        raise ArgumentError(f"head_dim must be at least 3, got {head_dim}")
    if not 1 <= width <= 8:
        raise ArgumentError(f"codebook width must be in [1, 8], got {width}")
    optimum = lloyd_max(head_dim, width)
    magnitudes: Floats
    odd_steps = None
    if width in HALF_INTEGER_WIDTHS:
        odd_steps, unit = _half_integer_magnitudes(head_dim, optimum)
        magnitudes = odd_steps.astype(np.float64) * (unit / 2)
        relative = odd_steps / 2
    else:
        unit = 1.0
        magnitudes = relative = optimum.astype(np.float16).astype(np.float64)
    # frexp gives a fraction in [0.5, 1): that is the factor, and its exponent goes to the table.
    _, exponent = math.frexp(unit / math.sqrt(head_dim))
    exponent = -exponent
    relative = np.ldexp(relative, -exponent)
    book = Codebook(
        head_dim=head_dim,
        width=width,
        magnitudes=magnitudes,
        optimum=optimum,
        midpoints=((magnitudes[1:] + magnitudes[:-1]) / 2).astype(np.float32),
        odd_steps=odd_steps,
        table=np.concatenate((relative, -relative)).astype(np.float32),
        exponent=exponent,
        factor=np.float32(math.ldexp(unit / math.sqrt(head_dim), exponent)),
        distortion=distortion(head_dim, magnitudes),
        optimal_distortion=distortion(head_dim, optimum),
    )
    for array in (magnitudes, optimum, book.midpoints, odd_steps, book.table):
        if array is not None:
            array.setflags(write=False)
    return book


def density(head_dim: int, u: npt.ArrayLike) -> Floats:
    """Evaluate the density of ``sqrt(d)`` times a coordinate of a random unit vector.

    It is proportional to ``(1 - u**2 / d)**((d - 3) / 2)`` (TurboQuant, Lemma 1, rescaled).

    Parameters
    ----------
    head_dim : int
        Dimension ``d`` of the vector.
    u : float64 array of any shape
        Where to evaluate it; 0 outside ``[-sqrt(d), sqrt(d)]``.
    """
    scaled = np.square(np.asarray(u, np.float64)) / head_dim
    log_scale = (
        math.lgamma(head_dim / 2)
        - math.lgamma((head_dim - 1) / 2)
        - 0.5 * math.log(math.pi * head_dim)
    )
    inside = scaled < 1.0
    log_shape = (head_dim - 3) / 2 * np.log1p(-np.where(inside, scaled, 0.0))
    return np.where(inside, np.exp(log_scale + log_shape), 0.0)


def distortion(head_dim: int, magnitudes: npt.ArrayLike) -> float:
    """Return the exact mean squared error of a symmetric quantizer of the density.

    Parameters
    ----------
    head_dim : int
        Dimension of the density.
    magnitudes : float64[2**(width-1)]
        The positive levels, ascending; cells end half-way between neighbours.
    """
    levels = np.asarray(magnitudes, np.float64)
    nodes, weights = _cells(head_dim, levels)
    return float(2.0 * np.sum(weights * np.square(nodes - levels[:, None])))


def lloyd_max(head_dim: int, width: int) -> Floats:
    """Return the magnitudes of the optimal quantizer, ``float64[2**(width-1)]``.

    Newton's method on the conditions "each magnitude is the mean of its cell" (a tridiagonal
    system), started from the asymptotic optimum, whose point density is ``p**(1/3)`` (Panter and
    Dite). Plain Lloyd iteration needs over 15 000 rounds at 6 bits.

    Parameters
    ----------
    head_dim : int
        Dimension of the density.
    width : int
        Bits of a code.
    """
    levels = _compander(head_dim, 1 << (width - 1))
    loss = distortion(head_dim, levels)
    for _ in range(200):
        nodes, weights = _cells(head_dim, levels)
        mass = weights.sum(axis=1)
        moment = (weights * (nodes - levels[:, None])).sum(axis=1)
        # d(moment)/d(levels): moving a level moves both borders of its cell by half as much.
        half_gap = np.diff(levels) / 2
        border = half_gap * density(head_dim, levels[:-1] + half_gap) / 2
        diagonal = np.append(border, 0.0) + np.insert(border, 0, 0.0) - mass
        step = -_solve_tridiagonal(diagonal, border, moment)
        if _ascending(levels + step) and distortion(head_dim, levels + step) <= loss:
            levels = levels + step
        elif np.max(np.abs(step)) > 1e-6:
            # Far from the solution: a Lloyd step always improves, and tames the outer cells first.
            levels = levels + moment / mass
        else:
            break
        loss = distortion(head_dim, levels)
    return levels


def _solve_tridiagonal(diagonal: Floats, beside: Floats, right: Floats) -> Floats:
    """Solve a symmetric tridiagonal system by elimination, in a fixed order."""
    pivots, solution = diagonal.tolist(), right.tolist()
    for i, off in enumerate(beside.tolist()):
        ratio = off / pivots[i]
        pivots[i + 1] -= ratio * off
        solution[i + 1] -= ratio * solution[i]
    solution[-1] /= pivots[-1]
    for i in range(len(pivots) - 2, -1, -1):
        solution[i] = (solution[i] - beside[i] * solution[i + 1]) / pivots[i]
    return np.array(solution)


def _ascending(levels: Floats) -> bool:
    return bool(levels[0] > 0 and np.all(np.diff(levels) > 0))


def _limit(head_dim: int) -> float:
    return min(math.sqrt(head_dim), _CUTOFF)


def _compander(head_dim: int, count: int) -> Floats:
    grid = np.linspace(0.0, _limit(head_dim), 8193)
    mass = np.cbrt(density(head_dim, (grid[1:] + grid[:-1]) / 2))
    share = np.concatenate(([0.0], np.cumsum(mass))) / mass.sum()
    return np.interp((np.arange(count) + 0.5) / count, share, grid)


@lru_cache(maxsize=1)
def _legendre() -> tuple[Floats, Floats]:
    """Gauss-Legendre nodes and weights on [0, 1], repeated over equal panels."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    start = np.arange(_PANELS)[:, None]
    return (
        ((start + (nodes + 1.0) / 2.0) / _PANELS).reshape(-1),
        np.tile(weights / (2.0 * _PANELS), _PANELS),
    )


def _cells(head_dim: int, levels: Floats) -> tuple[Floats, Floats]:
    """Quadrature ``[cells, nodes]`` of the density over each cell of the positive half.

    With ``u = sqrt(d) sin(t)`` the density becomes a power of ``cos(t)``, smooth up to the edge.
    """
    root = math.sqrt(head_dim)
    edges = np.concatenate(([0.0], (levels[1:] + levels[:-1]) / 2, [_limit(head_dim)]))
    angles = np.arcsin(np.minimum(edges / root, 1.0))
    x, w = _legendre()
    width = np.diff(angles)[:, None]
    t = angles[:-1, None] + width * x
    nodes = root * np.sin(t)
    return nodes, w * width * density(head_dim, nodes) * root * np.cos(t)


def _half_integer_magnitudes(head_dim: int, optimum: Floats) -> tuple[npt.NDArray[np.int32], float]:
    """Find odd steps ``2 j + 1`` and the unit (12 significant bits) of least distortion.

    Every unit that puts the largest magnitude at ``j <= 127`` is tried; proportional vectors of
    steps are one quantizer, so their common factor is divided out (it is odd, and three times a
    small vector is a large one: the upper two thirds of the range cover everything).
    """
    scale = np.arange(MAX_STEP / 3, MAX_STEP + 0.5, 0.125) / optimum[-1]
    steps = 2 * np.floor(optimum * scale[:, None]).astype(np.int64) + 1
    steps = steps[np.all(np.diff(steps, axis=1) > 0, axis=1)]
    steps = np.unique(steps // np.gcd.reduce(steps, axis=1)[:, None], axis=0)
    # A rough ranking first: the closed form once, then its fixed point for the few best.
    units = [_best_unit(head_dim, odd / 2, 2 * optimum[-1] / odd[-1], 1) for odd in steps]
    losses = [distortion(head_dim, odd * (unit / 2)) for odd, unit in zip(steps, units)]
    ranked = []
    for i in np.argsort(losses, kind="stable")[:8]:
        unit = _round_significant(_best_unit(head_dim, steps[i] / 2, units[i], 100), 12)
        ranked.append((distortion(head_dim, steps[i] * (unit / 2)), int(i), unit))
    _, best, unit = min(ranked)
    return steps[best].astype(np.int32), unit


def _best_unit(head_dim: int, relative: Floats, unit: float, rounds: int) -> float:
    """Minimise the distortion over the unit: closed form given the cells, iterated."""
    for _ in range(rounds):
        nodes, weights = _cells(head_dim, relative * unit)
        column = relative[:, None]
        new = float(np.sum(weights * nodes * column) / np.sum(weights * column**2))
        if abs(new - unit) < 1e-14 * unit:
            break
        unit = new
    return unit


def _round_significant(value: float, bits: int) -> float:
    fraction, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(fraction, bits)), exponent - bits)
