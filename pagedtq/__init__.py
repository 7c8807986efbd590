"""Paged KV cache with TurboQuant-compressed pages."""

from .config import (
    PRESETS,
    CacheConfig,
    Codec,
    Exact,
    LayerOverride,
    TurboQuant,
    json_schema,
    preset,
)

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CacheConfig",
    "Codec",
    "Exact",
    "LayerOverride",
    "TurboQuant",
    "__version__",
    "json_schema",
    "preset",
]
