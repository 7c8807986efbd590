"""Attention on a device over the pairwise matrix, held to the host."""

from __future__ import annotations

import pytest

from tests.parity.matrix import ROWS, run_row


@pytest.mark.parametrize(
    ("page_size", "group", "queries", "parts", "window", "holes", "codecs"), ROWS
)
def test_every_pair_of_factors_equals_the_host(
    device, page_size, group, queries, parts, window, holes, codecs
):
    run_row(device, page_size, group, queries, parts, window, holes, codecs)
