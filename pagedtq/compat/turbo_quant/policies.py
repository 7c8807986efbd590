"""From policies to the codecs of pages."""

from __future__ import annotations

from typing import Literal

from ...config import Codec, Polar
from ...config import Exact as ExactCodec
from ...errors import ConfigError
from ..growing import check_type
from .errors import (
    InvalidBitWidth,
    OddDimension,
    RotationFailed,
    UnsupportedDimension,
    ZeroDimension,
    ZeroProjectionCount,
)
from .types import Exact, Quantized, RotationKind, TurboMode

#: How pages hold what a policy keeps exactly, and shadows.
EXACT = ExactCodec(dtype="f32")

_VALUE_SEED = 0x1234_5678_ABCD_EF00
_ROTATIONS: dict[RotationKind, Literal["auto", "hadamard", "dense"]] = {
    RotationKind.AUTO: "auto",
    RotationKind.FAST_HADAMARD: "hadamard",
    RotationKind.STORED_QR: "dense",
}


def check_dimension(head_dim: int, paired: bool) -> None:
    """Refuse a head dimension that a cache, or one with polar codes, cannot have."""
    if type(head_dim) is not int or head_dim < 0:
        raise ConfigError(f"head_dim must be an int of at least 0, got {head_dim!r}")
    if head_dim == 0:
        raise ZeroDimension
    if paired and head_dim % 2:
        raise OddDimension(head_dim)
    if not 3 <= head_dim <= 4096:
        raise UnsupportedDimension(head_dim)


def page_codec(
    policy: Exact | Quantized, head_dim: int, radii: Literal["f16", "f32"], stream: str
) -> Codec:
    """Return the page codec of a policy; values have no use for a sketch and get none."""
    if isinstance(policy, Exact):
        return EXACT
    check_type(f"{stream}_policy", policy, Quantized)
    check_type("mode", policy.mode, TurboMode)
    check_type("rotation_kind", policy.rotation_kind, RotationKind)
    sketch = policy.mode is TurboMode.POLAR_WITH_QJL
    if not (type(policy.bits) is int and 1 + sketch <= policy.bits <= 16):
        raise InvalidBitWidth(policy.bits, 1 + sketch)
    if sketch and policy.projections == 0:
        raise ZeroProjectionCount
    power_of_two = head_dim & (head_dim - 1) == 0
    if policy.rotation_kind is RotationKind.FAST_HADAMARD and not power_of_two:
        raise RotationFailed(f"a fast Hadamard rotation needs a power of two, got {head_dim}")
    rotation = _ROTATIONS[policy.rotation_kind]
    if stream == "value":
        bits = policy.angle_bits
        return Polar(bits=bits, rotation=rotation, radii=radii, seed_offset=_VALUE_SEED)
    if not sketch:
        return Polar(bits=policy.bits, rotation=rotation, radii=radii)
    return Polar(
        bits=policy.bits,
        mode="polar_qjl",
        projections=policy.projections,
        rotation=rotation,
        radii=radii,
    )
