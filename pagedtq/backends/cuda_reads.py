"""What one step reads, in device buffers of a fixed shape; and scratch memory that stays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..config import CacheConfig
from ..errors import ArgumentError
from ..paging.arguments import token_counts
from ..paging.table_views import Reads
from .attend_buffers import ReadBuffers
from .chunk_pages import chunk_slots
from .device import Device, DeviceArray
from .packed_upload import PackedUpload
from .queries import without_chunk
from .read_checks import check_owners, check_pages, check_table, window_owners

Array = npt.NDArray[Any]


class StepReads:
    """Page tables, read ranges and window slots of a batch, at addresses that stay.

    Parameters
    ----------
    device : Device
        Where they lie.
    config : CacheConfig
        Page size and number of pages.
    batch, tokens, max_blocks, chunk_tokens : int
        The step's shape, as for `CudaBackend.plan`.

    Attributes
    ----------
    on : dict of str to array
        The buffers: ``table``, ``query_starts``, ``window_slots``, ``sink_records``, ``reads``; for
        chunks also the ranges of pages and window without the chunk, and where the chunk goes.
    reads : Reads or None
        What was brought last, on the host.
    q_lens : ndarray of int64 ``[batch]``
        Query tokens of each sequence.
    counts : ndarray of int64 ``[batch]`` or None
        The same where they were given: only then does a sequence need as many tokens.
    version : int
        Grows when something was sent.
    """

    def __init__(
        self,
        device: Device,
        config: CacheConfig,
        batch: int,
        tokens: int,
        max_blocks: int,
        chunk_tokens: int,
    ) -> None:
        self._config = config
        self.batch, self.tokens, self.max_blocks = batch, tokens, max_blocks
        self.chunk_tokens = chunk_tokens
        fields: dict[str, tuple[tuple[int, ...], npt.DTypeLike]] = {
            "table": ((batch, max_blocks), np.int32),
            "query_starts": ((batch + 1,), np.int32),
            "window_slots": ((batch,), np.int32),
            "sink_records": ((batch,), np.int32),
            "reads": ((5, batch), np.int64),
        }
        if chunk_tokens:
            fields |= {
                "body_reads": ((5, batch), np.int64),
                "window_reads": ((5, batch), np.int64),
                "chunk_slots": ((tokens,), np.int64),
            }
        self._packed = PackedUpload(device, fields)
        self.on = self._packed.device
        self.reads: Reads | None = None
        self.q_lens: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self.counts: npt.NDArray[np.int64] | None = None
        self.has_window = False
        self.version = 0

    def update(self, block_table: Array, reads: Reads, q_lens: Array | None, window: Any) -> None:
        """Bring a step's tables and ranges; see `AttendPlan.update`."""
        check_table(block_table, reads)
        batch, blocks = block_table.shape
        lens = token_counts("q_lens", 1 if q_lens is None else q_lens, batch)
        if (batch, int(lens.sum())) != (self.batch, self.tokens) or blocks > self.max_blocks:
            raise ArgumentError(
                f"this plan is for {self.batch} sequences, {self.tokens} query tokens and at most "
                f"{self.max_blocks} blocks, got {batch}, {lens.sum()} and {blocks}"
            )
        if self.chunk_tokens and lens.max(initial=0) > self.chunk_tokens:
            raise ArgumentError(
                f"this plan is for chunks of at most {self.chunk_tokens} tokens, got {lens.max()}"
            )
        owners = None if window is None else window_owners(window, batch)
        host = self._packed.host
        host["table"][:, :blocks], host["table"][:, blocks:] = block_table, 0
        np.cumsum(lens, out=host["query_starts"][1:])
        host["reads"][...] = reads
        slots, records = (-1, -1) if owners is None else owners
        host["window_slots"][...], host["sink_records"][...] = slots, records
        if self.chunk_tokens:
            self._chunk_fields(reads, lens)
        changed = self._packed.changed()
        # Bytes that were sent were looked at, but without a window nobody asked for its slots.
        if changed or (window is not None and not self.has_window):
            check_pages(block_table, reads, self._config)
            if owners is not None:
                check_owners(owners, reads, self._config)
        if changed:
            # What was planned for the old ranges is stale from the first copy on.
            self.version += 1
            self._packed.send(changed)
        self.reads, self.q_lens, self.has_window = reads, lens, window is not None
        self.counts = None if q_lens is None else lens

    def buffers(self, reads: str) -> ReadBuffers:
        """Return what the pages' kernels read, with one of the ranges."""
        return ReadBuffers(self.on["table"], self.on[reads], self.on["query_starts"])

    def _chunk_fields(self, reads: Reads, lens: Array) -> None:
        """Say what is read where, when the chunk is attended apart.

        The pages' kernel takes the query tokens' positions from ``kv_lens``, so only its ranges
        shrink; the window's kernel has the lengths apart.
        """
        host, apart = self._packed.host, without_chunk(reads, lens)
        host["body_reads"][...] = apart._replace(kv_lens=reads.kv_lens)
        host["window_reads"][...] = apart
        host["chunk_slots"][...] = chunk_slots(lens, self.chunk_tokens)


class WorkArrays:
    """Named scratch memory on a device: allocated when first asked for, then always the same.

    Parameters
    ----------
    device : Device
        Where it lies.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._held: dict[str, DeviceArray] = {}
        self._outgrown: list[DeviceArray] = []

    def get(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> DeviceArray:
        """Return an array; one allocation serves all shapes up to the largest that came."""
        count = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.size < count:
            if held is not None:
                # Graphs captured around the old one may still replay: it stays.
                self._outgrown.append(held)
            held = self._held[name] = self._device.empty((count,), dtype)
        return held[:count].reshape(shape)
