"""Keys and values on their way into a cache: checked once, converted tile by tile."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..codec import PolarCodec, TurboQuantCodec, VectorCodec
from ..codec.validation import MAX_NORM
from ..config import CacheConfig, Dtype, Exact, Polar, TurboQuant
from ..errors import ArgumentError, SlotError, UnsupportedError
from ..paging.arguments import integers
from .dtypes import (
    LIMITS,
    Float32,
    check_range,
    check_shape,
    kind_of,
    largest,
    round_to,
    widen,
)
from .work_arrays import work_array

Array = npt.NDArray[Any]
Codecs = tuple[VectorCodec | None, VectorCodec | None]

_STREAMS: tuple[Literal["key", "value"], ...] = ("key", "value")


class TokenBatch(NamedTuple):
    """Tokens of one layer that passed `check_tokens`, still in the type they came in.

    Attributes
    ----------
    keys, values : ndarray ``[n, num_kv_heads, head_dim]``
        As they came.
    kind : {"f16", "bf16", "f32"}
        What they are.
    kv_dtype : {"f16", "bf16", "f32"}
        What they become.
    """

    keys: Array
    values: Array
    kind: Dtype
    kv_dtype: Dtype

    def __len__(self) -> int:
        return len(self.keys)

    def vectors(self, stream: Literal["key", "value"], part: slice | Array) -> Float32:
        """Return some tokens of a stream as float32, rounded to ``kv_dtype``.

        The result is this thread's work array: it lasts until the next call for the stream.
        """
        raw = (self.keys if stream == "key" else self.values)[part]
        wide = widen(raw, self.kind, work_array(stream + ".wide", raw.shape, np.float32))
        if self.kind == self.kv_dtype:
            return wide
        out = work_array(stream + ".rounded", raw.shape, np.float32)
        return round_to(wide, self.kv_dtype, out)


def layer_codecs(config: CacheConfig, layer: int, mean: Float32 | None) -> Codecs:
    """Build the encoders of a layer's keys and values; None for an exact stream.

    Parameters
    ----------
    config : CacheConfig
        Which codecs.
    layer : int
        The layer.
    mean : ndarray of float32 ``[num_kv_heads, head_dim]`` or None
        Key mean.
    """
    key, value = (
        None if isinstance(form, Exact) else _codec(config, form, layer, stream, center)
        for stream, form, center in zip(_STREAMS, config.layer_codecs(layer), (mean, None))
    )
    return key, value


def _codec(
    config: CacheConfig,
    form: TurboQuant | Polar,
    layer: int,
    stream: Literal["key", "value"],
    mean: Float32 | None,
) -> VectorCodec:
    shape = config.head_dim, config.num_kv_heads
    place: dict[str, Any] = {
        "seed": config.seed,
        "layer": layer,
        "stream": stream,
        "first_kv_head": config.first_kv_head,
        "mean": mean,
    }
    if isinstance(form, Polar):
        return PolarCodec(form, *shape, **place)
    return TurboQuantCodec(form, *shape, **place)


def check_tokens(
    config: CacheConfig,
    layer: int,
    codecs: Codecs,
    keys: Array,
    values: Array,
    dtype: Dtype | None,
) -> TokenBatch:
    """Check the keys and values of one layer; reads them once and converts nothing.

    Parameters
    ----------
    config : CacheConfig
        Shape, ``kv_dtype``, and the types of exact pages.
    layer : int
        The layer.
    codecs : tuple of VectorCodec or None
        The layer's encoders.
    keys, values : ndarray ``[n, num_kv_heads, head_dim]``
        float16, bfloat16 or float32, both the same.
    dtype : {"f16", "bf16", "f32"} or None
        Declares the type (needed for bfloat16 bits in uint16).

    Raises
    ------
    ArgumentError, ArgumentTypeError, NonFiniteError, OverflowingError, NotUnitNormError
    UnsupportedError
        If values have another head_dim than keys.
    """
    heads, dim = config.num_kv_heads, config.head_dim
    check_shape(keys, "keys", (None, heads, dim), "tokens, KV heads, head_dim")
    if getattr(values, "ndim", 0) == 3 and values.shape[2] != dim:
        raise UnsupportedError(
            f"v_head_dim != head_dim is not supported: got {values.shape[2]}, need {dim}"
        )
    check_shape(values, "values", (len(keys), heads, dim), "tokens, KV heads, head_dim")
    kind = kind_of(keys, "keys", dtype)
    kind_of(values, "values", kind)
    batch = TokenBatch(keys, values, kind, config.kv_dtype)
    for stream, raw, codec, form in zip(
        _STREAMS, (keys, values), codecs, config.layer_codecs(layer)
    ):
        peak = largest(raw, kind)
        if not peak < LIMITS[config.kv_dtype]:
            check_range(widen(raw, kind), stream + "s", config.kv_dtype)
        if isinstance(form, Exact):
            # An exact page may be narrower than kv_dtype, which rounds first.
            rounded = round_to(np.array([peak], np.float32), config.kv_dtype)[0]
            if not rounded < LIMITS[form.dtype]:
                check_range(batch.vectors(stream, slice(None)), stream + "s", form.dtype)
        if codec is None:
            continue
        offset = 0.0 if codec.mean is None else float(np.abs(codec.mean).max())
        # Rounding to kv_dtype moves an element by less than one part in 256 (bf16).
        bound = (peak * (1 + 2**-8) + offset) * math.sqrt(dim)
        if codec.config.unit_norm:
            # As they came: rounding to float16 alone moves a norm by more than is allowed.
            codec.validate(widen(raw, kind))
        elif bound > MAX_NORM:
            codec.validate(batch.vectors(stream, slice(None)))
    return batch


def check_slots(
    config: CacheConfig, owners: Array | None, slots: Array, count: int | None
) -> npt.NDArray[np.int64]:
    """Check page slots and return them as int64.

    Parameters
    ----------
    config : CacheConfig
        Page size and number.
    owners : ndarray of int ``[num_pages]`` or None
        Reference counts; pages without an owner are refused.
    slots : ndarray of int ``[n]``
        The slots.
    count : int or None
        When writing, how many there must be; negative ones then mean "skip", and a slot may not
        appear twice. None when reading.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        Wrong shape, type or count.
    SlotError
        A slot on the null page, outside the pool, without an owner, or twice.
    """
    mapping = integers("slots", slots)
    if count is not None and len(mapping) != count:
        raise ArgumentError(f"slot_mapping must have {count} entries, got {len(mapping)}")
    used = mapping[mapping >= 0] if count is not None else mapping
    size, total = config.page_size, config.num_pages
    bad = used[(used < size) | (used >= size * total)]
    if bad.size:
        raise SlotError(f"slots must be in [{size}, {size * total - 1}], got {bad[0]}")
    if count is not None:
        ordered = np.sort(used)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        if twice.size:
            raise SlotError(f"slot {twice[0]} appears twice in slot_mapping")
    if owners is not None:
        pages = used // size
        ownerless = pages[owners[pages] == 0]
        if ownerless.size:
            raise SlotError(f"page {ownerless[0]} has no owner")
    return mapping


def check_ring_rows(config: CacheConfig, rows: Array, slots: Array | None) -> None:
    """Refuse rows ``int64[n]`` outside the rings of all window slots.

    Parameters
    ----------
    config : CacheConfig
        Number of window slots and rows of each.
    rows : ndarray of int64 ``[n]``
        ``window_slot * window_tokens + row``.
    slots : ndarray of int64 ``[n]`` or None
        Where they go; rows that go nowhere (negative) are not looked at. None where that is not
        known: then negative rows are taken for such.

    Raises
    ------
    ArgumentError
        Naming the first row outside.
    """
    total = config.num_window_slots * config.window_tokens
    used = rows[(rows if slots is None else slots) >= 0]
    bad = used[(used < 0) | (used >= total)]
    if bad.size:
        raise ArgumentError(f"ring_rows must be in [0, {total - 1}], got {bad[0]}")


def check_means(key_means: Array | None, config: CacheConfig) -> Float32 | None:
    """Check key means ``[num_layers, num_kv_heads, head_dim]`` and return a read-only copy."""
    if key_means is None:
        return None
    shape = (config.num_layers, config.num_kv_heads, config.head_dim)
    check_shape(key_means, "key_means", shape, "layers, KV heads, head_dim")
    means = widen(key_means, kind_of(key_means, "key_means", None)).copy()
    check_range(means, "key_means", "f32")
    means.setflags(write=False)
    return means
