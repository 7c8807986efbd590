"""Ways to store a KV cache, as what they do to vectors and how many bytes they take.

Fidelity is measured on whole texts at once, not token by token. For that a format answers three
questions: what comes back for keys and values once they are coded (`KVFormat.roundtrip`), which
positions a query reads coded and which exactly (`KVFormat.spans`), and how many bytes a sequence
of so many tokens holds (`KVFormat.sequence_bytes`). The library's own formats answer with the
bytes of real pages; the formats of others are in `peer_formats`.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ..backends.host import HostBackend
from ..config import DTYPE_BYTES, CacheConfig
from ..paging.layout import PageLayout

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]


class CodedSpans(NamedTuple):
    """Which positions a query reads coded; all others below its own position it reads exactly.

    Attributes
    ----------
    first : int64[n]
        Positions below are exact (sinks).
    key_stop, value_stop : int64[n]
        Positions from there on are exact (the most recent ones), by stream.
    """

    first: Int64
    key_stop: Int64
    value_stop: Int64


class KVFormat(Protocol):
    """What fidelity has to know of a way to store keys and values."""

    @property
    def name(self) -> str:
        """How tables and plots call it."""
        ...

    def roundtrip(self, layer: int, keys: Float32, values: Float32) -> tuple[Float32, Float32]:
        """Return what is read back for ``[n, num_kv_heads, head_dim]`` of one sequence's tokens."""
        ...

    def spans(self, layer: int, lengths: Int64) -> CodedSpans:
        """Say what queries read coded in sequences of ``lengths`` tokens, their own included."""
        ...

    def exact_dtype(self, layer: int) -> np.dtype[Any] | None:
        """Return what exact positions are rounded to; None for as they come."""
        ...

    def sequence_bytes(self, tokens: int) -> int:
        """Return the bytes that a sequence of ``tokens`` holds, all layers and heads."""
        ...


class CacheFormat:
    """A `CacheConfig` as a format: codes from real pages, bytes of pages and windows.

    Parameters
    ----------
    name : str
        How tables and plots call it.
    config : CacheConfig
        Codecs, window and sinks; its ``num_pages`` and ``num_window_slots`` do not matter.
    key_means : ndarray of float32 ``[num_layers, num_kv_heads, head_dim]``, optional
        Subtracted from keys before coding.
    """

    def __init__(self, name: str, config: CacheConfig, key_means: Array | None = None) -> None:
        self._name = name
        self.config = config
        self.key_means = key_means
        self._layout = PageLayout(config)
        self._backend: HostBackend | None = None

    @property
    def name(self) -> str:
        """How tables and plots call it."""
        return self._name

    def roundtrip(self, layer: int, keys: Float32, values: Float32) -> tuple[Float32, Float32]:
        """Store tokens in pages and read them back; see `KVFormat`.

        How a token got its codes does not matter, so the window plays no part here.
        """
        size = self.config.page_size
        pages = -(-len(keys) // size) + 1
        backend = self._backend
        if backend is None or backend.config.num_pages < pages:
            config = self.config.replace(window=0, num_window_slots=1, num_pages=max(pages, 2))
            backend = self._backend = HostBackend(config, key_means=self.key_means)
        slots = np.arange(size, size + len(keys))
        backend.store(layer, keys, values, slots)
        decoded = backend.load(layer, slots)
        return decoded[0].astype(np.float32), decoded[1].astype(np.float32)

    def spans(self, layer: int, lengths: Int64) -> CodedSpans:
        """Say what a query reads coded, as `PagedKVCache.attend` does after token-wise appends."""
        if not self.config.has_overlay(layer):
            # Fully exact layers come back from `roundtrip` as their pages hold them.
            return CodedSpans(np.zeros_like(lengths), lengths, lengths)
        ring_start = np.maximum(lengths - self.config.window_tokens, 0)
        first = np.minimum(self.config.num_sinks, ring_start)
        return CodedSpans(first, ring_start, ring_start)

    def exact_dtype(self, layer: int) -> np.dtype[Any] | None:
        """Return ``kv_dtype``; bfloat16 models pass their own values through unchanged."""
        return np.dtype(np.float16) if self.config.kv_dtype == "f16" else None

    def sequence_bytes(self, tokens: int) -> int:
        """Count whole pages, and the window and sinks if there are any."""
        pages = -(-tokens // self.config.page_size)
        window = self._layout.window_slot_bytes if self.config.window_tokens else 0
        return pages * self._layout.page_bytes + window


class Uncompressed:
    """Keys and values as the model made them: the reference of every comparison."""

    name = "exact"

    def __init__(self, num_layers: int, num_kv_heads: int, head_dim: int) -> None:
        self._token_bytes = num_layers * num_kv_heads * head_dim * 2 * DTYPE_BYTES["f16"]

    def roundtrip(self, layer: int, keys: Float32, values: Float32) -> tuple[Float32, Float32]:
        """Return the tokens."""
        return keys, values

    def spans(self, layer: int, lengths: Int64) -> CodedSpans:
        """Nothing is coded."""
        return nothing_coded(lengths)

    def exact_dtype(self, layer: int) -> np.dtype[Any] | None:
        """Nothing is rounded."""
        return None

    def sequence_bytes(self, tokens: int) -> int:
        """Count two bytes per number, what 16-bit caches take."""
        return tokens * self._token_bytes


def nothing_coded(lengths: Int64) -> CodedSpans:
    """Return the spans of a layer that is read exactly."""
    none = np.zeros_like(lengths)
    return CodedSpans(none, none, none)
