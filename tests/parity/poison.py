"""What no token was written to may hold anything: not a bit of it reaches a result.

Debug mode hands pages out with norms of zero, which would hide a mask that is missing.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity.cases import make_config
from tests.parity.twins import Twins

LENGTHS = (70, 33)


@pytest.mark.parametrize(
    ("form", "backend"),
    # Values as halves, and as bytes; keys with norms of a residual.
    [("k4v4", {}), ("k3v3", {"int8_values": True}), ("orthogonal4v4", {})],
)
def test_norms_of_slots_that_were_never_written_may_be_nan(device, form, backend):
    config = make_config(form, 64, 16, window=0, num_layers=1)
    twins = Twins(config, device, backend=backend)
    members = [twins.open() for _ in LENGTHS]
    twins.append(members, LENGTHS)
    for cache, side in twins.both:
        layout, pool = cache.backend.layout, cache.backend.pool
        for member, length in zip(members, LENGTHS):
            last = int(cache.tables.block_table(twins.members([member], side))[0, -1])
            for name in layout.extents[0].planes:
                if name.endswith("norms"):
                    plane = layout.plane_view(pool, 0, name).view(np.uint16)
                    free = plane[last, :, length % 16 :]
                    assert not cache.backend.to_host(free).any()
                    # The NaN of the largest bits: norms are compared as bits, too.
                    free[...] = 0xFFFF
    twins.check_attend(0, members, 4)
    twins.check_attend(0, members, 4, [2, 3])
    twins.check_scores(0, members, 4)
    for member in members:
        twins.check_load(0, member)


def test_the_null_page_is_not_read_where_query_tokens_come_after_an_evicted_block(device):
    twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), device)
    member = twins.open()
    twins.append([member], [100])
    twins.each("evict", member, [4])
    for cache, _ in twins.both:
        cache.backend.layout.layer_view(cache.backend.pool, 0)[0] = 0xFF
    # The first query token is in block 3: from there on rows read up to places of their own.
    twins.check_attend(0, [member], 4, [40])
    twins.check_scores(0, [member], 4)
