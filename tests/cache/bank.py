"""Tokens with known bytes: what each one becomes when it is encoded alone.

A `TokenBank` holds some tokens of one configuration. For every layer and plane it knows
the bytes that a page must hold for a token, taken from encoding that token by itself, and what they
decode to. `token_bytes` reads the bytes a pool really holds, by the arithmetic of the documented
layout and not through the library's own views.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from pagedtq import CacheConfig, Exact, LayerOverride, TurboQuant
from pagedtq.codec import TurboQuantCodec
from pagedtq.config import PRESETS
from tests.table_snapshot import differences as differences
from tests.table_snapshot import snapshot as table_snapshot

LAYERS, HEADS = 2, 2
KV_DTYPES = ("f16", "f32", "bf16")
FORMATS = ("k4v4", "k3v3", "k2v2", "prod4v4", "exact", "mixed")


def make_config(name: str, **fields) -> CacheConfig:
    """A small configuration: a preset, or k4v4 with an exact first layer (``"mixed"``)."""
    keys, values = PRESETS["k4v4" if name == "mixed" else name]
    if name == "mixed":
        fields["overrides"] = (LayerOverride(layers=(0,), keys=Exact(), values=Exact()),)
    shape = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": 16}
    return CacheConfig(keys=keys, values=values, **(shape | fields))


def as_bf16_bits(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest even, as uint16 bits."""
    wide = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    half = 0x7FFF + (wide >> 16 & 1)
    return (wide + half >> 16).astype(np.uint16)


