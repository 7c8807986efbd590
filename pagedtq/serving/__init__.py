"""What a serving engine's scheduler talks to: a block manager, its requests and its events."""

from .events import AllBlocksCleared, BlockRemoved, BlockStored, EventLog, KVEventBatch
from .manager import BlockManager, PrefixCacheStats
from .preemption import PreemptionCosts, choose_preemption
from .request import Blocks, Request, ServedRequest

__all__ = [
    "AllBlocksCleared",
    "BlockManager",
    "BlockRemoved",
    "BlockStored",
    "Blocks",
    "EventLog",
    "KVEventBatch",
    "PreemptionCosts",
    "PrefixCacheStats",
    "Request",
    "ServedRequest",
    "choose_preemption",
]
