"""What a compressed cache does to a model: next-token distributions and attention outputs.

Text is cut into windows of ``context`` tokens, each a sequence of its own, and positions of the
second half of each are scored: they have at least half the context behind them, so that an exact
window of some tokens cannot hide the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import numpy as np
import torch

from ..errors import ArgumentError
from .attention import Reading, reading
from .formats import Array, KVFormat


class HeadError(msgspec.Struct, frozen=True, kw_only=True):
    """Relative error (L2) of attention's output in one layer and query head, averaged."""

    layer: int
    head: int
    error: float


class Fidelity(msgspec.Struct, frozen=True, kw_only=True):
    """What one setting does to a model on a text.

    Attributes
    ----------
    name : str
        The setting.
    bytes_per_token : float
        Bytes of a sequence of ``context`` tokens over its tokens: all layers and heads, windows
        and slack of the last page included.
    compression : float
        16-bit bytes over these.
    perplexity, perplexity_change : float
        Of the scored tokens; relative to the exact cache.
    kl : float
        Mean Kullback-Leibler divergence of next-token distributions from the exact cache's, nats.
    kl_deviation : float
        Standard error of that mean over windows, nats.
    top1_agreement : float
        Share of positions where both put the same token first.
    output_error : float
        Relative error (L2) of attention outputs, mean over layers, heads and scored positions,
        from the same queries, keys and values.
    worst_heads : list of HeadError
        The five worst layers and heads.
    """

    name: str
    bytes_per_token: float
    compression: float
    perplexity: float
    perplexity_change: float
    kl: float
    kl_deviation: float
    top1_agreement: float
    output_error: float
    worst_heads: list[HeadError]


class Reference:
    """A model's exact next-token distributions on some windows of text.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    windows : ndarray of int64 ``[count, context]``
        Token ids.

    Raises
    ------
    ArgumentError
        If the windows are not a rectangle of at least 4 tokens a row.
    """

    def __init__(self, model: Any, windows: Array) -> None:
        if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 4:
            raise ArgumentError(f"windows must be [count, context >= 4], got {windows.shape}")
        self.model, self.windows = model, windows
        self.count, self.context = windows.shape
        self._log_probs = [self._next_tokens(window) for window in windows]

    def _next_tokens(self, window: Array) -> torch.Tensor:
        """Return log probabilities ``[scored, vocabulary]`` of positions that have a next token."""
        with torch.no_grad():
            ids = torch.from_numpy(window[None])
            logits = self.model(ids, use_cache=False).logits[0, self.context // 2 : -1]
        return torch.log_softmax(logits.double(), dim=-1)

    def _losses(self, log_probs: torch.Tensor, window: Array) -> torch.Tensor:
        following = torch.from_numpy(window[self.context // 2 + 1 :])
        return -log_probs.gather(1, following[:, None])[:, 0]

    @property
    def perplexity(self) -> float:
        """Of the scored tokens with an exact cache."""
        pairs = zip(self._log_probs, self.windows)
        losses = [float(self._losses(p, w).mean()) for p, w in pairs]
        return float(np.exp(np.mean(losses)))

    def divergence(self, how: Reading) -> float:
        """Return only the mean divergence, nats: what a search over settings needs."""
        return float(np.mean([float(kl.mean()) for kl, _, _ in self._compare(how)]))

    def measure(
        self, form: KVFormat, exact: KVFormat, advance: Callable[[], object] | None = None
    ) -> Fidelity:
        """Measure a setting for all layers.

        Parameters
        ----------
        form : KVFormat
            The setting.
        exact : KVFormat
            What compression is relative to.
        advance : callable, optional
            Called after every window.
        """
        errors = HeadErrors(self.context // 2)
        divergences, losses, agreements = [], [], []
        for kl, loss, same in self._compare(Reading(form, observe=errors)):
            divergences.append(float(kl.mean()))
            losses.append(float(loss.mean()))
            agreements.append(float(same.double().mean()))
            if advance is not None:
                advance()
        perplexity = float(np.exp(np.mean(losses)))
        held = form.sequence_bytes(self.context)
        spread = float(np.std(divergences, ddof=1)) if self.count > 1 else float("nan")
        return Fidelity(
            name=form.name,
            bytes_per_token=held / self.context,
            compression=exact.sequence_bytes(self.context) / held,
            perplexity=perplexity,
            perplexity_change=perplexity / self.perplexity - 1,
            kl=float(np.mean(divergences)),
            kl_deviation=spread / self.count**0.5,
            top1_agreement=float(np.mean(agreements)),
            output_error=errors.mean(),
            worst_heads=errors.worst(5),
        )

    def _compare(self, how: Reading) -> Iterable[tuple[torch.Tensor, ...]]:
        for window, wanted in zip(self.windows, self._log_probs):
            with reading(self.model, how):
                got = self._next_tokens(window)
            kl = (wanted.exp() * (wanted - got)).sum(dim=1)
            yield kl, self._losses(got, window), wanted.argmax(1) == got.argmax(1)


class HeadErrors:
    """Collects the relative error of attention outputs by layer and query head.

    Parameters
    ----------
    first : int
        Query positions below it do not count.
    """

    def __init__(self, first: int) -> None:
        self._first = first
        self._sums: dict[int, Array] = {}
        self._counts: dict[int, int] = {}

    def __call__(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        out: torch.Tensor,
        wanted: torch.Tensor,
    ) -> None:
        """Add one layer of one sequence."""
        out, wanted = out[:, self._first :], wanted[:, self._first :]
        size = wanted.norm(dim=-1).clamp_min(1e-30)
        errors = ((out - wanted).norm(dim=-1) / size).double().numpy()
        self._sums[layer] = self._sums.get(layer, 0.0) + errors.sum(axis=1)
        self._counts[layer] = self._counts.get(layer, 0) + errors.shape[1]

    def by_layer(self) -> dict[int, Array]:
        """Return the mean error of every head, ``[num_q_heads]`` by layer."""
        return {layer: self._sums[layer] / self._counts[layer] for layer in sorted(self._sums)}

    def mean(self) -> float:
        """Return the mean over layers and heads."""
        return float(np.mean([errors.mean() for errors in self.by_layer().values()]))

    def worst(self, count: int) -> list[HeadError]:
        """Return the worst heads, the worst first."""
        heads = [
            HeadError(layer=layer, head=head, error=float(error))
            for layer, errors in self.by_layer().items()
            for head, error in enumerate(errors)
        ]
        return sorted(heads, key=lambda head: -head.error)[:count]
