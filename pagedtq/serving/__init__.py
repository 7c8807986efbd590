"""What a serving engine's scheduler talks to, and a scheduler of our own."""

from .events import AllBlocksCleared, BlockRemoved, BlockStored, EventLog, KVEventBatch
from .generation import (
    Completion,
    FinishedRequest,
    GenerationRequest,
    ScheduledStep,
    SchedulerOptions,
    SchedulerStats,
    StepOutput,
)
from .manager import BlockManager
from .manager_lookups import PrefixCacheStats
from .preemption import PreemptionCosts, choose_preemption
from .publisher import EventPublisher
from .request import Blocks, Request, ServedRequest
from .scheduler import Scheduler
from .subscriber import EventSubscriber, NumberedBatch

__all__ = [
    "AllBlocksCleared",
    "BlockManager",
    "BlockRemoved",
    "BlockStored",
    "Blocks",
    "Completion",
    "EventLog",
    "EventPublisher",
    "EventSubscriber",
    "FinishedRequest",
    "GenerationRequest",
    "KVEventBatch",
    "NumberedBatch",
    "PreemptionCosts",
    "PrefixCacheStats",
    "Request",
    "ScheduledStep",
    "Scheduler",
    "SchedulerOptions",
    "SchedulerStats",
    "ServedRequest",
    "StepOutput",
    "choose_preemption",
]
