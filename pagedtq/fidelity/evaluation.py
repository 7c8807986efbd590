"""A model's fidelity under many settings, and the setting to use: ``pagedtq evaluate``."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from ..codec.key_means import MIN_TOKENS, KeyMeanAccumulator
from ..errors import ArgumentError, UnsupportedError
from ..integrations.transformers import model_digest
from ..models import ModelShape
from ..wire.settings import CacheSettings
from .attention import Reading, reading
from .formats import Array, CacheFormat, KVFormat, Uncompressed
from .measures import Fidelity, Reference
from .peer_formats import peer_formats, vllm_preset
from .sensitivity import WIDTHS, Recommendation, Sensitivity, recommend, sweep
from .settings import DEFAULT_SETTINGS, settings

#: Told how many forward passes there will be; returns what to call after each.
Begin = Callable[[int], Callable[[], object]]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """How a text is used: three parts that do not overlap, in this order.

    Parameters
    ----------
    context : int
        Tokens of a window.
    calibration_tokens : int, optional
        For key means; one window by default. Keys are stored after the rotary embedding, so that
        their means depend on the positions they are taken from: take those that will be served.
    selection_windows : int
        For sensitivities.
    windows : int
        For the figures reported.
    """

    context: int = 2048
    calibration_tokens: int | None = None
    selection_windows: int = 2
    windows: int = 4

    @property
    def key_mean_tokens(self) -> int:
        """Tokens that key means are taken from."""
        return self.context if self.calibration_tokens is None else self.calibration_tokens

    @property
    def tokens(self) -> int:
        """Tokens needed."""
        return self.key_mean_tokens + self.context * (self.selection_windows + self.windows)

    def split(self, ids: Array) -> tuple[Array, Array, Array]:
        """Return the parts: ``int64[key_mean_tokens]``, and windows of each of the others.

        Raises
        ------
        ArgumentError
            If the text is too short.
        """
        if len(ids) < self.tokens:
            raise ArgumentError(
                f"the text has {len(ids)} tokens, expected at least {self.tokens}: "
                f"{self.key_mean_tokens} for calibration and {self.selection_windows} + "
                f"{self.windows} windows of {self.context}; use a longer text, or a smaller "
                "context or fewer windows"
            )
        first = self.key_mean_tokens
        middle = first + self.selection_windows * self.context
        end = middle + self.windows * self.context
        rows = (-1, self.context)
        return ids[:first], ids[first:middle].reshape(rows), ids[middle:end].reshape(rows)


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What `evaluate` found.

    Attributes
    ----------
    schema : int
        Version of this report.
    model : str
        The model's name.
    shape : ModelShape
        Its attention.
    text_digest : str
        SHA-256 of all token ids used.
    plan : Plan
        How the text was used.
    perplexity : float
        With an exact cache.
    settings, peers : list of Fidelity
        Ours, and the formats of other systems.
    sensitivities : list of Sensitivity
        Empty unless asked for.
    recommendation : Recommendation or None
        The setting for the budget.
    recommended : Fidelity or None
        That setting measured, on text not used to choose it.
    """

    schema: int
    model: str
    shape: ModelShape
    text_digest: str
    plan: Plan
    perplexity: float
    settings: list[Fidelity]
    peers: list[Fidelity]
    sensitivities: list[Sensitivity]
    recommendation: Recommendation | None
    recommended: Fidelity | None

    def to_json(self) -> bytes:
        """Encode as JSON."""
        return msgspec.json.format(msgspec.json.encode(self), indent=2)


