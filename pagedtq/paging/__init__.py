"""The control plane: who owns which page and which window slot. Integers only."""

from .eviction import EvictionPlan, KeepFirstLast
from .layout import PageLayout
from .page_pool import PagePool
from .page_tables import PageTables
from .step_plan import SequenceState, StepPlan
from .table_views import PageIndices, Reads
from .window_pool import WindowPool

__all__ = [
    "EvictionPlan",
    "KeepFirstLast",
    "PageIndices",
    "PageLayout",
    "PagePool",
    "PageTables",
    "Reads",
    "SequenceState",
    "StepPlan",
    "WindowPool",
]
