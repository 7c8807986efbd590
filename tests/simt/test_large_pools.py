"""Pools, rings and slots beyond the range of 32 bits: every kernel counts bytes with 64.

The memory is a file of holes, so what a kernel misplaces it reads back as zeros.
"""

from __future__ import annotations

import numpy as np
from harness import _Guarded
from harness_device import DeviceArray, HarnessDevice

from pagedtq.backends.cuda import CudaBackend
from pagedtq.backends.host import HostBackend
from pagedtq.paging.table_views import Reads
from tests.parity.cases import HEADS, make_config
from tests.parity.twins import assert_states_agree

#: Pages of 2 KiB and rings of 8 KiB: what follows them lies beyond 4 GiB.
FAR_PAGES, FAR_SLOTS = 1 << 21, 1 << 19
SIZE, LENGTH, SINKS, SLOT, RECORD = 16, 150, 3, 3, 5


class SparseDevice(HarnessDevice):
    """A device whose large arrays of zeros take memory where they are written."""

    def zeros(self, shape, dtype):
        if np.prod(shape, dtype=np.int64) < 1 << 26:
            return super().zeros(shape, dtype)
        return _Guarded(tuple(shape), np.dtype(dtype), sparse=True).array.view(DeviceArray)


def test_every_operation_reaches_pages_and_rings_beyond_4_gib():
    config = make_config("k4v4", 64, SIZE, window=SIZE, num_layers=1, num_pages=16)
    large = config.replace(num_pages=FAR_PAGES + 16, num_window_slots=FAR_SLOTS + 8)
    host, cuda = HostBackend(config), CudaBackend(large, device=SparseDevice())
    assert min(cuda.pool.nbytes, cuda.window(0).ring.nbytes) > 1 << 32
    rng = np.random.default_rng(1)
    keys, values = rng.standard_normal((2, LENGTH, HEADS, 64)).astype(np.float32)
    queries = rng.standard_normal((1, 4 * HEADS, 64)).astype(np.float32)
    slots = np.arange(SIZE, SIZE + LENGTH)
    at = np.arange(LENGTH)
    ring = np.where(at >= LENGTH // SIZE * SIZE, SLOT * SIZE + at % SIZE, -1)
    sinks = np.where(at < SINKS, RECORD * SINKS + at, -1)
    reads = Reads(*(np.array([n]) for n in (LENGTH, SINKS, LENGTH // SIZE * SIZE, LENGTH, LENGTH)))

    def drive(backend, page, slot):
        """Do everything once, with pages and window slots counted from some on."""
        window = backend.window(0)
        backend.store(0, keys, values, slots + page * SIZE)
        batch = backend.check(0, keys, values)
        owners = ((ring, slot * SIZE), (sinks, slot * SINKS))
        window.write(batch, *(np.where(rows < 0, -1, rows + first) for rows, first in owners))
        backend.seal(
            0, np.arange(SIZE) + (SLOT + slot) * SIZE, np.arange(SIZE) + (12 + page) * SIZE
        )
        backend.copy_pages(np.array([1]) + page, np.array([13]) + page)
        backend.copy_pages(np.array([2]) + page, np.array([14]) + page)
        backend.scatter(backend.gather(np.array([3]) + page), np.array([15]) + page)
        backend.clear_norms(np.array([14]) + page)
        table = (np.arange(1, 1 + -(-LENGTH // SIZE)) + page).astype(np.int32)[None]
        owners = {"window": tuple(np.array([n + slot], np.int32) for n in (SLOT, RECORD))}
        attended = backend.attend(0, queries, table, reads, 0.2, **owners)
        cut = backend.attend(0, queries, table, reads, 0.2, window_left=40, **owners)
        scores = backend.score(0, queries, table, reads, **owners).values
        loaded = backend.load(0, slots + page * SIZE)
        return [backend.to_host(a) for a in (*attended, *cut, scores, *loaded)]

    want, got = drive(host, 0, 0), drive(cuda, FAR_PAGES, FAR_SLOTS)
    # Bytes straight from the memory: kernels that misplace alike would agree with each other.
    pool = cuda.pool[FAR_PAGES * host.layout.page_bytes :].view(np.ndarray)
    assert np.array_equal(pool, host.pool) and pool.any()
    for name, owner in (("ring", SLOT), ("sink", RECORD)):
        rows = getattr(cuda.window(0), name)[FAR_SLOTS + owner].view(np.ndarray)
        assert np.array_equal(rows, getattr(host.window(0), name)[owner]) and rows.any()
    assert_states_agree(*got[0:2], *want[0:2])
    assert_states_agree(*got[2:4], *want[2:4])
    for ours, theirs in zip(got[4:], want[4:]):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-3 * np.abs(theirs).max())


def test_slots_beyond_32_bits_name_their_pages():
    config = make_config("k4v4", 64, SIZE, window=0, num_layers=1, num_kv_heads=1, num_pages=3)
    host = HostBackend(config)
    large = config.replace(num_pages=(1 << 28) + 3)
    cuda = CudaBackend(large, device=SparseDevice())
    rng = np.random.default_rng(2)
    keys, values = rng.standard_normal((2, 20, 1, 64)).astype(np.float32)
    slots = np.arange(SIZE + 3, SIZE + 23)
    host.store(0, keys, values, slots)
    cuda.store(0, keys, values, slots + (SIZE << 28))
    pool = cuda.pool[host.layout.page_bytes << 28 :].view(np.ndarray)
    assert np.array_equal(pool, host.pool) and pool.any()
    for ours, theirs in zip(cuda.load(0, slots + (SIZE << 28)), host.load(0, slots)):
        np.testing.assert_allclose(cuda.to_host(ours), theirs, rtol=0, atol=1e-5)
