"""One layer of a cache as the kernels see it, run through the harness on a copy of the pool.

It stands where a device backend stands: the launches are the ones that run there.
"""

from __future__ import annotations

import harness
import numpy as np

from pagedtq.backends.host import HostBackend
from pagedtq.backends.kernel_tables import stream_tables
from pagedtq.backends.page_launches import BLOCK, Launch, LayerLaunches
from pagedtq.config import CacheConfig

STORAGE = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}


def cache_config(keys, values, head_dim=128, **options) -> CacheConfig:
    """Return a small configuration of one layer without a window, unless options say otherwise."""
    shape = {"num_layers": 1, "num_kv_heads": 2, "num_pages": 5, "window": 0, "seed": 11}
    return CacheConfig(keys=keys, values=values, head_dim=head_dim, **{**shape, **options})


def as_kind(vectors: np.ndarray, kind: str) -> np.ndarray:
    """Convert float32 data to what a caller with that type would hand in (bf16 as its bits)."""
    if kind == "bf16":
        return (vectors.view(np.uint32) >> 16).astype(np.uint16)
    return vectors.astype(STORAGE[kind])


class DeviceLayer:
    """The kernels of one layer, on a pool of their own.

    Parameters
    ----------
    host : HostBackend
        Its pool is copied; layout, codecs and means are shared.
    layer : int
        The layer.
    seed : int
        Order of threads; see `harness`.
    """

    def __init__(self, host: HostBackend, layer: int = 0, seed: int = 0) -> None:
        self.host, self.layer, self.seed = host, layer, seed
        self.layout, self.config = host.layout, host.config
        self.pool = host.pool.copy()
        codecs = host.layers[layer].codecs
        tables = tuple(None if codec is None else stream_tables(codec) for codec in codecs)
        projection = None if codecs[0] is None else codecs[0].projection
        # Kernels get the address of the layer's page 0.
        pages = self.pool[self.layout.layer_offsets[layer] :]
        factor = 0.0 if projection is None else projection.factor
        self.launches = LayerLaunches(self.layout, layer, pages, tables, factor)

    def store(self, keys, values, slots, kind: str) -> None:
        """Twin of `HostBackend.store`; keys and values may be strided over tokens."""
        launch = self.launches.store(keys, values, kind, read_only(slots))
        # The harness copies whole arrays, so a strided view stands for the memory behind it.
        rows = tuple(read_only(_memory_from(array)) for array in (keys, values))
        run(launch._replace(arguments=rows + launch.arguments[2:]), self.seed)

    def seal(self, ring, ring_rows, slots) -> None:
        """Twin of `HostBackend.seal`."""
        run(self.launches.seal(*map(read_only, (ring, ring_rows, slots))), self.seed)

    def write_bounds(self, pages) -> None:
        """Twin of `HostBackend.write_bounds`."""
        run(self.launches.write_bounds(read_only(pages)), self.seed)

    def load(self, slots, kind: str = "f32") -> tuple[np.ndarray, np.ndarray]:
        """Twin of `HostBackend.load`; the result's type is ``kind``."""
        shape = (len(slots), self.config.num_kv_heads, self.config.head_dim)
        keys, values = np.empty((2, *shape), STORAGE[kind])
        run(self.launches.load(read_only(slots), keys, values, kind), self.seed)
        return keys, values


def run(launch: Launch, seed: int = 0) -> None:
    """Run a launch through the harness."""
    kernels = harness.compile_kernels(launch.file, launch.macros)
    kernels.launch(launch.kernel, launch.grid, BLOCK, *launch.arguments, seed=seed)


def read_only(array: np.ndarray) -> np.ndarray:
    """Return a view that the harness holds a kernel to leaving alone."""
    view = array.view()
    view.flags.writeable = False
    return view


def _memory_from(array: np.ndarray) -> np.ndarray:
    """Return the memory behind an array, from its first element on."""
    owner = array if array.flags.c_contiguous else array.base
    assert owner.flags.c_contiguous
    first = (array.ctypes.data - owner.ctypes.data) // array.itemsize
    return owner.reshape(-1)[first:]
