"""Settings by name, and the ones worth comparing for a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from ..config import PRESETS, Codec, TurboQuant, preset
from ..errors import ArgumentError, ConfigError
from ..models import ModelShape
from .formats import Array, CacheFormat

_NAME = re.compile(
    r"(?P<preset>[a-z0-9]+(?:-bf16)?)(?:-w(?P<window>\d{1,7}))?(?P<centred>-centred)?"
    r"(?P<searched>-searched)?"
)

#: What ``pagedtq evaluate`` compares unless told otherwise.
DEFAULT_SETTINGS = (
    "exact-w0",
    "k8v8-w0-centred",
    "k8v4-w0-centred",
    "k4v4-w0",
    "k4v4-w0-centred",
    "k4v4-w64-centred",
    "k4v4-w64-centred-searched",
    "k3v3-w0",
    "k3v3-w0-centred",
    "k3v3-w64-centred",
    "k2v2-w0",
    "k2v2-w0-centred",
    "k2v2-w64-centred",
    "prod4v4-w0",
)


def setting(
    name: str, shape: ModelShape, key_means: Array | None = None, *, seed: int = 0
) -> CacheFormat:
    """Build a format from its name: ``PRESET[-wN][-centred][-searched]``.

    Parameters
    ----------
    name : str
        A preset, an exact window of N tokens with 4 sinks (the default window without it, none
        with ``-w0``), key means subtracted, codes searched (``scale="searched"``).
    shape : ModelShape
        The model's.
    key_means : ndarray of float32 ``[num_layers, num_kv_heads, head_dim]``, optional
        Used by ``-centred`` only.
    seed : int
        Of the rotations.

    Raises
    ------
    ConfigError
        If there is no such setting, or nothing in it to search for.
    ArgumentError
        If it is centred and there are no means.
    """
    match = _NAME.fullmatch(name)
    if match is None or match["preset"] not in PRESETS:
        raise ConfigError(
            f"unknown setting {name!r}: expected PRESET[-wN][-centred][-searched] with a preset of "
            + ", ".join(PRESETS)
        )
    centred = match["centred"] is not None
    if centred and key_means is None:
        raise ArgumentError(f"setting {name!r} is centred, but key means were not calibrated")
    window = None if match["window"] is None else int(match["window"])
    config = preset(match["preset"], **config_fields(shape), window=window, seed=seed)
    if match["searched"] is not None:
        config = config.replace(keys=searched(config.keys), values=searched(config.values))
    return CacheFormat(name, config, key_means if centred else None)


def searched(codec: Codec) -> Codec:
    """Return a codec that searches its codes.

    Raises
    ------
    ConfigError
        If it is not TurboQuant with the MSE estimator.
    """
    if not isinstance(codec, TurboQuant) or codec.estimator != "mse":
        raise ConfigError(f"codes are searched by MSE TurboQuant only, not by {codec}")
    return msgspec.structs.replace(codec, scale="searched")


def config_fields(shape: ModelShape) -> dict[str, Any]:
    """Return the fields of `CacheConfig` that a model's shape decides, with the smallest pool."""
    return {
        "num_layers": shape.num_layers,
        "num_kv_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_pages": 2,
    }


def settings(
    names: Sequence[str], shape: ModelShape, key_means: Array | None = None, *, seed: int = 0
) -> list[CacheFormat]:
    """Build several settings; see `setting`."""
    return [setting(name, shape, key_means, seed=seed) for name in names]
