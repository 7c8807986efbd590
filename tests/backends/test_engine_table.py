"""`TableExport` keeps an engine's table on a device current, by one scatter of CuPy's per step."""

from __future__ import annotations

import sys

import fake_cupy
import pytest

from pagedtq.backends import cupy_device
from pagedtq.backends.cupy_device import CupyDevice
from tests.backends.engine_table import check_engine


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy.make())
    monkeypatch.setattr(cupy_device, "missing_cuda", lambda: None)
    return CupyDevice()


def test_a_table_on_the_device_stays_current_by_what_changed_alone(device):
    steps = 150
    engine = check_engine(device, steps)
    assert engine.num_resized > 1
    copies = device.xp.cuda.get_current_stream().copies
    # An index of 8 bytes and a page of 4 for every entry, and nothing else.
    assert sum(copies) == 12 * engine.num_entries
    assert len(copies) <= 2 * steps
    assert engine.num_entries < steps * engine.export.buffer.size / 20
