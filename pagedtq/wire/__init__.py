"""One format for pages, sequences and whole caches: snapshots in files, transfers in chunks."""

from .inspection import SequenceReport, SnapshotReport, inspect_file
from .settings import CacheSettings, load_settings, save_settings
from .snapshot import load_cache, read_config, save_cache
from .tensors import save_tensors
from .transfer import export_pages, export_sequence, import_pages, import_sequence

__all__ = [
    "CacheSettings",
    "SequenceReport",
    "SnapshotReport",
    "export_pages",
    "export_sequence",
    "import_pages",
    "import_sequence",
    "inspect_file",
    "load_cache",
    "load_settings",
    "read_config",
    "save_cache",
    "save_settings",
    "save_tensors",
]
