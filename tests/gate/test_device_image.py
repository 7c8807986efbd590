"""What a device runs is what the gate checks: one compile command, and no option behind it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from pagedtq.backends import kernel_source
from pagedtq.backends.cupy_device import CupyDevice
from pagedtq.backends.kernel_cache import FOLDER
from pagedtq.backends.page_launches import Launch
from pagedtq.errors import BackendUnavailable, KernelCompileError
from tests.gate import sass
from tests.gate.specialisations import other_kernels


class Loaded:
    """Stands for CuPy's module: it keeps what it is given."""

    def load(self, image):
        self.image = image

    def get_function(self, name):
        return name, self.image


@pytest.fixture
def device(monkeypatch, tmp_path):
    sass.require_tools()
    monkeypatch.setenv(FOLDER, str(tmp_path))
    device = object.__new__(CupyDevice)
    device.arch = 90
    device.xp = SimpleNamespace(cuda=SimpleNamespace(Module=Loaded))
    return device


@pytest.mark.parametrize("name", ["store-k4v4-d128", "merge-k4v4-d128"])
def test_a_device_loads_the_image_that_is_checked(device, name):
    special = other_kernels()[name]
    launch = Launch(special.file, special.file.removesuffix(".cu"), dict(special.macros), (1,), ())
    want = launch.kernel, kernel_source.compile_cubin(special, 90).image
    # From the compiler, and from the cache.
    assert device._build(launch) == want
    assert device._build(launch) == want


def test_subnormals_are_kept_where_a_byte_is_decided(device):
    special = other_kernels()["store-k4v4-d128"]
    options = kernel_source.all_options(special, 90)
    assert not [option for option in options if "ftz" in option or "fast" in option]
    lines = sass.disassemble(kernel_source.compile_cubin(special, 90).image)
    sums = [text for opcode, text in lines if opcode == "FADD"]
    flushed = [text for text in sums if ".FTZ" in text]
    # Exact division and root have a few steps of their own; what is summed goes through none.
    assert len(sums) > 100 and len(flushed) <= 8


def test_a_failed_compile_reaches_the_caller_of_a_launch(device):
    with pytest.raises(KernelCompileError, match=r"store\.cu \[HEAD_DIM=7\].*sm_90"):
        device._build(Launch("store.cu", "store", {"HEAD_DIM": 7}, (1,), ()))


def test_code_is_made_for_the_device_or_for_the_newest_before_it_of_its_generation():
    sass.require_tools()
    assert [kernel_source.pick_architecture(arch) for arch in (80, 90, 121)] == [80, 90, 121]
    assert kernel_source.pick_architecture(109) == 107
    with pytest.raises(BackendUnavailable, match=r"compiles for .*sm_90.*this device is sm_999"):
        kernel_source.pick_architecture(999)
