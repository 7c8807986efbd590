"""The control plane: who owns which page and which window slot. Integers only."""

from .adoption import AdoptionPlan, ExtractedSequences
from .block_keys import BlockHasher
from .eviction import EvictionPlan, KeepFirstLast
from .layout import PageLayout
from .page_pool import PagePool
from .page_tables import PageTables
from .prefix_index import PrefixIndex, PrefixObserver
from .sequence_image import SequenceImage, check_image
from .shared_prefixes import SharingOptions
from .step_plan import SequenceState, StepPlan
from .table_export import TableExport, TableUpdate
from .table_views import PageIndices, Reads
from .window_pool import WindowPool

__all__ = [
    "AdoptionPlan",
    "BlockHasher",
    "EvictionPlan",
    "ExtractedSequences",
    "KeepFirstLast",
    "PageIndices",
    "PageLayout",
    "PagePool",
    "PageTables",
    "PrefixIndex",
    "PrefixObserver",
    "Reads",
    "SequenceImage",
    "SequenceState",
    "SharingOptions",
    "StepPlan",
    "TableExport",
    "TableUpdate",
    "WindowPool",
    "check_image",
]