def from_bf16_bits(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Round float32 to a type and back, by NumPy's own conversion."""
    if dtype == "f16":
        return values.astype(np.float16).astype(np.float32)
    return from_bf16_bits(as_bf16_bits(values)) if dtype == "bf16" else values


def raw_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of float32 data in a type that holds them exactly: ``uint8[..., d * itemsize]``."""
    if dtype == "bf16":
        return as_bf16_bits(values).view(np.uint8)
    return values.astype({"f16": "<f2", "f32": "<f4"}[dtype]).view(np.uint8)


def draw_tokens(rng: np.random.Generator, count: int, config: CacheConfig) -> tuple:
    """Keys and values ``float32[layers, count, heads, dim]`` of all sizes, a few of them zero."""
    shape = (config.num_layers, count, config.num_kv_heads, config.head_dim)
    keys, values = rng.standard_normal((2, *shape)).astype(np.float32)
    keys *= np.exp(0.5 * rng.standard_normal((*shape[:3], 1))).astype(np.float32)
    values *= np.exp(rng.standard_normal((*shape[:3], 1))).astype(np.float32)
    keys[:, ::37] = 0
    values[:, 5::41] = 0
    return keys, values


class TokenBank:
    """Tokens of a configuration, and what each becomes when it is encoded alone.

    Attributes
    ----------
    keys, values : float32[layers, count, heads, dim]
        What is appended.
    exact : list of (keys, values)
        Per layer, rounded to ``kv_dtype``: what the exact window must return.
    decoded : list of (keys, values)
        Per layer, what pages must decode to.
    expected : list of dict of str to uint8[count, heads, row]
        Per layer and plane, the bytes that pages must hold.
    """

    def __init__(self, config: CacheConfig, count: int, seed: int = 1, means=None) -> None:
        self.config = config
        self.count = count
        self.keys, self.values = draw_tokens(np.random.default_rng(seed), count, config)
        self.exact, self.decoded, self.expected = [], [], []
        for layer in range(config.num_layers):
            planes, decoded, exact = {}, [], []
            for stream, raw, codec in (
                ("key", self.keys[layer], config.layer_codecs(layer)[0]),
                ("value", self.values[layer], config.layer_codecs(layer)[1]),
            ):
                vectors = rounded(raw, config.kv_dtype)
                exact.append(vectors)
                if isinstance(codec, Exact):
                    stored = rounded(vectors, codec.dtype)
                    planes[stream + "s"] = raw_bytes(stored, codec.dtype)
                    decoded.append(stored)
                else:
                    mean = means[layer] if means is not None and stream == "key" else None
                    found, back = self._alone(layer, stream, codec, vectors, mean)
                    planes |= found
                    decoded.append(back)
            self.exact.append(exact)
            self.decoded.append(decoded)
            self.expected.append(planes)

    def _alone(self, layer: int, stream: str, codec: TurboQuant, vectors: np.ndarray, mean):
        config = self.config
        encoder = TurboQuantCodec(
            codec,
            config.head_dim,
            config.num_kv_heads,
            seed=config.seed,
            layer=layer,
            stream=stream,
            first_kv_head=config.first_kv_head,
            mean=mean,
        )
        names = {
            "codes": f"{stream}_codes",
            "code_signs": f"{stream}_code_signs",
            "norms": f"{stream}_norms",
            "qjl_signs": "key_qjl_signs",
            "residual_norms": "key_residual_norms",
        }
        rows: dict[str, list[np.ndarray]] = {}
        decoded = []
        for token in range(len(vectors)):
            encoded = encoder.encode(vectors[token : token + 1].copy())
            for field, plane in names.items():
                array = getattr(encoded, field)
                if array is not None:
                    row = np.ascontiguousarray(array[0]).view(np.uint8)
                    rows.setdefault(plane, []).append(row.reshape(config.num_kv_heads, -1))
            decoded.append(encoder.decode(encoded)[0])
        return {name: np.stack(found) for name, found in rows.items()}, np.stack(decoded)


@cache
def bank_of(name: str, kv_dtype: str, head_dim: int = 16, count: int = 160) -> TokenBank:
    """The bank of a named configuration; page size and window do not matter to it."""
    return TokenBank(
        make_config(name, kv_dtype=kv_dtype, head_dim=head_dim, num_pages=2), count=count
    )


def token_bytes(kv_cache, layer: int, name: str, slots: np.ndarray) -> np.ndarray:
    """The bytes of tokens in one plane of the pool, ``uint8[len(slots), heads, row]``.

    Byte ``j`` of token ``t`` lies at ``t * row + j`` of its plane; in planes that interleave token
    pairs at ``(t // 2) * 2 * row + 2 * j + t % 2``.
    """
    layout, config = kv_cache.backend.layout, kv_cache.config
    extent = layout.extents[layer]
    plane = extent.planes[name]
    row = plane.nbytes // config.page_size
    page, token = np.divmod(np.asarray(slots, np.int64), config.page_size)
    start = layout.layer_offsets[layer] + page * layout.page_strides[layer] + plane.offset
    start = start[:, None] + np.arange(config.num_kv_heads) * extent.nbytes
    if plane.interleaved:
        inner = (token // 2 * 2 * row + token % 2)[:, None] + 2 * np.arange(row)
    else:
        inner = (token * row)[:, None] + np.arange(row)
    return kv_cache.backend.pool[start[:, :, None] + inner[:, None, :]]


def token_planes(kv_cache, layer: int) -> list[str]:
    """Names of the planes that hold a row per token."""
    planes = kv_cache.backend.layout.extents[layer].planes
    return [name for name in planes if name != "key_bounds"]


def resident_bytes(kv_cache, seq_id: int) -> list[dict[str, bytes]]:
    """Per layer and plane, the bytes of all resident tokens that have codes, in order."""
    state = kv_cache.state(seq_id)
    found = []
    for layer in range(kv_cache.config.num_layers):
        coded = state.coded if kv_cache.config.has_overlay(layer) else state.length
        slots = kv_cache.tables.slots_of(seq_id, np.arange(coded))
        slots = slots[slots >= 0]
        planes = token_planes(kv_cache, layer)
        found.append({name: token_bytes(kv_cache, layer, name, slots).tobytes() for name in planes})
    return found


def snapshot(kv_cache) -> dict[str, object]:
    """Everything a cache holds, to the byte: pages, windows, tables, pools, the open step."""
    state: dict[str, object] = {
        **table_snapshot(kv_cache.tables),
        "pool": kv_cache.backend.pool.tobytes(),
        "copied": set(kv_cache._copied),
        "cache step": id(kv_cache._step),
        "stored": set(kv_cache._stored),
    }
    for layer in range(kv_cache.config.num_layers):
        if kv_cache.config.has_overlay(layer):
            window = kv_cache.backend.window(layer)
            state[f"ring {layer}"] = window.ring.tobytes()
            state[f"sinks {layer}"] = window.sink.tobytes()
    return state
