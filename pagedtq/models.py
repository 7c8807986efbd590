"""Shapes of models: what of them decides memory and work."""

from __future__ import annotations

import msgspec

from .errors import ConfigError


class ModelShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a model decides memory and work, on one rank.

    Parameters
    ----------
    name : str
        Shown in reports.
    num_layers, num_kv_heads, num_q_heads, head_dim : int
        Attention shape of this rank; query heads are a multiple of KV heads.
    weight_bytes : int
        Bytes of the weights a step reads on this rank.
    bytes_per_weight : float
        2 for 16-bit weights; decides the number of weights, hence the flops of a token.
    """

    name: str
    num_layers: int
    num_kv_heads: int
    num_q_heads: int
    head_dim: int
    weight_bytes: int
    bytes_per_weight: float = 2.0

    def __post_init__(self) -> None:
        for field in ("num_layers", "num_kv_heads", "num_q_heads", "head_dim"):
            if getattr(self, field) < 1:
                raise ConfigError(f"{field} must be at least 1, got {getattr(self, field)}")
        if self.num_q_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_q_heads must be a multiple of num_kv_heads {self.num_kv_heads}, "
                f"got {self.num_q_heads}"
            )
        if self.weight_bytes < 0 or not self.bytes_per_weight > 0:
            raise ConfigError(
                "weight_bytes must not be negative and bytes_per_weight must be positive, "
                f"got {self.weight_bytes} and {self.bytes_per_weight}"
            )

    @property
    def num_weights(self) -> float:
        """Weights of this rank."""
        return self.weight_bytes / self.bytes_per_weight


#: Named shapes; weights in bfloat16, counts from the models' published configurations.
MODELS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape(
            name="llama-3.1-8b",
            num_layers=32,
            num_kv_heads=8,
            num_q_heads=32,
            head_dim=128,
            weight_bytes=16_060_522_496,
        ),
        # One of four tensor-parallel ranks: heads and weights divided by four.
        ModelShape(
            name="llama-3.1-70b-tp4",
            num_layers=80,
            num_kv_heads=2,
            num_q_heads=16,
            head_dim=128,
            weight_bytes=35_276_853_248,
        ),
        ModelShape(
            name="qwen2.5-7b",
            num_layers=28,
            num_kv_heads=4,
            num_q_heads=28,
            head_dim=128,
            weight_bytes=15_231_233_024,
        ),
        # Every query head has its own keys and values: four times the cache of its successors.
        ModelShape(
            name="llama-2-7b",
            num_layers=32,
            num_kv_heads=32,
            num_q_heads=32,
            head_dim=128,
            weight_bytes=13_476_831_232,
        ),
        # Small enough to execute for real on a laptop.
        ModelShape(
            name="tiny",
            num_layers=2,
            num_kv_heads=2,
            num_q_heads=8,
            head_dim=64,
            weight_bytes=4_000_000,
        ),
    )
}
