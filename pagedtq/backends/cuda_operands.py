"""What callers hand to the CUDA backend, brought to the device: tokens, queries, indices.

Host arrays are checked in full where they lie, as the host backend checks them, and uploaded.
Device arrays are taken as they are: shape, type and layout are checked, content is not, because
looking at it would make the host wait for the device (``validate=True`` asks for exactly that).
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import CacheConfig, Dtype
from ..errors import ArgumentError, ArgumentTypeError, NonFiniteError
from ..paging.arguments import integers
from .device import Adopted, Device, DeviceArray
from .dtypes import check_range, check_shape, kind_of_dtype, widen
from .tokens import Codecs, check_ring_rows, check_slots, check_tokens

Array = npt.NDArray[Any]

# Index arrays kept on the device: a step's mappings serve all of its layers.
_KEPT = 16
_Content = tuple[str, tuple[int, ...], bytes]


class DeviceTokens:
    """Tokens of one layer that passed `Operands.tokens`.

    Parameters
    ----------
    device : Device
        Where they go.
    keys, values : array ``[n, num_kv_heads, head_dim]``
        On the device already, or still on the host; then they are uploaded when first used.
    kind : {"f16", "bf16", "f32"}
        What they are.
    uploaded : bool
        Whether they are on the device.
    """

    def __init__(self, device: Device, keys: Any, values: Any, kind: Dtype, uploaded: bool) -> None:
        self._device, self._pair, self.kind = device, (keys, values), kind
        self._uploaded = uploaded

    def __len__(self) -> int:
        return len(self._pair[0])

    @property
    def arrays(self) -> tuple[DeviceArray, DeviceArray]:
        """Keys and values on the device."""
        if not self._uploaded:
            keys, values = (self._device.upload(_plain(array)) for array in self._pair)
            self._pair, self._uploaded = (keys, values), True
        return self._pair


class Operands:
    """Checks arguments and brings them to a device.

    Parameters
    ----------
    device : Device
        The device.
    config : CacheConfig
        Shapes and types.
    validate : bool
        Download device arrays and check their content too.
    """

    def __init__(self, device: Device, config: CacheConfig, validate: bool) -> None:
        self.device, self.config, self.validate = device, config, validate
        self._kept: OrderedDict[_Content, DeviceArray] = OrderedDict()
        self._captured: dict[_Content, DeviceArray] = {}

    def tokens(
        self, layer: int, codecs: Codecs, keys: Any, values: Any, dtype: Dtype | None
    ) -> DeviceTokens:
        """Check tokens of a layer; see `check_tokens`, whose errors these are."""
        adopted = [
            self.device.adopt(array, name) for name, array in (("keys", keys), ("values", values))
        ]
        mine, theirs = adopted
        if mine is None and theirs is None:
            batch = check_tokens(self.config, layer, codecs, keys, values, dtype)
            return DeviceTokens(self.device, batch.keys, batch.values, batch.kind, False)
        if mine is None or theirs is None:
            raise ArgumentTypeError("keys and values must both lie on the device or on the host")
        kind = _declared(mine.kind, dtype)
        arrays = mine.array, theirs.array
        if self.validate:
            host = [self.device.download(array) for array in arrays]
            kind = check_tokens(self.config, layer, codecs, host[0], host[1], kind).kind
        else:
            shape = (None, self.config.num_kv_heads, self.config.head_dim)
            check_shape(arrays[0], "keys", shape, "tokens, KV heads, head_dim")
            check_shape(arrays[1], "values", arrays[0].shape, "tokens, KV heads, head_dim")
            kind = kind_of_dtype(arrays[0].dtype, "keys", kind)
            kind_of_dtype(arrays[1].dtype, "values", kind)
        packed = [self._heads_together(array) for array in arrays]
        return DeviceTokens(self.device, packed[0], packed[1], kind, True)

    def queries(self, queries: Any, dtype: Dtype | None = None) -> tuple[DeviceArray, Dtype]:
        """Bring queries of checked shape to the device, contiguous; return them and their type."""
        adopted = self.device.adopt(queries, "queries")
        if adopted is None:
            kind = kind_of_dtype(queries.dtype, "queries", dtype)
            check_range(widen(queries, kind), "queries", "f32")
            return self.device.upload(_plain(queries)), kind
        array = adopted.array
        kind = kind_of_dtype(array.dtype, "queries", _declared(adopted.kind, dtype))
        if self.validate:
            check_range(widen(self.device.download(array), kind), "queries", "f32")
        return self.contiguous(array), kind

    def floats(self, array: Any, name: str) -> DeviceArray:
        """Bring floats of checked shape to the device, contiguous; there they are float32."""
        adopted = self.device.adopt(array, name)
        if adopted is None:
            if array.dtype.kind != "f":
                raise ArgumentTypeError(f"{name} must be floats, got {array.dtype}")
            return self.device.upload(array.astype(np.float32))
        if adopted.array.dtype != np.float32:
            raise ArgumentTypeError(
                f"{name} on the device must be float32, got {adopted.array.dtype}"
            )
        return self.contiguous(adopted.array)

    def sink_logits(self, sink_logits: Any, num_q_heads: int) -> DeviceArray:
        """Check a learned sink's logits ``[num_q_heads]`` and bring them to the device."""
        check_shape(sink_logits, "sink_logits", (num_q_heads,), "one per query head")
        adopted = self.device.adopt(sink_logits, "sink_logits")
        host = sink_logits
        if adopted is not None:
            array = self.floats(sink_logits, "sink_logits")
            if not self.validate:
                return array
            host = self.device.download(array)
        if host.dtype.kind != "f":
            raise ArgumentTypeError(f"sink_logits must be floats, got {host.dtype}")
        if not (host < np.inf).all():
            raise NonFiniteError(f"sink_logits must be finite or -inf, got {host}")
        return self.constant(host.astype(np.float32)) if adopted is None else array

    def sealed(self, ring_rows: Any, slots: Any, owners: Array | None) -> tuple[Any, Any]:
        """Check rows of rings and the page slots they go to, where they lie on the host.

        Returns
        -------
        ring_rows, slots
            For `index`: host arrays as ``int64[n]``, those on the device as they came.
        """
        rows, rows_on_host = self._looked_at(ring_rows, "ring_rows")
        mapping, mapping_on_host = self._looked_at(slots, "slot_mapping")
        if rows_on_host is not None:
            rows_on_host = integers("ring_rows", rows_on_host)
        rows = rows_on_host if rows is None else rows
        if mapping_on_host is not None:
            mapping_on_host = check_slots(self.config, owners, mapping_on_host, len(rows))
        mapping = mapping_on_host if mapping is None else mapping
        if len(mapping) != len(rows):
            raise ArgumentError(f"slot_mapping must have {len(rows)} entries, got {len(mapping)}")
        if rows_on_host is not None:
            check_ring_rows(self.config, rows_on_host, mapping_on_host)
        return rows, mapping

    def slots(self, slots: Any, owners: Array | None, count: int | None) -> DeviceArray:
        """Check page slots (see `check_slots`) and bring them to the device."""
        adopted = self._adopted(slots, "slots")
        if adopted is None:
            return self.index(check_slots(self.config, owners, slots, count))
        if self.validate:
            check_slots(self.config, owners, self.device.download(adopted.array), count)
        if count is not None and adopted.array.shape != (count,):
            got = list(adopted.array.shape)
            raise ArgumentError(f"slot_mapping must have {count} entries, got shape {got}")
        return self.index(adopted.array)

    def index(self, indices: Any) -> DeviceArray:
        """Bring integers ``[n]`` to the device as ``int64``; equal host arrays are sent once."""
        adopted = self.device.adopt(indices, "indices")
        if adopted is not None:
            array = adopted.array
            if array.ndim != 1 or array.dtype != np.int64:
                got = f"{array.dtype}{list(array.shape)}"
                raise ArgumentTypeError(f"indices on the device must be int64[n], got {got}")
            return self.contiguous(array)
        return self.constant(np.asarray(indices, np.int64))

    def constant(self, wanted: Array) -> DeviceArray:
        """Bring a small host array to the device; an equal one that is there already serves."""
        key = (wanted.dtype.str, wanted.shape, wanted.tobytes())
        array = self._captured.get(key)
        if array is None:
            array = self._kept.pop(key, None)
        if array is None:
            array = self.device.upload(wanted)
        if self.device.capturing:
            # The graph refers to it from now on.
            self._captured[key] = array
            return array
        self._kept[key] = array
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return array

    def _looked_at(self, indices: Any, name: str) -> tuple[DeviceArray | None, Any]:
        """Return indices as they lie on the device, if they do, and those that can be looked at."""
        adopted = self._adopted(indices, name)
        if adopted is None:
            return None, indices
        array = self.index(adopted.array)
        return array, self.device.download(array) if self.validate else None

    def _adopted(self, indices: Any, name: str) -> Adopted | None:
        """Adopt what may be a sequence of integers as well, as on the host."""
        return None if isinstance(indices, list | tuple) else self.device.adopt(indices, name)

    def contiguous(self, array: DeviceArray) -> DeviceArray:
        """Return a device array whose elements lie side by side, itself if they do."""
        return array if array.flags.c_contiguous else self._copied(array)

    def _heads_together(self, array: DeviceArray) -> DeviceArray:
        """Kernels take any distance between tokens, not between heads."""
        inner = (array.shape[2] * array.itemsize, array.itemsize)
        good = array.strides[1:] == inner and array.strides[0] >= 0
        return array if good or not array.size else self._copied(array)

    def _copied(self, array: DeviceArray) -> DeviceArray:
        copy = self.device.empty(array.shape, array.dtype)
        with self.device.active():
            copy[...] = array
        return copy


def _declared(adopted: Dtype | None, dtype: Dtype | None) -> Dtype | None:
    if adopted is not None and dtype is not None and adopted != dtype:
        raise ArgumentTypeError(f"dtype must be {adopted} or None, got {dtype}")
    return adopted or dtype


def _plain(array: Array) -> Array:
    """Return what is uploaded: bfloat16 as its bits."""
    dense = np.ascontiguousarray(array)
    return dense.view(np.uint16) if dense.dtype.name == "bfloat16" else dense
