"""Configuration as frozen structs: what to store, how, and how much of it.

Nothing derived is stored: sizes are methods and properties. Constructing, decoding, converting and
replacing all run the same invariants (``__post_init__``).
"""

from __future__ import annotations

import hashlib
from typing import Any, Literal

import msgspec

from .errors import ConfigError

#: Version of the page format; part of every digest, snapshot and transfer.
FORMAT_VERSION = 1

PAGE_SIZES = (16, 32, 64, 128, 256)
DTYPE_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
Dtype = Literal["f16", "bf16", "f32"]


def _in_range(name: str, value: int, low: int, high: int) -> None:
    # bool is an int in Python; as a count it is always a mistake.
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be a Python int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ConfigError(f"{name} must be in [{low}, {high}], got {value}")


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")


def _is_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be a bool, got {type(value).__name__}")


class TurboQuant(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="turboquant",
):
    """Rotation, Lloyd-Max codes, stored norm (arXiv 2504.19874), as a page codec.

    Parameters
    ----------
    bits : int
        Bits per coordinate, 1 to 8; with ``estimator="prod"`` 2 to 8, one of them the QJL sign.
    estimator : {"mse", "prod"}
        ``"mse"``: least reconstruction error. ``"prod"``: unbiased inner products from a QJL sign
        sketch of the residual. Values are always ``"mse"``.
    scale : {"norm_corrected", "searched", "none", "unbiased"}
        What is folded into the stored norm. ``"none"``: the vector's norm. ``"norm_corrected"``:
        the decoded vector gets the exact norm. ``"searched"``: the same, and the codes are the best
        of eight that differ in how far the vector was stretched; pages are read as fast, the error
        is up to a fifth smaller, encoding takes several times as long. ``"unbiased"``:
        ``<x, decoded x> = |x|**2`` (EDEN). The MSE stage of ``"prod"`` is always unscaled.
    rotation : {"hadamard", "dense"}
        Seeded-sign Hadamard (mixed radix for 80, 96, 112, 160, 192), or a dense QR rotation.
    projection : {"gaussian", "orthogonal"}
        The QJL matrix of ``"prod"``.
    unit_norm : bool
        Refuse vectors with ``abs(norm - 1) > 1e-5`` as they come, before ``kv_dtype`` rounds them.
    seed_offset : int
        Added to the cache's seed for this stream, modulo 2**64.
    """

    bits: int = 4
    estimator: Literal["mse", "prod"] = "mse"
    scale: Literal["norm_corrected", "searched", "none", "unbiased"] = "norm_corrected"
    rotation: Literal["hadamard", "dense"] = "hadamard"
    projection: Literal["gaussian", "orthogonal"] = "gaussian"
    unit_norm: bool = False
    seed_offset: int = 0

    def __post_init__(self) -> None:
        _one_of("estimator", self.estimator, ("mse", "prod"))
        _one_of("scale", self.scale, ("norm_corrected", "searched", "none", "unbiased"))
        _one_of("rotation", self.rotation, ("hadamard", "dense"))
        _one_of("projection", self.projection, ("gaussian", "orthogonal"))
        low = 2 if self.estimator == "prod" else 1
        _in_range("bits", self.bits, low, 8)
        _is_bool("unit_norm", self.unit_norm)
        _in_range("seed_offset", self.seed_offset, 0, (1 << 64) - 1)

    @property
    def code_bits(self) -> int:
        """Width of the stored codes: ``bits``, less the QJL sign of ``"prod"``."""
        return self.bits - 1 if self.estimator == "prod" else self.bits

    def __str__(self) -> str:
        return f"{self.bits}-bit TurboQuant {self.estimator}"


class Exact(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="exact",
):
    """Uncompressed storage of one stream in pages.

    Parameters
    ----------
    dtype : {"f16", "bf16", "f32"}
        Stored type. The cache's ``kv_dtype`` is applied first.
    """

    dtype: Dtype = "f16"

    def __post_init__(self) -> None:
        _one_of("dtype", self.dtype, tuple(DTYPE_BYTES))

    def __str__(self) -> str:
        return f"exact {self.dtype}"


