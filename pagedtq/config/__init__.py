"""Configuration as frozen structs: what to store, how, and how much of it.

Nothing derived is stored: sizes are methods and properties. Constructing, decoding, converting and
replacing all run the same invariants (``__post_init__``).
"""

from .cache_config import FORMAT_VERSION, PAGE_SIZES, CacheConfig, LayerOverride, json_schema
from .codecs import DTYPE_BYTES, Codec, Dtype, Exact, Polar, TurboQuant
from .presets import PRESETS, preset

__all__ = [
    "DTYPE_BYTES",
    "FORMAT_VERSION",
    "PAGE_SIZES",
    "PRESETS",
    "CacheConfig",
    "Codec",
    "Dtype",
    "Exact",
    "LayerOverride",
    "Polar",
    "TurboQuant",
    "json_schema",
    "preset",
]
