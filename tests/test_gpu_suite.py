"""The GPU suite's matrices where there is no GPU: they can be built, and cover what they claim."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.gpu.listing_device import ListingDevice
from tests.gpu.test_device_checked import KINDS, run_kind
from tests.gpu.test_device_far_pages import POOL
from tests.parity.cases import all_cases
from tests.parity.claims import test_pages_windows_and_results_equal_the_hosts as one_case
from tests.parity.matrix import ALL_EXACT, FACTORS, ROWS, run_row


def launched(work, *args):
    device = ListingDevice()
    work(device, *args)
    kernels = {}
    for launch in device.launches.values():
        kernels.setdefault(launch.kernel, []).append(launch.macros)
    return kernels


@pytest.mark.parametrize("case", [c for c in all_cases() if c.head_dim in (20, 96)], ids=str)
def test_a_case_makes_its_calls_on_any_device(case):
    kernels = launched(one_case, case)
    assert {"attend", "merge", "score", "load", "copy_pages"} <= set(kernels)


@pytest.mark.parametrize("row", ROWS[:: len(ROWS) // 4], ids=str)
def test_a_row_of_the_matrix_makes_its_calls_on_any_device(row):
    kernels = launched(run_row, *row)
    assert {"attend", "merge", "score", "store"} <= set(kernels)
    assert ("attend_window" in kernels) == bool(row[4])


def test_what_the_sanitizer_sees_has_every_kind_of_kernel():
    found = {}
    for name in KINDS:
        found[name] = launched(run_kind, name)
    attend = {name: kernels["attend"] for name, kernels in found.items()}
    assert all(one["HEAD_DIM"] == 128 for macros in attend.values() for one in macros)
    for name, macro, value in (
        ("k3v3", "KEY_INT8", 1),
        ("k2v2 values as bytes", "VALUE_INT8", 1),
        ("group 16", "COLUMN_TILES", 2),
        ("soft cap", "SOFT_CAP", 1),
    ):
        assert value in [one[macro] for one in attend[name]], name
    launches = {kernel for kernels in found.values() for kernel in kernels}
    assert launches >= {
        *("store", "seal", "store_window", "load", "score", "page_stats", "attend", "merge"),
        *("attend_window", "plan_splits", "rotate_queries", "copy_pages", "write_bounds"),
    }


def test_the_devices_matrix_has_every_pair_of_factors():
    names = tuple(FACTORS)
    seen = {(a, row[a], b, row[b]) for row in ROWS for a, b in itertools.combinations(range(7), 2)}
    for a, b in itertools.combinations(range(7), 2):
        for x, y in itertools.product(FACTORS[names[a]], FACTORS[names[b]]):
            impossible = names[a] == "window" and x and y in ALL_EXACT
            assert ((a, x, b, y) in seen) is not impossible


def test_the_large_pool_is_beyond_every_32_bit_offset():
    assert POOL > 1 << 32