def evaluate(
    model: Any,
    ids: Array,
    plan: Plan,
    *,
    name: str = "model",
    setting_names: Sequence[str] = DEFAULT_SETTINGS,
    with_peers: bool = True,
    budget_bytes_per_token: float | None = None,
    window: int = 0,
    widths: Sequence[int] = WIDTHS,
    seed: int = 0,
    begin: Begin | None = None,
) -> tuple[Evaluation, CacheSettings | None]:
    """Measure settings on a model and a text.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder of transformers on the CPU.
    ids : ndarray of int64 ``[n]``
        The text's tokens.
    plan : Plan
        How it is used.
    name : str
        The model's name in the report.
    setting_names : sequence of str
        See `setting`.
    with_peers : bool
        Measure the formats of other systems too.
    budget_bytes_per_token : float, optional
        Also sweep sensitivities and recommend a setting of at most so many bytes per token, all
        layers and everything counted.
    window : int
        Exact window of the recommendation.
    widths : sequence of int
        Bits that the recommendation chooses from.
    seed : int
        Of the rotations.
    begin : callable, optional
        Told how many forward passes there will be; what it returns is called after each.

    Returns
    -------
    Evaluation
    CacheSettings or None
        The recommended setting with its key means, for this model; None without a budget.

    Raises
    ------
    ArgumentError
        The text is too short, or a budget cannot be met.
    ConfigError
        A setting does not exist.
    UnsupportedError
        The model's attention cannot be replaced, or has a shape that no codec takes.
    """
    calibration, selection, scored = plan.split(ids)
    model.eval()
    shape, key_means = probe(model, calibration, name)
    formats = settings(setting_names, shape, key_means, seed=seed)
    dims = shape.num_layers, shape.num_kv_heads, shape.head_dim
    exact = Uncompressed(*dims)
    peers: list[KVFormat] = []
    if with_peers:
        peers += peer_formats(dims)
        if shape.head_dim & (shape.head_dim - 1) == 0 and shape.num_layers > 4:
            peers += [vllm_preset("4bit_nc", dims, 2), vllm_preset("3bit_nc", dims, 2)]
    passes = (len(formats) + len(peers)) * plan.windows
    if budget_bytes_per_token is not None:
        passes += plan.windows + 2 * shape.num_layers * len(widths)
    advance = None if begin is None else begin(passes)
    sensitivities: list[Sensitivity] = []
    recommendation = None
    if budget_bytes_per_token is not None:
        sensitivities = sweep(Reference(model, selection), shape, key_means, widths, advance)
        recommendation = recommend(
            sensitivities,
            shape,
            budget_bytes_per_token,
            plan.context,
            window=window,
            seed=seed,
        )
    reference = Reference(model, scored)
    recommended, saved = None, None
    if recommendation is not None:
        best = CacheFormat("recommended", recommendation.config, key_means)
        recommended = reference.measure(best, exact, advance)
        saved = CacheSettings(
            config=recommendation.config,
            key_means=key_means,
            model_digest=model_digest(model),
            num_tokens=plan.key_mean_tokens,
        )
    report = Evaluation(
        schema=1,
        model=name,
        shape=shape,
        text_digest=hashlib.sha256(ids[: plan.tokens].astype("<i8").tobytes()).hexdigest(),
        plan=plan,
        perplexity=reference.perplexity,
        settings=[reference.measure(form, exact, advance) for form in formats],
        peers=[reference.measure(form, exact, advance) for form in peers],
        sensitivities=sensitivities,
        recommendation=recommendation,
        recommended=recommended,
    )
    return report, saved


def probe(
    model: Any, ids: Array, name: str = "model", min_tokens: int = MIN_TOKENS
) -> tuple[ModelShape, Array]:
    """Run some tokens through a model and return its shape and the means of its keys.

    Parameters
    ----------
    model : PreTrainedModel
        In evaluation mode.
    ids : ndarray of int64 ``[n]``
        Calibration tokens.
    name : str
        Goes into the shape.
    min_tokens : int
        Fewest tokens that are enough for key means.

    Returns
    -------
    ModelShape
    ndarray of float32 ``[num_layers, num_kv_heads, head_dim]``
        Means of the keys as they are stored: after the rotary embedding.

    Raises
    ------
    UnsupportedError
        If some layer's attention is not taken from transformers' interface.
    ArgumentError
        If the tokens are too few, or the keys of a head all the same.
    """
    seen: dict[int, Array] = {}
    heads: dict[int, tuple[int, int, int]] = {}

    def observe(layer: int, queries: Any, keys: Any, values: Any, out: Any, wanted: Any) -> None:
        seen[layer] = keys.transpose(0, 1).contiguous().numpy()
        heads[layer] = len(queries), len(keys), keys.shape[-1]

    with torch.no_grad(), reading(model, Reading({}, observe=observe)):
        model(torch.from_numpy(ids[None]), use_cache=False)
    text_config = model.config.get_text_config(decoder=True)
    num_layers = text_config.num_hidden_layers
    if sorted(heads) != list(range(num_layers)) or len(set(heads.values())) != 1:
        raise UnsupportedError(
            f"{name}: expected attention of one shape in all {num_layers} layers, taken from "
            f"transformers' AttentionInterface; saw {heads or 'none'}"
        )
    query_heads, kv_heads, dim = heads[0]
    shape = ModelShape(
        name=name,
        num_layers=num_layers,
        num_kv_heads=kv_heads,
        num_q_heads=query_heads,
        head_dim=dim,
        weight_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        bytes_per_weight=next(model.parameters()).element_size(),
    )
    sums = KeyMeanAccumulator(num_layers, kv_heads, dim)
    for layer, keys in seen.items():
        sums.add(layer, keys)
    return shape, sums.means(min_tokens)
