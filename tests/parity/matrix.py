"""The pairwise matrix of attention over formats, shapes and windows.

Every pair of values of any two factors occurs in some row. The harness holds its rows to float64,
a device to the host.
"""

from __future__ import annotations

import numpy as np

from tests.parity.cases import HEADS, make_config
from tests.parity.twins import Twins

#: The factors; windows in pages, parts per sequence about that.
FACTORS = {
    "page_size": (16, 64, 128),
    "group": (1, 3, 4, 5, 7, 8, 16),
    "queries": (1, 3),
    "parts": (1, 4),
    "window": (0, 1, 2),
    "holes": (0, 1),
    "codecs": (
        "k4v4", "k3v3", "k2v2", "k3v4", "k8v8", "k5v7", "prod4v4", "orthogonal4v4", "k4exact",
        "exactv4", "exact", "bf16", "k4v3", "k2v3", "k8v4", "k1v6", "f32",
    ),
}  # fmt: skip

#: Formats that are exact already have no window.
ALL_EXACT = ("exact", "bf16", "f32")

ROWS = [
    (16, 7, 1, 4, 1, 1, "k4v4"), (64, 8, 1, 4, 2, 1, "k4v4"), (64, 16, 1, 4, 2, 1, "k4v4"),
    (128, 1, 3, 1, 0, 0, "k4v4"), (128, 3, 3, 4, 1, 1, "k4v4"), (128, 4, 3, 1, 0, 1, "k4v4"),
    (128, 5, 1, 4, 1, 1, "k4v4"), (16, 1, 3, 1, 1, 1, "k3v3"), (16, 7, 3, 1, 2, 1, "k3v3"),
    (64, 3, 1, 1, 2, 0, "k3v3"), (64, 4, 1, 4, 0, 0, "k3v3"), (64, 8, 1, 1, 2, 0, "k3v3"),
    (128, 5, 1, 1, 2, 1, "k3v3"), (128, 16, 3, 4, 0, 1, "k3v3"), (16, 3, 3, 1, 1, 1, "k2v2"),
    (16, 5, 3, 4, 0, 1, "k2v2"), (16, 16, 3, 1, 1, 1, "k2v2"), (64, 4, 3, 4, 0, 0, "k2v2"),
    (64, 7, 1, 4, 2, 0, "k2v2"), (128, 1, 3, 1, 0, 1, "k2v2"), (128, 8, 1, 4, 0, 1, "k2v2"),
    (16, 1, 1, 4, 1, 1, "k3v4"), (16, 5, 1, 1, 2, 1, "k3v4"), (16, 8, 3, 1, 2, 0, "k3v4"),
    (64, 3, 1, 4, 0, 0, "k3v4"), (64, 7, 1, 4, 0, 0, "k3v4"), (64, 16, 3, 1, 0, 1, "k3v4"),
    (128, 4, 3, 1, 2, 1, "k3v4"), (16, 1, 1, 4, 0, 0, "k8v8"), (16, 5, 3, 4, 1, 0, "k8v8"),
    (16, 7, 1, 1, 1, 0, "k8v8"), (16, 8, 1, 4, 0, 0, "k8v8"), (16, 16, 3, 4, 1, 0, "k8v8"),
    (64, 4, 3, 4, 1, 1, "k8v8"), (128, 3, 1, 1, 2, 1, "k8v8"), (16, 4, 1, 1, 0, 0, "k5v7"),
    (16, 7, 1, 4, 2, 1, "k5v7"), (16, 16, 3, 1, 0, 1, "k5v7"), (64, 1, 3, 1, 2, 0, "k5v7"),
    (64, 3, 1, 4, 1, 1, "k5v7"), (128, 5, 3, 4, 1, 0, "k5v7"), (128, 8, 3, 4, 1, 1, "k5v7"),
    (16, 16, 1, 4, 2, 1, "prod4v4"), (64, 1, 1, 4, 0, 0, "prod4v4"),
    (64, 3, 1, 4, 0, 1, "prod4v4"), (64, 8, 1, 1, 1, 0, "prod4v4"),
    (128, 4, 1, 4, 1, 1, "prod4v4"), (128, 5, 3, 1, 0, 0, "prod4v4"),
    (128, 7, 3, 4, 2, 0, "prod4v4"), (16, 8, 3, 4, 0, 1, "orthogonal4v4"),
    (16, 16, 3, 4, 0, 1, "orthogonal4v4"), (64, 1, 1, 1, 0, 0, "orthogonal4v4"),
    (64, 5, 1, 1, 2, 0, "orthogonal4v4"), (128, 3, 3, 1, 1, 1, "orthogonal4v4"),
    (128, 4, 1, 4, 2, 0, "orthogonal4v4"), (128, 7, 1, 4, 1, 1, "orthogonal4v4"),
    (16, 3, 1, 4, 1, 0, "k4exact"), (16, 5, 1, 1, 0, 1, "k4exact"),
    (16, 8, 1, 4, 2, 1, "k4exact"), (64, 4, 1, 4, 2, 0, "k4exact"),
    (64, 16, 3, 1, 1, 0, "k4exact"), (128, 1, 3, 4, 2, 0, "k4exact"),
    (128, 7, 3, 1, 2, 1, "k4exact"), (16, 7, 3, 4, 1, 1, "exactv4"),
    (16, 8, 3, 1, 1, 1, "exactv4"), (16, 16, 1, 1, 0, 0, "exactv4"),
    (64, 1, 1, 1, 2, 0, "exactv4"), (64, 3, 1, 4, 2, 1, "exactv4"),
    (64, 4, 1, 4, 2, 0, "exactv4"), (128, 5, 3, 4, 1, 1, "exactv4"), (16, 1, 1, 4, 0, 0, "exact"),
    (64, 4, 3, 1, 0, 1, "exact"), (64, 8, 3, 4, 0, 0, "exact"), (64, 16, 1, 1, 0, 1, "exact"),
    (128, 3, 1, 1, 0, 0, "exact"), (128, 5, 1, 1, 0, 1, "exact"), (128, 7, 3, 1, 0, 1, "exact"),
    (16, 4, 1, 4, 0, 1, "bf16"), (16, 7, 1, 1, 0, 0, "bf16"), (64, 3, 3, 4, 0, 0, "bf16"),
    (64, 8, 3, 1, 0, 0, "bf16"), (64, 16, 3, 1, 0, 1, "bf16"), (128, 1, 1, 1, 0, 1, "bf16"),
    (128, 5, 1, 4, 0, 0, "bf16"),
    # As few specialisations of the kernel as hold every pair: they take longer than the rows.
    (16, 4, 3, 1, 1, 0, "k4v3"), (16, 16, 1, 1, 2, 1, "k4v3"), (64, 1, 3, 4, 0, 0, "k4v3"),
    (64, 3, 1, 1, 2, 0, "k4v3"), (64, 7, 1, 4, 1, 1, "k4v3"), (128, 5, 1, 1, 0, 0, "k4v3"),
    (128, 8, 1, 4, 0, 1, "k4v3"), (16, 1, 3, 4, 2, 0, "k2v3"), (16, 4, 1, 4, 2, 1, "k2v3"),
    (16, 5, 1, 1, 0, 0, "k2v3"), (64, 8, 3, 1, 1, 0, "k2v3"), (128, 3, 3, 4, 0, 1, "k2v3"),
    (128, 7, 3, 4, 1, 1, "k2v3"), (128, 16, 3, 1, 2, 0, "k2v3"), (16, 1, 3, 1, 2, 0, "k8v4"),
    (16, 7, 1, 4, 2, 1, "k8v4"), (64, 3, 1, 4, 0, 0, "k8v4"), (64, 8, 3, 1, 1, 1, "k8v4"),
    (128, 4, 3, 1, 0, 1, "k8v4"), (128, 5, 3, 4, 1, 0, "k8v4"), (128, 16, 1, 1, 1, 1, "k8v4"),
    (16, 3, 3, 4, 0, 0, "k1v6"), (16, 4, 1, 4, 1, 1, "k1v6"), (64, 1, 1, 4, 2, 0, "k1v6"),
    (64, 16, 3, 1, 2, 1, "k1v6"), (128, 5, 1, 1, 0, 0, "k1v6"), (128, 7, 1, 4, 2, 1, "k1v6"),
    (128, 8, 3, 1, 1, 0, "k1v6"), (16, 4, 1, 1, 0, 0, "f32"), (16, 7, 1, 4, 0, 1, "f32"),
    (16, 16, 3, 1, 0, 1, "f32"), (64, 5, 3, 4, 0, 0, "f32"), (64, 8, 1, 1, 0, 1, "f32"),
    (128, 1, 1, 4, 0, 1, "f32"), (128, 3, 3, 1, 0, 0, "f32"),
]  # fmt: skip


