"""Which kernels the GPU suite needs: its claims, made on a device that runs nothing."""

from __future__ import annotations

from benchmarks.gpu.listing_device import ListingDevice


def walk_suite(device: ListingDevice) -> None:
    """Make the calls of the suite's matrices; the device notes what they launch."""
    # The suite lies beside the benchmarks, and uses this folder's modules in turn.
    from tests.parity import cases, claims, matrix

    for case in cases.all_cases():
        claims.test_pages_windows_and_results_equal_the_hosts(device, case)
    for row in matrix.ROWS:
        matrix.run_row(device, *row)
