"""What the kernels' source decodes is what the host decodes from the same pages.

Values to the bit; keys to float32 rounding, since the host reads them in float64.
"""

from __future__ import annotations

import numpy as np
import pytest
from device_layer import DeviceLayer, cache_config
from test_store import FORMATS, poisoned, tokens

from pagedtq.backends.dtypes import round_to, to_storage

CASES = [
    ("k4v4", 128, 64),
    ("k3v3", 96, 32),
    ("k3v3", 256, 16),
    ("k2v2", 64, 256),
    ("k8v8", 80, 16),
    ("k5v6", 128, 64),
    ("k1v5", 64, 16),
    ("prod4v4", 128, 16),
    ("prod3v3", 96, 64),
    ("dense4v3", 64, 16),
    ("exact", 80, 16),
]


def filled(form, head_dim, page_size):
    host = poisoned(cache_config(*FORMATS[form], head_dim, page_size=page_size))
    slots = np.arange(page_size + 1, 3 * page_size - 2, dtype=np.int64)
    keys, values = tokens(len(slots), 2, head_dim, "f32")
    host.store(0, keys, values, slots)
    return host, slots


def vector_error(got, want):
    """Largest ``|got - want| / |want|`` over vectors (zero vectors must be equal)."""
    size = np.linalg.norm(want, axis=-1)
    return np.max(np.linalg.norm(got - want, axis=-1) / np.where(size > 0, size, 1))


@pytest.mark.parametrize(("form", "head_dim", "page_size"), CASES)
def test_decoded_tokens_equal_the_hosts(form, head_dim, page_size):
    host, slots = filled(form, head_dim, page_size)
    # Any order, any slot twice.
    picked = np.random.default_rng(3).choice(slots, 21)
    keys, values = DeviceLayer(host, seed=6).load(picked)
    host_keys, host_values = host.load(0, picked)
    # The host reads keys in float64 and rounds once; values are float32 on both sides.
    assert vector_error(keys, host_keys) < 1e-6
    assert np.array_equal(values, host_values)


def test_means_are_added_back():
    means = 20 * np.random.default_rng(5).standard_normal((1, 2, 128)).astype(np.float32)
    host = poisoned(cache_config(*FORMATS["k4v4"]), means)
    slots = np.arange(64, 75, dtype=np.int64)
    keys, values = tokens(len(slots), 2, 128, "f32", means=means[0])
    host.store(0, keys, values, slots)
    loaded, _ = DeviceLayer(host).load(slots)
    assert vector_error(loaded, host.load(0, slots)[0]) < 1e-6
    assert np.abs(loaded - keys).max() < 1.5


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_results_are_rounded_to_the_type_asked_for(kind):
    host, slots = filled("k4v4", 128, 16)
    wide = DeviceLayer(host).load(slots)
    narrow = DeviceLayer(host).load(slots, kind)
    for ours, reference in zip(narrow, wide):
        assert np.array_equal(ours, to_storage(round_to(reference, kind), kind))


def test_negative_slots_give_zeros_and_read_nothing():
    host, slots = filled("k3v3", 96, 16)
    device = DeviceLayer(host)
    # The null page is NaN in every plane: were it read, that would show.
    picked = np.array([-1, slots[0], -1], np.int64)
    for rows in device.load(picked):
        assert not rows[[0, 2]].any()
        assert rows[1].any()
