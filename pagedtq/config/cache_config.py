"""`CacheConfig`: what a cache stores, how, and how much of it."""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

from ..errors import ConfigError
from .codecs import DTYPE_BYTES, Codec, Dtype, Exact, Polar, TurboQuant, check_codec
from .field_checks import check_bool, check_choice, check_int

#: Version of the page format; part of every digest, snapshot and transfer.
FORMAT_VERSION = 1

PAGE_SIZES = (16, 32, 64, 128, 256)


class LayerOverride(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Codecs of some layers that differ from the rest, such as exact boundary layers.

    Parameters
    ----------
    layers : tuple of int
        Layer indices; negative ones count from the end.
    keys, values : Codec
        What these layers use.
    """

    layers: tuple[int, ...]
    keys: Codec
    values: Codec

    def __post_init__(self) -> None:
        check_codec("keys", self.keys)
        check_codec("values", self.values)
        if not isinstance(self.layers, tuple) or any(type(i) is not int for i in self.layers):
            kind = type(self.layers).__name__
            raise ConfigError(f"layers must be a tuple of int, got {kind} {self.layers!r}")


class CacheConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that decides the shape and the bytes of a cache, except key means.

    Parameters
    ----------
    num_layers, num_kv_heads, head_dim : int
        The model's shape on this rank; ``head_dim >= 3``.
    num_pages : int
        Pages of the pool, the null page 0 included (so at least 2).
    page_size : {16, 32, 64, 128, 256}
        Tokens in a page.
    keys, values : Codec
        How each stream is stored.
    overrides : tuple of LayerOverride
        Layers with other codecs; no layer twice.
    window : int or None
        Tokens of the exact window, a multiple of ``page_size``; 0 turns it off; None is one page.
    sinks : int
        First tokens of a sequence kept exact, at most ``page_size``; unused without a window.
    num_window_slots : int
        Sequences that can own a window at a time; unused without a window.
    num_host_pages : int
        Pages of the host tier, to which sequences can be swapped out; allocated when first used.
    kv_dtype : {"f16", "bf16", "f32"}
        Applied to every key and value on entry, before window or encoder.
    seed : int
        Source of all randomness, 0 to 2**64 - 1.
    first_kv_head : int
        Global index of this rank's first KV head (tensor parallelism).
    key_bounds : bool
        Keep per-page bounds of the rotated keys, for query-aware eviction.
    pool_order : {"layer_major", "page_major"}
        Order of the pool's bytes; never changes the bytes inside a page.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_pages: int
    page_size: int = 64
    keys: Codec = TurboQuant()
    values: Codec = TurboQuant()
    overrides: tuple[LayerOverride, ...] = ()
    window: int | None = None
    sinks: int = 4
    num_window_slots: int = 64
    num_host_pages: int = 0
    kv_dtype: Dtype = "f16"
    seed: int = 0
    first_kv_head: int = 0
    key_bounds: bool = False
    pool_order: Literal["layer_major", "page_major"] = "layer_major"

    def __post_init__(self) -> None:
        check_int("num_layers", self.num_layers, 1, 1 << 16)
        check_int("num_kv_heads", self.num_kv_heads, 1, 1 << 16)
        check_int("head_dim", self.head_dim, 3, 1 << 12)
        check_int("num_pages", self.num_pages, 2, (1 << 31) - 1)
        check_int("page_size", self.page_size, 1, 1 << 16)
        check_choice("page_size", self.page_size, PAGE_SIZES)
        check_choice("kv_dtype", self.kv_dtype, tuple(DTYPE_BYTES))
        check_choice("pool_order", self.pool_order, ("layer_major", "page_major"))
        check_int("seed", self.seed, 0, (1 << 64) - 1)
        check_int("first_kv_head", self.first_kv_head, 0, 1 << 20)
        if self.window is not None:
            check_int("window", self.window, 0, 1 << 20)
            if self.window % self.page_size:
                raise ConfigError(
                    f"window must be a multiple of page_size {self.page_size}, got {self.window}"
                )
        check_int("sinks", self.sinks, 0, self.page_size)
        check_int(
            "num_window_slots", self.num_window_slots, 1 if self.window_tokens else 0, 1 << 24
        )
        check_int("num_host_pages", self.num_host_pages, 0, (1 << 31) - 2)
        check_bool("key_bounds", self.key_bounds)
        self._check_codecs()

    def _check_codecs(self) -> None:
        check_codec("keys", self.keys)
        check_codec("values", self.values)
        if not isinstance(self.overrides, tuple) or not all(
            isinstance(override, LayerOverride) for override in self.overrides
        ):
            raise ConfigError(f"overrides must be a tuple of LayerOverride, got {self.overrides!r}")
        seen: set[int] = set()
        for override in self.overrides:
            for layer in override.layers:
                if not -self.num_layers <= layer < self.num_layers:
                    raise ConfigError(f"override names layer {layer} of {self.num_layers}")
                if layer % self.num_layers in seen:
                    raise ConfigError(f"layer {layer % self.num_layers} is overridden twice")
                seen.add(layer % self.num_layers)
        for values in (self.values, *(override.values for override in self.overrides)):
            if isinstance(values, TurboQuant) and values.estimator == "prod":
                raise ConfigError('values cannot use estimator "prod": it is for inner products')
            if isinstance(values, Polar) and values.mode == "polar_qjl":
                raise ConfigError('values cannot use mode "polar_qjl": it is for inner products')
        codecs = [self.keys, self.values]
        for override in self.overrides:
            codecs += (override.keys, override.values)
        if self.head_dim % 2 and any(isinstance(codec, Polar) for codec in codecs):
            raise ConfigError(f"Polar needs an even head_dim, got {self.head_dim}")

    @property
    def window_tokens(self) -> int:
        """Rows of the exact window's ring, 0 when it is off."""
        return self.page_size if self.window is None else self.window

    @property
    def num_sinks(self) -> int:
        """Exact first tokens per sequence, 0 without a window."""
        return self.sinks if self.window_tokens else 0

    def layer_codecs(self, layer: int) -> tuple[Codec, Codec]:
        """Return the codecs ``(keys, values)`` of a layer."""
        for override in self.overrides:
            if layer in override.layers or layer - self.num_layers in override.layers:
                return override.keys, override.values
        return self.keys, self.values

    def has_overlay(self, layer: int) -> bool:
        """Whether a layer keeps the exact window (a fully exact layer has no use for one)."""
        exact = all(isinstance(codec, Exact) for codec in self.layer_codecs(layer))
        return self.window_tokens > 0 and not exact

    def format_fields(self) -> dict[str, Any]:
        """Return, as plain data, everything two caches must agree on to exchange sequences.

        That is all that decides bytes, per layer, and the shape of the exact window. How much a
        cache holds (``num_pages``, ``num_window_slots``, ``num_host_pages``) and the order of its
        pool are left out.
        """
        layers = [self.layer_codecs(layer) for layer in range(self.num_layers)]
        return {
            "num_layers": self.num_layers,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "page_size": self.page_size,
            "keys": [msgspec.to_builtins(keys) for keys, _ in layers],
            "values": [msgspec.to_builtins(values) for _, values in layers],
            "window": self.window_tokens,
            "sinks": self.num_sinks,
            "kv_dtype": self.kv_dtype,
            "seed": self.seed,
            "first_kv_head": self.first_kv_head,
            "key_bounds": self.key_bounds,
        }

    def format_digest(self) -> bytes:
        """Return the SHA-256 of `format_fields` and the version of the page format, 32 bytes."""
        fields = {"page_format": FORMAT_VERSION, **self.format_fields()}
        return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).digest()

    def replace(self, **changes: Any) -> CacheConfig:
        """Return a copy with some fields changed, checked again."""
        return msgspec.structs.replace(self, **changes)

    def to_json(self) -> bytes:
        """Encode as JSON."""
        return msgspec.json.encode(self)

    def to_toml(self) -> bytes:
        """Encode as TOML (needs the ``toml`` extra)."""
        # TOML has no null: a missing key reads back as None.
        fields = {k: v for k, v in msgspec.to_builtins(self).items() if v is not None}
        return msgspec.toml.encode(fields)

    @classmethod
    def from_json(cls, text: bytes | str) -> CacheConfig:
        """Decode JSON; raises ``ConfigError`` naming the field that is wrong."""
        return _decode(lambda: msgspec.json.decode(text, type=cls))

    @classmethod
    def from_toml(cls, text: bytes | str) -> CacheConfig:
        """Decode TOML; raises ``ConfigError`` naming the field that is wrong."""
        return _decode(lambda: msgspec.toml.decode(text, type=cls))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``CacheConfig``."""
    return msgspec.json.schema(CacheConfig)


def _decode(read: Any) -> CacheConfig:
    try:
        config: CacheConfig = read()
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(str(error)) from error
    return config
