"""Tests that need a CUDA device: skipped with the reason where there is none."""

from __future__ import annotations

import os

import pytest

from pagedtq.backends.cupy_device import CupyDevice, missing_cuda

#: Set by ``python -m benchmarks.gpu``: there, a missing device is a failure.
REQUIRE = "PAGEDTQ_REQUIRE_GPU"


@pytest.fixture(scope="session")
def cuda_device():
    missing = missing_cuda()
    if missing is not None:
        reason = f"nothing ran on a GPU: {missing}"
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    device = CupyDevice()
    if os.environ.get("PAGEDTQ_GPU_POOL") == "off":
        # Every array an allocation of its own: a checker then sees where one ends.
        device.xp.cuda.set_allocator(None)
    return device


@pytest.fixture
def device(cuda_device):
    """The device; what a test leaves behind is freed."""
    yield cuda_device
    cuda_device.synchronize()
    cuda_device.xp.get_default_memory_pool().free_all_blocks()
