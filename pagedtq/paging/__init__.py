"""The control plane: who owns which page and which window slot. Integers only."""

from .adoption import AdoptionPlan, ExtractedSequences
from .eviction import EvictionPlan, KeepFirstLast
from .layout import PageLayout
from .page_pool import PagePool
from .page_tables import PageTables
from .sequence_image import SequenceImage, check_image
from .step_plan import SequenceState, StepPlan
from .table_views import PageIndices, Reads
from .window_pool import WindowPool

__all__ = [
    "AdoptionPlan",
    "EvictionPlan",
    "ExtractedSequences",
    "KeepFirstLast",
    "PageIndices",
    "PageLayout",
    "PagePool",
    "PageTables",
    "Reads",
    "SequenceImage",
    "SequenceState",
    "StepPlan",
    "WindowPool",
    "check_image",
]
