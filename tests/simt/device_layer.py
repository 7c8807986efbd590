"""One layer of a cache as the kernels see it, run through the harness on a copy of the pool.

It stands where the CUDA backend stands on a device: macros, tables, grids and argument order are
the ones a launch there needs.
"""

from __future__ import annotations

import harness
import numpy as np

from pagedtq.backends.host import HostBackend
from pagedtq.backends.kernel_tables import StreamTables, stream_tables
from pagedtq.config import CacheConfig, TurboQuant
from pagedtq.paging.kernel_macros import DTYPE_NUMBERS

BLOCK = 128
NO_TABLES = StreamTables(*[None] * 6)
STORAGE = {"f16": np.float16, "bf16": np.uint16, "f32": np.float32}


def cache_config(keys, values, head_dim=128, **options) -> CacheConfig:
    """Return a small configuration of one layer without a window, unless options say otherwise."""
    shape = {"num_layers": 1, "num_kv_heads": 2, "num_pages": 5, "window": 0, "seed": 11}
    return CacheConfig(keys=keys, values=values, head_dim=head_dim, **{**shape, **options})


def bits_of(form: str | int) -> TurboQuant:
    """Return the codec of a width."""
    return TurboQuant(bits=int(form))


def lanes_of(head_dim: int) -> int:
    """Lanes per vector, as ``kernels/rotation.cuh`` chooses them."""
    power = head_dim & -head_dim
    if power != head_dim:
        return power // 8 if head_dim in (80, 96, 112, 160, 192) else 32
    return 32 if head_dim >= 512 else max(1, head_dim // 16)


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
        self.tables = [NO_TABLES if c is None else stream_tables(c) for c in codecs]
        self.macros = self.layout.kernel_macros(layer)

    @property
    def pages(self) -> np.ndarray:
        """The layer's bytes from its page 0 on: the address kernels get."""
        return self.pool[self.layout.layer_offsets[self.layer] :]

    @property
    def geometry(self) -> tuple[object, ...]:
        """Arguments that place a page: base, strides, page size."""
        layout, layer = self.layout, self.layer
        strides = layout.page_strides[layer], layout.extents[layer].nbytes
        return self.pages, *map(np.int64, strides), np.int32(self.config.page_size)

    @property
    def encoder(self) -> tuple[object, ...]:
        """The tables of both streams as `store` and `seal` take them."""
        return (*self.tables[0][:4], *self.tables[1][:2])

    def grid(self, tokens: int) -> tuple[int, int]:
        """Blocks for an even number of lane groups per token pair and head, and both streams."""
        vectors = -(-tokens // 2) * 2 * self.config.num_kv_heads
        return -(-vectors * lanes_of(self.config.head_dim) // BLOCK), 2

    def store(self, keys, values, slots, kind: str) -> None:
        """Twin of `HostBackend.store`; keys and values may be strided over tokens."""
        kernels = harness.compile_kernels(
            "store.cu", {**self.macros, "INPUT_DTYPE": DTYPE_NUMBERS[kind]}
        )
        arrays, strides = zip(*(_token_rows(array) for array in (keys, values)))
        kernels.launch(
            "store",
            self.grid(len(slots)),
            BLOCK,
            *arrays,
            *map(np.int64, strides),
            _read_only(slots),
            np.int32(len(slots)),
            np.int32(self.config.num_kv_heads),
            *self.geometry,
            *self.encoder,
            seed=self.seed,
        )

    def seal(self, ring, ring_rows, slots) -> None:
        """Twin of `HostBackend.seal`."""
        kernels = harness.compile_kernels("seal.cu", self.macros)
        kernels.launch(
            "seal",
            self.grid(len(slots)),
            BLOCK,
            _read_only(ring),
            _read_only(ring_rows),
            np.int32(ring.shape[3]),
            _read_only(slots),
            np.int32(len(slots)),
            np.int32(self.config.num_kv_heads),
            *self.geometry,
            *self.encoder,
            seed=self.seed,
        )

    def load(self, slots, kind: str = "f32") -> tuple[np.ndarray, np.ndarray]:
        """Twin of `HostBackend.load`; the result's type is ``kind``."""
        kernels = harness.compile_kernels(
            "load.cu", {**self.macros, "OUTPUT_DTYPE": DTYPE_NUMBERS[kind]}
        )
        shape = (len(slots), self.config.num_kv_heads, self.config.head_dim)
        keys, values = np.empty((2, *shape), STORAGE[kind])
        codec = self.host.layers[self.layer].codecs[0]
        factor = 0.0 if codec is None or codec.projection is None else codec.projection.factor
        key_tables, value_tables = self.tables
        kernels.launch(
            "load",
            self.grid(len(slots)),
            BLOCK,
            _read_only(slots),
            np.int32(len(slots)),
            np.int32(self.config.num_kv_heads),
            *self.geometry,
            keys,
            values,
            key_tables.book,
            key_tables.inverse_rotation,
            key_tables.mean,
            key_tables.inverse_projection,
            np.float32(factor),
            value_tables.book,
            value_tables.inverse_rotation,
            seed=self.seed,
        )
        return keys, values


def _token_rows(array: np.ndarray) -> tuple[np.ndarray, int]:
    """Return memory that starts at an array's first token, and the bytes between its tokens."""
    owner = array if array.flags.c_contiguous else array.base
    assert owner.flags.c_contiguous
    flat = owner.reshape(-1)
    first = (array.ctypes.data - owner.ctypes.data) // array.itemsize
    return _read_only(flat[first:]), array.strides[0]


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
