"""Seconds of a step from the bytes it moves and the arithmetic it does.

``seconds = max(bytes / (bandwidth * efficiency), flops / peak) + overhead``

==============  ===================================================================================
bytes           all weights once; the KV bytes that attention reads: of each decoding sequence its
                codes and its exact rows, of each prefill chunk its prefix once; the KV bytes
                written. With an exact window, tokens inside it are read at their exact size and
                not as codes, and a new token is written twice: to the ring and, sealed, to a page.
flops           two per weight and processed token, and four per attended token, query head and
                channel (``q . k`` and ``p * v``)
==============  ===================================================================================

A swap costs its bytes over the link to the host, ``bytes / link_bandwidth`` each way; see
`host_link` for what of it steps wait for.

It is a roofline: data movement and arithmetic overlap perfectly, every format's kernels reach the
same share of the bandwidth, and decoding the codes costs no time of its own. It bounds what a
format can gain from moving and holding fewer bytes; it predicts no kernel.
"""

from __future__ import annotations

import msgspec
import numpy as np

from ..config import CacheConfig
from ..errors import ConfigError
from ..models import ModelShape
from ..paging.layout import PageLayout
from ..serving.preemption import PreemptionCosts
from .workload import Float64, Int64


class Hardware(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Constants of the machine.

    Parameters
    ----------
    name : str
        Shown in reports.
    bandwidth : float
        Bytes per second of a plain copy. Default: 4.3 TB/s, measured on an H200 whose datasheet
        says 4.8 TB/s.
    efficiency : float
        Share of ``bandwidth`` that the kernels of a decode step reach, in (0, 1]. FlashMLA reports
        90 % of the datasheet's figure when memory-bound (its README), about that copy's speed.
    flops : float
        Attainable operations per second. Default: 70 % of the H200's 989 TFLOP/s for dense
        bfloat16 (NVIDIA H200 datasheet, without sparsity), what large matrix products reach.
    step_overhead : float
        Seconds of every step that are neither: launches, scheduling, sampling.
    link_bandwidth : float
        Bytes per second between device and host, each way. Default: 50 GB/s. PCIe 5.0 x16 carries
        64 GB/s a way; nvbandwidth's users report 52.8 GB/s from H100s to the host (its issue 24).
    """

    name: str = "H200"
    bandwidth: float = 4.3e12
    efficiency: float = 0.9
    flops: float = 0.7 * 989e12
    step_overhead: float = 1e-3
    link_bandwidth: float = 50e9

    def __post_init__(self) -> None:
        for field in ("bandwidth", "flops", "link_bandwidth"):
            if not 0 < getattr(self, field) < float("inf"):
                raise ConfigError(f"{field} must be positive, got {getattr(self, field)}")
        if not 0 < self.efficiency <= 1:
            raise ConfigError(f"efficiency must be in (0, 1], got {self.efficiency}")
        if not 0 <= self.step_overhead < float("inf"):
            raise ConfigError(f"step_overhead must not be negative, got {self.step_overhead}")


class CostModel:
    """The cost of steps for one model shape, storage format and machine.

    Parameters
    ----------
    shape : ModelShape
        The model.
    config : CacheConfig
        The format; its layers and heads are those of ``shape``.
    hardware : Hardware
        The machine.
    byte_share : float
        Scales page bytes (``Format.byte_share``).

    Attributes
    ----------
    code_bytes, exact_bytes : float
        Bytes of one token, all layers and heads: as stored in pages, and exact in the window.
    link_bandwidth : float
        Bytes per second to the host and from it.
    exact_tokens : int
        First and last tokens of a sequence that are read from the window, 0 without one.
    """

    def __init__(
        self, shape: ModelShape, config: CacheConfig, hardware: Hardware, byte_share: float = 1.0
    ) -> None:
        layout = PageLayout(config)
        rows = config.window_tokens + config.num_sinks
        self.code_bytes = layout.token_bytes * byte_share
        self.exact_bytes = layout.window_slot_bytes / rows if rows else 0.0
        # Layers without an overlay (exact ones) read every token from pages: they make the exact
        # token cheaper by their share, so the difference below is over overlay layers only.
        overlay = [layer for layer in range(config.num_layers) if config.has_overlay(layer)]
        covered = sum(layout.layer_page_bytes[layer] for layer in overlay) / config.page_size
        self._extra_bytes = self.exact_bytes - covered * byte_share
        self.exact_tokens = rows if overlay else 0
        self._weight_bytes = float(shape.weight_bytes)
        self._flops_per_token = 2.0 * shape.num_weights
        self._flops_per_pair = 4.0 * shape.num_layers * shape.num_q_heads * shape.head_dim
        self._seconds_per_byte = 1 / (hardware.bandwidth * hardware.efficiency)
        self._seconds_per_flop = 1 / hardware.flops
        self._overhead = hardware.step_overhead
        self.link_bandwidth = hardware.link_bandwidth

    def exact_part(self, lengths: Int64) -> Int64:
        """Return how many tokens of each sequence attention reads from its window.

        The last ``W`` and the first ``S`` tokens: ``min(length, W + S)``.
        """
        exact: Int64 = np.minimum(lengths, self.exact_tokens)
        return exact

    def linear_seconds(self, tokens: int) -> float:
        """Return the seconds that multiplying tokens by all weights takes at peak arithmetic."""
        return tokens * self._flops_per_token * self._seconds_per_flop

    def preemption_costs(self) -> PreemptionCosts:
        """Return what the rule of preemption compares on this machine.

        Swapping counts with its whole time on the link, both ways, although copies may overlap
        steps; computing again with what the weights take at peak arithmetic, without attention.
        """
        link = self.link_bandwidth
        return PreemptionCosts(link, link, prefill_rate=1 / self.linear_seconds(1))

    def step_seconds(
        self,
        new_tokens: Int64 | int,
        read_tokens: Int64 | int,
        exact_tokens: Int64 | int,
        attended_pairs: Int64 | int,
    ) -> Float64:
        """Return the seconds of steps, float64 of the arguments' common shape.

        Parameters
        ----------
        new_tokens : int64[k]
            Tokens processed and stored per step, decoded and prefilled.
        read_tokens : int64[k]
            Cached tokens read, summed over sequences (a chunk of prefill reads its prefix once).
        exact_tokens : int64[k]
            Those of ``read_tokens`` that come from windows.
        attended_pairs : int64[k]
            Query-key pairs: like ``read_tokens``, but counted for each query token.
        """
        # Every operation is elementwise, so a step costs the same alone and among many.
        moved = (
            self._weight_bytes
            + read_tokens * self.code_bytes
            + exact_tokens * self._extra_bytes
            + new_tokens * (self.code_bytes + self.exact_bytes)
        )
        work = new_tokens * self._flops_per_token + attended_pairs * self._flops_per_pair
        seconds: Float64 = np.maximum(moved * self._seconds_per_byte, work * self._seconds_per_flop)
        return seconds + self._overhead
