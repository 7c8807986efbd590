"""The control plane: who owns which page and which window slot. Integers only."""

from .adoption import AdoptionPlan, ExtractedSequences
from .block_chain import SharingOptions
from .block_keys import BlockHasher
from .candidates import BlockList, evictable_blocks, sealed_blocks
from .evict_lowest import EvictLowest, plan_free
from .eviction import EvictionPlan, EvictionPolicy, KeepFirstLast
from .fences import Event, Fences
from .layout import PageLayout
from .page_pool import PagePool
from .page_scores import OldestFirst, PageRanking, PageScores, RandomOrder
from .page_tables import PageTables
from .prefix_index import PrefixIndex, PrefixObserver
from .retention import ByPriority, Retention
from .sequence_image import SequenceImage, check_image
from .step_plan import SequenceState, StepPlan
from .swap_plan import SwapPlan
from .table_export import TableExport, TableUpdate
from .table_views import PageIndices, Reads
from .window_pool import WindowPool

__all__ = [
    "AdoptionPlan",
    "BlockHasher",
    "BlockList",
    "ByPriority",
    "Event",
    "EvictLowest",
    "EvictionPlan",
    "EvictionPolicy",
    "ExtractedSequences",
    "Fences",
    "KeepFirstLast",
    "OldestFirst",
    "PageIndices",
    "PageLayout",
    "PagePool",
    "PageRanking",
    "PageScores",
    "PageTables",
    "PrefixIndex",
    "PrefixObserver",
    "RandomOrder",
    "Reads",
    "Retention",
    "SequenceImage",
    "SequenceState",
    "SharingOptions",
    "StepPlan",
    "SwapPlan",
    "TableExport",
    "TableUpdate",
    "WindowPool",
    "check_image",
    "evictable_blocks",
    "plan_free",
    "sealed_blocks",
]
