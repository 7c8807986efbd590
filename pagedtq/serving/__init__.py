"""What a serving engine's scheduler talks to: a block manager, its requests and its events."""

from .events import AllBlocksCleared, BlockRemoved, BlockStored, EventLog, KVEventBatch
from .manager import BlockManager, PrefixCacheStats
from .publisher import EventPublisher
from .request import Blocks, Request, ServedRequest
from .subscriber import EventSubscriber, NumberedBatch

__all__ = [
    "AllBlocksCleared",
    "BlockManager",
    "BlockRemoved",
    "BlockStored",
    "Blocks",
    "EventLog",
    "EventPublisher",
    "EventSubscriber",
    "KVEventBatch",
    "NumberedBatch",
    "PrefixCacheStats",
    "Request",
    "ServedRequest",
]
