"""Policies, configurations and reports of `compat.turbo_quant`, as plain structs.

Their JSON has the crate's field names and tags; `msgspec.json.schema` gives a schema of each.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec


class TurboMode(enum.Enum):
    """Angles and radii alone, or with a QJL sketch of the residual."""

    POLAR_ONLY = "PolarOnly"
    POLAR_WITH_QJL = "PolarWithQjl"


class RotationKind(enum.Enum):
    """Hadamard (powers of two only), stored dense matrix, or whichever fits the dimension."""

    AUTO = "Auto"
    FAST_HADAMARD = "FastHadamard"
    STORED_QR = "StoredQr"


class KvQuantPolicy(msgspec.Struct, frozen=True):
    """How one stream is kept: `Exact` or `Quantized`, which its methods make."""

    @staticmethod
    def exact() -> Exact:
        """Keep float32 vectors."""
        return Exact()

    @staticmethod
    def quantized(bits: int, projections: int) -> Quantized:
        """Compress with a sketch, rotated by what fits the dimension."""
        return Quantized(bits, projections)

    @staticmethod
    def quantized_with_stored_rotation(bits: int, projections: int) -> Quantized:
        """Compress with a sketch, rotated by a dense matrix."""
        return Quantized(bits, projections, rotation_kind=RotationKind.STORED_QR)


class Exact(KvQuantPolicy, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="exact"):
    """Keep float32 vectors and no codes.

    They lie in exact pages and count as shadows; without ``keep_exact_shadow`` they cannot be read.
    """


class Quantized(
    KvQuantPolicy, frozen=True, forbid_unknown_fields=True, tag_field="kind", tag="quantized"
):
    """Keep polar codes.

    Parameters
    ----------
    bits : int
        Bits of an angle; one of them stands for the sketch, if there is one.
    projections : int
        Signs of the sketch.
    mode : TurboMode
        Whether there is one.
    rotation_kind : RotationKind
        Which rotation comes first.
    """

    bits: int
    projections: int
    mode: TurboMode = TurboMode.POLAR_WITH_QJL
    rotation_kind: RotationKind = RotationKind.AUTO

    @property
    def angle_bits(self) -> int:
        """Bits an angle really has."""
        return self.bits - (self.mode is TurboMode.POLAR_WITH_QJL)

    def encoded_bytes(self, head_dim: int) -> int:
        """Return the crate's bytes of one vector: float32 radii, packed angles, packed signs."""
        signs = self.projections if self.mode is TurboMode.POLAR_WITH_QJL else 0
        pairs = head_dim // 2
        return 4 * pairs + -(-pairs * self.angle_bits // 8) + -(-signs // 8)


class KvRuntimeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a compressor keeps of one attention head.

    Parameters
    ----------
    head_dim : int
        Length of keys and values.
    key_policy, value_policy : Exact or Quantized
        How each is kept.
    seed : int
        Of the keys; values use ``seed + 0x12345678ABCDEF00``, modulo 2**64.
    keep_exact_shadow : bool
        Keep exact copies of everything, to compare and to fall back on.
    """

    head_dim: int
    key_policy: Exact | Quantized
    value_policy: Exact | Quantized
    seed: int
    keep_exact_shadow: bool


class KvCacheConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The older, symmetric configuration: one policy for both streams, shadows kept."""

    head_dim: int
    bits: int
    projections: int
    seed: int

    def runtime(self) -> KvRuntimeConfig:
        """Return the same as a `KvRuntimeConfig`."""
        policy = KvQuantPolicy.quantized(self.bits, self.projections)
        return KvRuntimeConfig(self.head_dim, policy, policy, self.seed, True)


class CustomScale(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Multiply scores by a number of one's own."""

    value: float = msgspec.field(name="Custom")


class AttentionScale(enum.Enum):
    """What scores are multiplied by: 1, or ``1 / sqrt(head_dim)``; `custom` gives any other."""

    NONE = "None"
    BY_HEAD_DIM = "ByHeadDim"

    @staticmethod
    def custom(value: float) -> CustomScale:
        """Multiply scores by ``value``."""
        return CustomScale(value)


class AttentionScoreOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of `KvCacheCompressor.attention_scores_with_options`."""

    scale: AttentionScale | CustomScale = AttentionScale.NONE


class KvShadowScore(msgspec.Struct, frozen=True):
    """One key's exact score, its score from codes, and how far they are apart."""

    exact: float
    compressed: float
    abs_error: float


class KvMemoryReportV1(msgspec.Struct, frozen=True):
    """Bytes of codes and shadows.

    ``compressed_*``, ``sidecar_only_bytes`` and ``resident_bytes`` (codes and shadows) are the
    crate's figures, with float32 radii and every sketch. ``page_bytes`` is what the pages of these
    tokens really take, codes and shadows together, and ``pool_bytes`` all that is allocated for
    pages.
    """

    schema: str
    token_count: int
    head_dim: int
    compressed_key_bytes: int
    compressed_value_bytes: int
    exact_shadow_key_bytes: int
    exact_shadow_value_bytes: int
    raw_fp32_baseline_bytes: int
    fp16_baseline_bytes: int
    resident_bytes: int
    sidecar_only_bytes: int
    warnings: list[str]
    page_bytes: int
    pool_bytes: int


def json_schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON Schema of every configuration and report, by the crate's name of it."""
    kinds: dict[str, Any] = {
        "KvQuantPolicy": Exact | Quantized,
        "KvCacheConfig": KvCacheConfig,
        "KvRuntimeConfig": KvRuntimeConfig,
        "AttentionScale": AttentionScale | CustomScale,
        "AttentionScoreOptions": AttentionScoreOptions,
        "KvShadowScore": KvShadowScore,
        "KvMemoryReportV1": KvMemoryReportV1,
    }
    return {name: msgspec.json.schema(kind) for name, kind in kinds.items()}
