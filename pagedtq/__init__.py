"""Paged KV cache with TurboQuant-compressed pages."""

from .cache import PagedKVCache
from .config import (
    PRESETS,
    CacheConfig,
    Codec,
    Exact,
    LayerOverride,
    Polar,
    TurboQuant,
    json_schema,
    preset,
)
from .errors import PagedTQError
from .paging.block_chain import SharingOptions
from .paging.evict_lowest import EvictLowest
from .paging.eviction import KeepFirstLast

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "CacheConfig",
    "Codec",
    "EvictLowest",
    "Exact",
    "KeepFirstLast",
    "LayerOverride",
    "PagedKVCache",
    "PagedTQError",
    "Polar",
    "SharingOptions",
    "TurboQuant",
    "__version__",
    "json_schema",
    "preset",
]
