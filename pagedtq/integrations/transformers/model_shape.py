"""What a cache must know of a transformers model, and which models it cannot serve."""

from __future__ import annotations

import hashlib
import inspect
import json
from typing import Any, NamedTuple

import torch
from transformers.cache_utils import get_layer_types_and_kwargs

from ...config import PRESETS, CacheConfig, Codec, Dtype, Exact
from ...errors import ArgumentTypeError, ConfigError, UnsupportedError

# Elements of each weight that enter the digest.
_SAMPLES = 64
# What the model or its batch decides.
_FIXED_FIELDS = ("num_layers", "num_pages", "num_window_slots")
# What decides keys beside the weights.
_KEY_FIELDS = (
    "model_type",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "layer_types",
    "sliding_window",
    "rope_parameters",
)
_LAYER_TYPES = ("full_attention", "sliding_attention")


class DecoderShape(NamedTuple):
    """Attention of a decoder.

    Attributes
    ----------
    num_layers, num_kv_heads, head_dim : int
        As in `CacheConfig`.
    sliding_windows : tuple of int or None
        Per layer, how many tokens a query reads, itself included; None for all.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    sliding_windows: tuple[int | None, ...]


def decoder_of(model: Any) -> Any:
    """Return the module that runs a model's decoder layers.

    Raises
    ------
    ArgumentTypeError
        If it is no transformers model.
    UnsupportedError
        If it has an encoder, or its forward takes no cache.
    """
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "get_decoder"):
        raise ArgumentTypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__} has an encoder; only decoder-only models are supported"
        )
    decoder = model.get_decoder()
    names = inspect.signature(decoder.forward).parameters
    if "past_key_values" not in names:
        raise UnsupportedError(
            f"{type(decoder).__name__} has no attention cache: its forward takes no past_key_values"
        )
    return decoder


def decoder_shape(config: Any) -> DecoderShape:
    """Read the attention's shape from a model's configuration.

    Raises
    ------
    UnsupportedError
        If some layers have no attention of their own, another shape than the others, values of
        another size than keys, or a mask that is neither causal nor a sliding window.
    """
    text = config.get_text_config(decoder=True)
    kind = type(text).__name__
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedError(f"{kind} has multi-head latent attention, which is not supported")
    layers = list(text.per_layer_config)
    shapes = {(_num_kv_heads(layer), _head_dim(layer)) for layer in layers}
    if len(shapes) != 1:
        raise UnsupportedError(
            f"{kind} has layers of different shapes, (num_kv_heads, head_dim) are "
            f"{sorted(shapes)}; all layers must have the same"
        )
    types, arguments = get_layer_types_and_kwargs(text)
    others = sorted({name for name in types if name not in _LAYER_TYPES})
    if others:
        raise UnsupportedError(
            f"{kind} has layers of type {', '.join(others)} (dummy: without keys and values of "
            f"their own); supported are {' and '.join(_LAYER_TYPES)}"
        )
    ((num_kv_heads, head_dim),) = shapes
    windows = tuple(one.get("sliding_window") for one in arguments)
    return DecoderShape(len(types), num_kv_heads, head_dim, windows)


def cache_config(
    shape: DecoderShape,
    settings: str | tuple[Codec, Codec] | CacheConfig,
    dtype: Dtype,
    fields: dict[str, Any],
) -> CacheConfig:
    """Make a cache's configuration for a model.

    Parameters
    ----------
    shape : DecoderShape
        The model's attention.
    settings : str, (keys, values) or CacheConfig
        A preset, a pair of codecs, or a whole configuration; ``"exact"`` is the model's own type.
    dtype : {"f16", "bf16", "f32"}
        The model's type.
    fields : dict
        Fields of `CacheConfig` that win.

    Raises
    ------
    ConfigError
        For an unknown preset or field, one that follows the model, or a configuration of another
        shape.
    """
    for name in _FIXED_FIELDS:
        if name in fields:
            raise ConfigError(f"{name} follows the model and its batch; leave it out")
    try:
        if isinstance(settings, CacheConfig):
            config = settings.replace(**fields)
        else:
            keys, values = _codecs(settings, fields.get("kv_dtype", dtype))
            own: dict[str, Any] = {
                "num_kv_heads": shape.num_kv_heads,
                "head_dim": shape.head_dim,
                "kv_dtype": dtype,
                "keys": keys,
                "values": values,
            }
            return CacheConfig(num_layers=shape.num_layers, num_pages=2, **(own | fields))
    except TypeError as error:
        raise ConfigError(f"{error}; see CacheConfig for the fields") from error
    for name in ("num_layers", "num_kv_heads", "head_dim"):
        if getattr(config, name) != getattr(shape, name) and name not in fields:
            raise ConfigError(
                f"the model has {name} {getattr(shape, name)}, the configuration "
                f"{getattr(config, name)}"
            )
    return config


def _codecs(settings: str | tuple[Codec, Codec], dtype: Dtype) -> tuple[Codec, Codec]:
    if not isinstance(settings, str):
        keys, values = settings
        return keys, values
    if settings == "exact":
        return Exact(dtype=dtype), Exact(dtype=dtype)
    if settings not in PRESETS:
        raise ConfigError(f"unknown preset {settings!r}; there are: {', '.join(PRESETS)}")
    return PRESETS[settings]


def model_digest(model: Any) -> str:
    """Return a SHA-256 that tells models apart: structure, and a sample of every weight.

    Weights count in bfloat16, so that a bfloat16 checkpoint has one digest however it is loaded.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A decoder with its weights.

    Raises
    ------
    UnsupportedError
        If weights are not loaded (meta device).
    """
    decoder = decoder_of(model)
    text = model.config.get_text_config(decoder=True)
    fields = {name: getattr(text, name, None) for name in _KEY_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, weight in decoder.named_parameters():
        if weight.is_meta:
            raise UnsupportedError(f"weight {name} is not loaded (it is on the meta device)")
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)][:_SAMPLES]
        if sample.is_floating_point():
            sample = sample.to(torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        digest.update(sample.to(torch.int64).cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _num_kv_heads(config: Any) -> int:
    for name in ("num_key_value_heads", "num_kv_heads"):
        heads = getattr(config, name, None)
        old_falcon = name == "num_kv_heads" and not getattr(
            config, "new_decoder_architecture", True
        )
        if heads is not None and not old_falcon:
            return int(heads)
    return 1 if getattr(config, "multi_query", False) else int(config.num_attention_heads)


def _head_dim(config: Any) -> int:
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // config.num_attention_heads
    value_dim = getattr(config, "v_head_dim", None)
    if value_dim is not None and value_dim != head_dim:
        raise UnsupportedError(
            f"v_head_dim {value_dim} != head_dim {head_dim} is not supported: keys and values "
            f"must have the same size"
        )
    return int(head_dim)
