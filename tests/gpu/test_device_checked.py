"""A little of every kind of kernel, small enough for compute-sanitizer's memcheck and racecheck.

``python -m benchmarks.gpu`` runs this file under both, before it runs claims of the whole backend.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity.cases import make_config
from tests.parity.twins import Twins

# Keys as bytes; values as bytes; a sketch of the residual; exact; queries in shared memory, two
# tiles of them; capped logits; a window.
KINDS = {
    "k4v4": ("k4v4", 4, {}, {}),
    "k3v3": ("k3v3", 4, {}, {}),
    "k2v2 values as bytes": ("k2v2", 4, {"int8_values": True}, {}),
    "prod4v4": ("prod4v4", 4, {}, {}),
    "exact": ("exact", 4, {}, {}),
    "group 16": ("k4v4", 16, {}, {}),
    "group 16, keys as bytes": ("k3v3", 16, {}, {}),
    "soft cap": ("k4v4", 5, {}, {"soft_cap": 3.0}),
    "sink logits": ("k8v8", 4, {}, {"sink_logits": True}),
}


def run_kind(device, name) -> None:
    """Store, seal, fork, attend (parts, several query tokens, a chunk), score and load."""
    form, group, backend, options = KINDS[name]
    config = make_config(form, 128, 16, window=16, num_layers=1, key_bounds=form == "k4v4")
    twins = Twins(config, device, backend={"split_tokens": 128, **backend})
    members = [twins.open(), twins.open()]
    twins.append(members, (150, 17))
    twins.append(members, (1, 20))
    members.append(twins.fork(members[0]))
    twins.append(members[2:], (3,))
    twins.check_pages()
    if "sink_logits" in options:
        options = {"sink_logits": np.linspace(-1, 1, 2 * group).astype(np.float32)}
    twins.check_attend(0, members, group, None, **options)
    twins.check_attend(0, members, group, [1, 3, 2], chunk=True, **options)
    twins.check_scores(0, members, group)
    twins.check_load(0, members[0])


@pytest.mark.parametrize("name", KINDS)
def test_a_little_of_every_kind_of_kernel(device, name):
    run_kind(device, name)