class Polar(
    msgspec.Struct,
    frozen=True,
    kw_only=True,
    forbid_unknown_fields=True,
    tag_field="kind",
    tag="polar",
):
    """Rotation, then neighbouring coordinates as radius and angle (host backend only).

    Parameters
    ----------
    bits : int
        Bits of an angle, 1 to 16; with ``mode="polar_qjl"`` 2 to 16, the sketch standing for one
        of them.
    mode : {"polar", "polar_qjl"}
        ``"polar_qjl"`` adds a QJL sign sketch of the residual, for inner products. Values are
        always ``"polar"``.
    projections : int, optional
        Signs in the sketch; ``head_dim`` by default.
    rotation : {"auto", "hadamard", "dense"}
        ``"auto"``: Hadamard for powers of two, else dense.
    radii : {"f16", "f32"}
        Stored type of radii and of the residual's norm.
    seed_offset : int
        Added to the cache's seed for this stream, modulo 2**64.
    """

    bits: int = 8
    mode: Literal["polar", "polar_qjl"] = "polar"
    projections: int | None = None
    rotation: Literal["auto", "hadamard", "dense"] = "auto"
    radii: Literal["f16", "f32"] = "f16"
    seed_offset: int = 0

    def __post_init__(self) -> None:
        _one_of("mode", self.mode, ("polar", "polar_qjl"))
        _one_of("rotation", self.rotation, ("auto", "hadamard", "dense"))
        _one_of("radii", self.radii, ("f16", "f32"))
        _in_range("bits", self.bits, 2 if self.mode == "polar_qjl" else 1, 16)
        _in_range("seed_offset", self.seed_offset, 0, (1 << 64) - 1)
        if self.projections is not None:
            if self.mode == "polar":
                raise ConfigError('projections need mode "polar_qjl"')
            _in_range("projections", self.projections, 1, 1 << 16)

    @property
    def angle_bits(self) -> int:
        """Width of the stored angles: ``bits``, less one for the sketch."""
        return self.bits - 1 if self.mode == "polar_qjl" else self.bits

    @property
    def unit_norm(self) -> bool:
        """Whether norms must be 1, as `TurboQuant` can demand: never."""
        return False

    def sketch_dim(self, head_dim: int) -> int:
        """Return the number of signs in the sketch, 0 without one."""
        return (self.projections or head_dim) if self.mode == "polar_qjl" else 0

    def __str__(self) -> str:
        return f"{self.bits}-bit {self.mode}"


Codec = TurboQuant | Polar | Exact


def _is_codec(name: str, value: object) -> None:
    if not isinstance(value, Codec):
        raise ConfigError(f"{name} must be TurboQuant, Polar or Exact, got {type(value).__name__}")


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
        _is_codec("keys", self.keys)
        _is_codec("values", self.values)
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
        _in_range("num_layers", self.num_layers, 1, 1 << 16)
        _in_range("num_kv_heads", self.num_kv_heads, 1, 1 << 16)
        _in_range("head_dim", self.head_dim, 3, 1 << 12)
        _in_range("num_pages", self.num_pages, 2, (1 << 31) - 1)
        _in_range("page_size", self.page_size, 1, 1 << 16)
        _one_of("page_size", self.page_size, PAGE_SIZES)
        _one_of("kv_dtype", self.kv_dtype, tuple(DTYPE_BYTES))
        _one_of("pool_order", self.pool_order, ("layer_major", "page_major"))
        _in_range("seed", self.seed, 0, (1 << 64) - 1)
        _in_range("first_kv_head", self.first_kv_head, 0, 1 << 20)
        if self.window is not None:
            _in_range("window", self.window, 0, 1 << 20)
            if self.window % self.page_size:
                raise ConfigError(
                    f"window must be a multiple of page_size {self.page_size}, got {self.window}"
                )
        _in_range("sinks", self.sinks, 0, self.page_size)
        _in_range(
            "num_window_slots", self.num_window_slots, 1 if self.window_tokens else 0, 1 << 24
        )
        _in_range("num_host_pages", self.num_host_pages, 0, (1 << 31) - 2)
        _is_bool("key_bounds", self.key_bounds)
        self._check_codecs()

    def _check_codecs(self) -> None:
        _is_codec("keys", self.keys)
        _is_codec("values", self.values)
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
            "keys": [_plain_codec(keys) for keys, _ in layers],
            "values": [_plain_codec(values) for _, values in layers],
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


#: Named codec pairs: what `keys` and `values` of a config become.
PRESETS: dict[str, tuple[Codec, Codec]] = {
    "k8v8": (TurboQuant(bits=8), TurboQuant(bits=8)),
    "k8v4": (TurboQuant(bits=8), TurboQuant(bits=4)),
    "k4v4": (TurboQuant(bits=4), TurboQuant(bits=4)),
    "k4v3": (TurboQuant(bits=4), TurboQuant(bits=3)),
    "k3v4": (TurboQuant(bits=3), TurboQuant(bits=4)),
    "k3v3": (TurboQuant(bits=3), TurboQuant(bits=3)),
    "k3v2": (TurboQuant(bits=3), TurboQuant(bits=2)),
    "k2v2": (TurboQuant(bits=2), TurboQuant(bits=2)),
    "prod4v4": (TurboQuant(bits=4, estimator="prod"), TurboQuant(bits=4)),
    "prod3v3": (TurboQuant(bits=3, estimator="prod"), TurboQuant(bits=3)),
    "exact": (Exact(), Exact()),
    "exact-bf16": (Exact(dtype="bf16"), Exact(dtype="bf16")),
}


def preset(name: str, **fields: Any) -> CacheConfig:
    """Build a ``CacheConfig`` from a named codec pair.

    Parameters
    ----------
    name : str
        A key of ``PRESETS``.
    **fields
        The other fields of ``CacheConfig``.

    Raises
    ------
    ConfigError
        If there is no such preset, or the fields contradict each other.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; there are: {', '.join(PRESETS)}")
    keys, values = PRESETS[name]
    return CacheConfig(keys=keys, values=values, **fields)


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of ``CacheConfig``."""
    return msgspec.json.schema(CacheConfig)


def _plain_codec(codec: Codec) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(codec)
    return fields


def _decode(read: Any) -> CacheConfig:
    try:
        config: CacheConfig = read()
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise ConfigError(str(error)) from error
    return config
