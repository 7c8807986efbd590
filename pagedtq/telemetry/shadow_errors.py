"""How far what a cache reads lies from its exact shadow: histograms per layer, and the report."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from .quantiles import ErrorQuantiles, LogHistogram

Array = npt.NDArray[Any]


class LayerErrors(msgspec.Struct, frozen=True, kw_only=True):
    """Errors of one layer, or of all of them.

    Attributes
    ----------
    layer : int or None
        The layer; None for all.
    output : ErrorQuantiles
        ``|out - exact| / |exact|`` (L2 over ``head_dim``) per query token and head of `attend`.
    lse : ErrorQuantiles
        ``|lse - exact|`` per query token and head of `attend`.
    logit : ErrorQuantiles
        ``|q . k - exact| / sqrt(head_dim)`` per head and position of `score`.
    """

    layer: int | None
    output: ErrorQuantiles
    lse: ErrorQuantiles
    logit: ErrorQuantiles


class ShadowReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the shadows have seen.

    Attributes
    ----------
    schema : int
        Version of this report.
    fraction : float
        Share of sequences that get a shadow.
    opened, shadowed, dropped : int
        Sequences opened so far (forks too), those with a shadow now, and shadows given up because
        their pool was full.
    shadow_bytes : int
        Memory allocated for shadows.
    total : LayerErrors
        All layers together.
    layers : list of LayerErrors
        Each layer that has shadows.
    """

    schema: int
    fraction: float
    opened: int
    shadowed: int
    dropped: int
    shadow_bytes: int
    total: LayerErrors
    layers: list[LayerErrors]


class LayerHistograms:
    """The errors of one layer so far; `LayerErrors` says which."""

    def __init__(self) -> None:
        self._histograms = {metric: LogHistogram() for metric in ("output", "lse", "logit")}

    def add_states(self, states: tuple[Array, Array], exact: tuple[Array, Array]) -> None:
        """Compare attention states.

        Parameters
        ----------
        states, exact : tuple of ndarray ``[n, num_q_heads, head_dim]`` and ``[n, num_q_heads]``
            ``out, lse`` of the cache and of the shadow. Where the exact output is 0, or nothing is
            readable, there is no error to speak of.
        """
        (out, lse), (exact_out, exact_lse) = states, exact
        size = np.linalg.norm(exact_out, axis=-1)
        error = np.linalg.norm(out - exact_out, axis=-1)
        self._histograms["output"].add(error[size > 0] / size[size > 0])
        readable = np.isfinite(exact_lse)
        self._histograms["lse"].add(np.abs(lse[readable] - exact_lse[readable]))

    def add_scores(self, scores: Array, exact: Array, head_dim: int) -> None:
        """Compare inner products of any shape."""
        self._histograms["logit"].add(np.abs(scores - exact) / np.sqrt(head_dim))

    def merge(self, other: LayerHistograms) -> None:
        """Add the errors of another layer."""
        for metric, histogram in self._histograms.items():
            histogram.merge(other._histograms[metric])

    def summary(self, layer: int | None) -> LayerErrors:
        """Return the quantiles; ``layer`` is what they are of, None for all layers."""
        quantiles = {metric: histogram.summary() for metric, histogram in self._histograms.items()}
        return LayerErrors(layer=layer, **quantiles)
