"""One layer of the CUDA backend: its encoder's tables on the device, its launches, its window."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..codec import TurboQuantCodec
from ..config import CacheConfig, Polar
from ..errors import UnsupportedError
from ..paging.layout import PageLayout
from .attend_kernel import MAX_HEAD_DIM
from .attend_launches import AttentionLaunches
from .attend_shape import table_entries
from .cuda_operands import Operands
from .cuda_window import CudaWindow
from .device import DeviceArray
from .dtypes import Float32
from .kernel_tables import StreamTables, stream_tables
from .page_launches import LayerLaunches
from .tokens import Codecs, layer_codecs

SUPPORTED = (
    "TurboQuant (1 to 8 bits, mse or prod, Hadamard or dense rotation) and Exact (f16, bf16, f32) "
    f"streams of head_dim up to {MAX_HEAD_DIM}"
)


class CudaLayer:
    """Launches and tables of one layer.

    Parameters
    ----------
    layout : PageLayout
        Where everything lies.
    pool : array of uint8
        The pool, on the device.
    layer : int
        Which layer.
    mean : ndarray of float32 ``[num_kv_heads, head_dim]`` or None
        Key mean.
    operands : Operands
        Checks arguments and brings them to the device.

    Attributes
    ----------
    codecs : tuple of VectorCodec or None
        Encoders of keys and values on the host; they decide what input is refused.
    tokens : LayerLaunches
        Launches that read and write tokens.
    attention : AttentionLaunches
        Launches that attend.
    window : CudaWindow or None
        The exact window, where the layer has one.
    """

    def __init__(
        self,
        layout: PageLayout,
        pool: DeviceArray,
        layer: int,
        mean: Float32 | None,
        operands: Operands,
    ) -> None:
        config, device = layout.config, operands.device
        self.codecs: Codecs = layer_codecs(config, layer, mean)
        self.key_tables, self.value_tables = (
            _upload(operands, codec) if isinstance(codec, TurboQuantCodec) else None
            for codec in self.codecs
        )
        projection = None if self.codecs[0] is None else self.codecs[0].projection
        factor = 0.0 if projection is None else projection.factor
        # Kernels get the address of the layer's page 0.
        pages = pool[layout.layer_offsets[layer] :]
        tables = self.key_tables, self.value_tables
        entries = tuple(
            device.upload(table_entries(form, config.head_dim))
            for form in config.layer_codecs(layer)
        )
        self.tokens = LayerLaunches(layout, layer, pages, tables, factor)
        self.attention = AttentionLaunches(
            layout, layer, pages, tables, (entries[0], entries[1]), factor
        )
        overlay = config.has_overlay(layer)
        self.window = CudaWindow(config, operands, self.tokens) if overlay else None
        self.has_bounds = "key_bounds" in layout.extents[layer].planes

    @property
    def table_bytes(self) -> int:
        """Bytes of the encoder's tables on the device."""
        streams = (stream or () for stream in (self.key_tables, self.value_tables))
        return sum(table.nbytes for stream in streams for table in stream if table is not None)


def refuse_unsupported(config: CacheConfig) -> None:
    """Refuse what no kernel reads.

    Raises
    ------
    UnsupportedError
        Naming what is not supported, and what is.
    """
    for layer in range(config.num_layers):
        for stream, form in zip(("keys", "values"), config.layer_codecs(layer)):
            if isinstance(form, Polar):
                raise UnsupportedError(
                    f"the CUDA backend stores {SUPPORTED}; {stream} of layer {layer} are {form}: "
                    f"use backend='host'"
                )
    if config.head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"the CUDA backend stores {SUPPORTED}; got head_dim {config.head_dim}: "
            f"use backend='host'"
        )


def _upload(operands: Operands, codec: TurboQuantCodec) -> StreamTables:
    def send(table: Any) -> DeviceArray | None:
        return None if table is None else operands.device.upload(np.ascontiguousarray(table))

    return StreamTables(*map(send, stream_tables(codec)))