def run_row(device, page_size, group, queries, parts, window, holes, codecs) -> None:
    """Store, attend and score one row of the matrix on host and device."""
    centred = codecs not in (*ALL_EXACT, "exactv4")
    rng = np.random.default_rng(page_size + 1000 * group)
    means = None
    if centred:
        # Twenty times the spread: a state that lost the offset shows.
        means = 20 * rng.standard_normal((1, HEADS, 64)).astype(np.float32)
    config = make_config(
        codecs, 64, page_size, window=window * page_size, sinks=4 if window else 0, num_layers=1
    )
    split_tokens = 4096 if parts == 1 else max(64, page_size)
    twins = Twins(config, device, key_means=means, backend={"split_tokens": split_tokens})
    lengths = (1, page_size - 1, 2 * page_size + 1, 3 * page_size, 4 * page_size + 200)
    members = [twins.open() for _ in lengths]
    twins.append(members, lengths, offset=0.0 if means is None else means[:, None])
    twins.check_pages()
    if holes:
        twins.each("evict", members[4], [1])
        if window < 2:
            twins.each("evict", members[3], [0])
    q_lens = [min(queries, length) for length in lengths]
    twins.check_attend(0, members, group, None if queries == 1 else q_lens)
    twins.check_scores(0, members, group)
