"""Events about blocks that can be found, in the wire format of vLLM's.

Names, tags, field order and encoding are those of vLLM 0.33.0, which its subscribers (routers,
indexers) decode: a batch is an array ``[ts, events, data_parallel_rank]``, an event is a map with
its ``type``. Fields that vLLM knows and pagedtq does not fill are there with their defaults, which
are left out when encoded; what another publisher fills is read, and kept when it is sent on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from ..errors import ArgumentTypeError
from ..paging.arguments import MAX_PAGE_SIZE, Int32, integer

#: Where blocks are, as vLLM names it.
MEDIUM_GPU = "GPU"


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True, gc=False):
    """Events that happened together; ``ts`` in seconds since the epoch."""

    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class KVCacheEvent(msgspec.Struct, omit_defaults=True, gc=False, tag=True):
    """Base of all events; the tag is the name of the class."""


class BlockStored(KVCacheEvent):
    """Consecutive blocks of one sequence can be found from now on."""

    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None
    lookahead_token_ids: list[list[int]] | None = None


class BlockRemoved(KVCacheEvent):
    """A page that held these blocks holds them no longer; another may still do."""

    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class AllBlocksCleared(KVCacheEvent):
    """No block can be found any more."""


class KVEventBatch(EventBatch):
    """A batch of the events above."""

    events: list[BlockStored | BlockRemoved | AllBlocksCleared]


class EventLog:
    """Collects the changes of a `PrefixIndex` as events.

    Parameters
    ----------
    block_size : int
        Tokens of a block.
    int_hashes : bool
        Give hashes as their last 64 bits, as older subscribers expect; else as bytes.
    medium : str or None
        Where the blocks are.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        For a bad size or medium.
    """

    def __init__(
        self, block_size: int, *, int_hashes: bool = False, medium: str | None = MEDIUM_GPU
    ) -> None:
        if medium is not None and not isinstance(medium, str):
            raise ArgumentTypeError(f"medium must be a name or None, got {type(medium).__name__}")
        self.block_size = integer("block_size", block_size, 1, MAX_PAGE_SIZE)
        self.medium, self.int_hashes = medium, int_hashes
        self._events: list[BlockStored | BlockRemoved | AllBlocksCleared] = []

    def take(self) -> list[BlockStored | BlockRemoved | AllBlocksCleared]:
        """Return the events since the last call, in order."""
        events, self._events = self._events, []
        return events

    def stored(self, keys: Sequence[bytes], parent: bytes | None, tokens: Int32 | None) -> None:
        """Note that blocks of one sequence were published."""
        self._events.append(
            BlockStored(
                block_hashes=[self._named(key) for key in keys],
                parent_block_hash=None if parent is None else self._named(parent),
                token_ids=[] if tokens is None else tokens.tolist(),
                block_size=self.block_size,
                lora_id=None,
                medium=self.medium,
                lora_name=None,
            )
        )

    def removed(self, key: bytes) -> None:
        """Note that a page that held this block holds it no longer."""
        self._events.append(BlockRemoved(block_hashes=[self._named(key)], medium=self.medium))

    def cleared(self) -> None:
        """Note that no page holds any block any more."""
        self._events.append(AllBlocksCleared())

    def _named(self, key: bytes) -> bytes | int:
        return int.from_bytes(key[-8:], "big") if self.int_hashes else key
