"""How one stream is stored: the codecs that keys and values of a layer can have."""

from __future__ import annotations

from typing import Literal

import msgspec

from ..errors import ConfigError
from .field_checks import check_bool, check_choice, check_int

#: Element types of keys and values, and their bytes.
DTYPE_BYTES = {"f16": 2, "bf16": 2, "f32": 4}
Dtype = Literal["f16", "bf16", "f32"]


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
        check_choice("estimator", self.estimator, ("mse", "prod"))
        check_choice("scale", self.scale, ("norm_corrected", "searched", "none", "unbiased"))
        check_choice("rotation", self.rotation, ("hadamard", "dense"))
        check_choice("projection", self.projection, ("gaussian", "orthogonal"))
        low = 2 if self.estimator == "prod" else 1
        check_int("bits", self.bits, low, 8)
        check_bool("unit_norm", self.unit_norm)
        check_int("seed_offset", self.seed_offset, 0, (1 << 64) - 1)

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
        check_choice("dtype", self.dtype, tuple(DTYPE_BYTES))

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
        check_choice("mode", self.mode, ("polar", "polar_qjl"))
        check_choice("rotation", self.rotation, ("auto", "hadamard", "dense"))
        check_choice("radii", self.radii, ("f16", "f32"))
        check_int("bits", self.bits, 2 if self.mode == "polar_qjl" else 1, 16)
        check_int("seed_offset", self.seed_offset, 0, (1 << 64) - 1)
        if self.projections is not None:
            if self.mode == "polar":
                raise ConfigError('projections need mode "polar_qjl"')
            check_int("projections", self.projections, 1, 1 << 16)

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


def check_codec(name: str, value: object) -> None:
    """Refuse what is no codec."""
    if not isinstance(value, Codec):
        raise ConfigError(f"{name} must be TurboQuant, Polar or Exact, got {type(value).__name__}")
