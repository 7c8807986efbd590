"""Named codec pairs, and configurations made from them."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .cache_config import CacheConfig
from .codecs import Codec, Exact, TurboQuant

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
