"""The cache of the Rust crate `turbo-quant`: polar codes of one head, with exact shadows.

Vectors have any norm; scores are unscaled unless asked otherwise; values are decoded from radii
and angles alone. Two faults of the crate are not here: angles decode at the centre of their bin,
and a sketch is scaled by the residual's norm.
"""

from .compressor import SHADOW_WARNING, KvCacheCompressor
from .errors import (
    DimensionMismatch,
    InvalidBitWidth,
    MalformedCode,
    NonFiniteInput,
    OddDimension,
    RotationFailed,
    TurboQuantError,
    UnsupportedDimension,
    ZeroDimension,
    ZeroProjectionCount,
)
from .types import (
    AttentionScale,
    AttentionScoreOptions,
    CustomScale,
    Exact,
    KvCacheConfig,
    KvMemoryReportV1,
    KvQuantPolicy,
    KvRuntimeConfig,
    KvShadowScore,
    Quantized,
    RotationKind,
    TurboMode,
    json_schemas,
)

__all__ = [
    "SHADOW_WARNING",
    "AttentionScale",
    "AttentionScoreOptions",
    "CustomScale",
    "DimensionMismatch",
    "Exact",
    "InvalidBitWidth",
    "KvCacheCompressor",
    "KvCacheConfig",
    "KvMemoryReportV1",
    "KvQuantPolicy",
    "KvRuntimeConfig",
    "KvShadowScore",
    "MalformedCode",
    "NonFiniteInput",
    "OddDimension",
    "Quantized",
    "RotationFailed",
    "RotationKind",
    "TurboMode",
    "TurboQuantError",
    "UnsupportedDimension",
    "ZeroDimension",
    "ZeroProjectionCount",
    "json_schemas",
]
