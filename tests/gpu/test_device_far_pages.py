"""Pages beyond the reach of 32-bit offsets hold what the host's hold."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.backends.cuda import CudaBackend
from pagedtq.backends.host import HostBackend
from pagedtq.paging.layout import PageLayout
from pagedtq.paging.table_views import Reads
from tests.parity.cases import HEADS, make_config
from tests.parity.twins import BOUND

#: Bytes of the pool: more than an int of bytes, and than an unsigned one.
POOL = 6 << 30
LENGTHS = np.array([150, 70])


def run_far_pages(device, form: str, order: str, pool_bytes: int) -> None:
    """Use the last pages of a large pool, and the same ones of a small pool on the host."""
    fields = {"window": 0, "pool_order": order, "num_layers": 3}
    layout = PageLayout(make_config(form, 128, 64, num_pages=2, **fields))
    num_pages = max(16, -(-pool_bytes // layout.page_bytes))
    cuda = CudaBackend(make_config(form, 128, 64, num_pages=num_pages, **fields), device=device)
    host = HostBackend(make_config(form, 128, 64, num_pages=16, **fields))
    near = np.array([3, 9, 1, 12, 15], np.int32)
    far = num_pages - 16 + near
    rng = np.random.default_rng(7)
    shape = (LENGTHS.sum(), HEADS, 128)
    queries = rng.standard_normal((2, 4 * HEADS, 128)).astype(np.float32)
    nothing = np.zeros_like(LENGTHS)
    reads = Reads(LENGTHS, nothing, LENGTHS, nothing, nothing)
    places = np.concatenate([np.arange(150), 3 * 64 + np.arange(70)])
    states, slabs = [], []
    for each, pages in ((host, near), (cuda, far)):
        table = np.array([pages[:3], [*pages[3:], 0]], np.int32)
        slots = pages[places // 64].astype(np.int64) * 64 + places % 64
        drawn = np.random.default_rng(8)
        each.clear_norms(pages)
        found = []
        for layer in range(3):
            each.store(layer, *drawn.standard_normal((2, *shape)).astype(np.float16), slots)
            found.append(each.attend(layer, queries, table, reads, 0.1))
            found.append((each.score(layer, queries, table, reads).values,))
            found.append(each.load(layer, slots[::9]))
        # A copy among the last pages, and slabs of all of them.
        each.copy_pages(pages[:2], pages[3:])
        states.append(found)
        slabs.append(each.gather(pages))
    assert np.array_equal(cuda.to_host(slabs[1]), slabs[0])
    for want, got in zip(*states):
        for ours, theirs in zip(map(cuda.to_host, got), want):
            error = np.linalg.norm(ours - theirs, axis=-1)
            assert (error <= BOUND * np.linalg.norm(theirs, axis=-1)).all()


@pytest.mark.parametrize("order", ["layer_major", "page_major"])
@pytest.mark.parametrize("form", ["k4v4", "exact"])
def test_the_last_pages_of_a_pool_of_6_gib_equal_the_hosts(device, form, order):
    free = device.xp.cuda.runtime.memGetInfo()[0]
    if free < POOL + (1 << 30):
        pytest.skip(f"needs {POOL >> 30} GiB of device memory, {free >> 30} are free")
    run_far_pages(device, form, order, POOL)
