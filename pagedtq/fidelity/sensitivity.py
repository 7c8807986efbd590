"""Which layers can be stored in fewer bits, measured, and the best setting for a budget.

The sensitivity of a stream (the keys or the values of a layer) at a width is the divergence of the
model's next-token distributions when that stream alone is coded at it. Divergences of small
independent disturbances add up to first order, so a setting's predicted divergence is the sum over
its streams, and a greedy search (most divergence saved per byte first) finds a setting for a
budget. The prediction is no promise: the setting found is measured afterwards, on other text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import msgspec

from ..config import CacheConfig, LayerOverride, TurboQuant
from ..errors import ArgumentError
from ..models import ModelShape
from .attention import Reading
from .formats import Array, CacheFormat
from .measures import Reference
from .settings import config_fields

Stream = Literal["keys", "values"]

WIDTHS = (2, 3, 4, 5, 6, 8)
_STREAMS: tuple[Stream, ...] = ("keys", "values")


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True):
    """Mean divergence (nats) with one stream of one layer coded at a width, all else exact."""

    layer: int
    stream: Stream
    bits: int
    kl: float


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """The setting found for a budget.

    Attributes
    ----------
    budget_bytes_per_token, bytes_per_token : float
        Asked for and used, at the context that was measured, everything counted.
    context : int
        Tokens of a sequence.
    key_bits, value_bits : list of int
        By layer.
    predicted_kl : float
        Sum of sensitivities, nats; an exact window makes the true one smaller.
    config : CacheConfig
        The setting, with the smallest pool: raise ``num_pages`` and ``num_window_slots``.
    """

    budget_bytes_per_token: float
    bytes_per_token: float
    context: int
    key_bits: list[int]
    value_bits: list[int]
    predicted_kl: float
    config: CacheConfig


def sweep(
    reference: Reference,
    shape: ModelShape,
    key_means: Array | None = None,
    widths: Sequence[int] = WIDTHS,
    advance: Callable[[], object] | None = None,
) -> list[Sensitivity]:
    """Measure every stream at every width.

    Parameters
    ----------
    reference : Reference
        Model and text.
    shape : ModelShape
        The model's.
    key_means : ndarray of float32 ``[num_layers, num_kv_heads, head_dim]``, optional
        Subtracted from keys before coding.
    widths : sequence of int
        Bits, 1 to 8.
    advance : callable, optional
        Called after every measurement; there are ``2 * num_layers * len(widths)``.
    """
    found = []
    for bits in widths:
        codec = TurboQuant(bits=bits)
        config = CacheConfig(**config_fields(shape), keys=codec, values=codec, window=0)
        form = CacheFormat(f"{bits} bits", config, key_means)
        for layer in range(shape.num_layers):
            for stream in _STREAMS:
                kl = reference.divergence(Reading({layer: form}, streams=stream))
                found.append(Sensitivity(layer=layer, stream=stream, bits=bits, kl=kl))
                if advance is not None:
                    advance()
    return found


def recommend(
    sensitivities: Sequence[Sensitivity],
    shape: ModelShape,
    budget_bytes_per_token: float,
    context: int,
    *,
    window: int = 0,
    page_size: int = 64,
    seed: int = 0,
) -> Recommendation:
    """Find the bits of every layer's keys and values for a byte budget.

    Parameters
    ----------
    sensitivities : sequence of Sensitivity
        As `sweep` measured them.
    shape : ModelShape
        The model's.
    budget_bytes_per_token : float
        Bytes of a sequence over its tokens, all layers, pages, window and slack counted.
    context : int
        Tokens of that sequence.
    window : int
        Tokens of the exact window; its bytes count.
    page_size, seed : int
        Of the configuration.

    Raises
    ------
    ArgumentError
        If sensitivities are missing, or even the fewest bits exceed the budget.
    """
    table = {(s.layer, s.stream, s.bits): s.kl for s in sensitivities}
    widths = sorted({s.bits for s in sensitivities})
    streams = [(layer, stream) for layer in range(shape.num_layers) for stream in _STREAMS]
    missing = [(*s, bits) for s in streams for bits in widths if (*s, bits) not in table]
    if missing or not widths:
        raise ArgumentError(f"sensitivities of {missing[:3] or 'all streams'} are missing")

    held = _pair_bytes(shape, widths, context, window, page_size)

    def used(bits: dict[tuple[int, Stream], int]) -> float:
        pairs = ((bits[i, "keys"], bits[i, "values"]) for i in range(shape.num_layers))
        return sum(held[pair] for pair in pairs) / context

    chosen = dict.fromkeys(streams, widths[0])
    if used(chosen) > budget_bytes_per_token:
        raise ArgumentError(
            f"{widths[0]} bits everywhere take {used(chosen):.1f} bytes per token at {context} "
            f"tokens, more than the budget of {budget_bytes_per_token:.1f}"
        )
    while True:
        best: tuple[float, tuple[int, Stream], int] | None = None
        for stream, bits in chosen.items():
            for wider in (w for w in widths if w > bits):
                saved = table[(*stream, bits)] - table[(*stream, wider)]
                gain = saved / (wider - bits)
                if saved <= 0 or (best is not None and gain <= best[0]):
                    continue
                if used({**chosen, stream: wider}) <= budget_bytes_per_token:
                    best = gain, stream, wider
        if best is None:
            break
        chosen[best[1]] = best[2]
    config = _config(chosen, shape, window=window, page_size=page_size, seed=seed)
    return Recommendation(
        budget_bytes_per_token=budget_bytes_per_token,
        bytes_per_token=used(chosen),
        context=context,
        key_bits=[chosen[layer, "keys"] for layer in range(shape.num_layers)],
        value_bits=[chosen[layer, "values"] for layer in range(shape.num_layers)],
        predicted_kl=sum(table[(*stream, bits)] for stream, bits in chosen.items()),
        config=config,
    )


def _pair_bytes(
    shape: ModelShape, widths: Sequence[int], context: int, window: int, page_size: int
) -> dict[tuple[int, int], int]:
    """Return what one layer of a sequence holds, by widths of keys and values."""
    fields = {**config_fields(shape), "num_layers": 1}
    held = {}
    for key_bits in widths:
        for value_bits in widths:
            codecs: dict[str, Any] = {
                "keys": TurboQuant(bits=key_bits),
                "values": TurboQuant(bits=value_bits),
            }
            config = CacheConfig(**fields, **codecs, window=window, page_size=page_size)
            held[key_bits, value_bits] = CacheFormat("", config).sequence_bytes(context)
    return held


def _config(
    bits: dict[tuple[int, Stream], int],
    shape: ModelShape,
    *,
    window: int,
    page_size: int,
    seed: int,
) -> CacheConfig:
    """Return a configuration whose commonest pair of widths is the default of all layers."""
    pairs = [(bits[layer, "keys"], bits[layer, "values"]) for layer in range(shape.num_layers)]
    usual = max(sorted(set(pairs)), key=pairs.count)
    overrides = tuple(
        LayerOverride(
            layers=tuple(layer for layer, own in enumerate(pairs) if own == pair),
            keys=TurboQuant(bits=pair[0]),
            values=TurboQuant(bits=pair[1]),
        )
        for pair in sorted(set(pairs) - {usual})
    )
    return CacheConfig(
        **config_fields(shape),
        keys=TurboQuant(bits=usual[0]),
        values=TurboQuant(bits=usual[1]),
        overrides=overrides,
        window=window,
        page_size=page_size,
        seed=seed,
    )
