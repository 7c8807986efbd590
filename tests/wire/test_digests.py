"""Digests: they differ when bytes would, and only then."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from wire_caches import small_config

from pagedtq import Exact, LayerOverride, TurboQuant
from pagedtq.wire.digests import changed_fields, codec_digest

PROD = TurboQuant(bits=2, estimator="prod")


@pytest.mark.parametrize(
    ("changes", "fields"),
    [
        ({"num_layers": 2}, ["num_layers", "keys", "values"]),
        ({"num_kv_heads": 2}, ["num_kv_heads"]),
        ({"head_dim": 16}, ["head_dim"]),
        ({"page_size": 32, "window": 32}, ["page_size", "window"]),
        ({"keys": TurboQuant(bits=3)}, ["keys"]),
        ({"keys": PROD}, ["keys"]),
        ({"values": TurboQuant(bits=2, scale="none")}, ["values"]),
        ({"values": TurboQuant(bits=2, rotation="dense")}, ["values"]),
        ({"values": Exact()}, ["values"]),
        ({"window": 0}, ["window", "sinks"]),
        ({"window": 48}, ["window"]),
        ({"sinks": 3}, ["sinks"]),
        ({"kv_dtype": "bf16"}, ["kv_dtype"]),
        ({"seed": (1 << 64) - 1}, ["seed"]),
        ({"first_kv_head": 8}, ["first_kv_head"]),
        ({"key_bounds": True}, ["key_bounds"]),
    ],
)
def test_what_decides_bytes_changes_both_digests(changes, fields):
    one, other = small_config(), small_config(**changes)
    assert changed_fields(one, other) == fields
    assert one.format_digest() != other.format_digest()
    assert codec_digest(one, None) != codec_digest(other, None)


@pytest.mark.parametrize(
    "changes", [{"num_pages": 99}, {"num_window_slots": 3}, {"pool_order": "page_major"}]
)
def test_how_much_is_held_and_in_which_order_changes_neither(changes):
    one, other = small_config(), small_config(**changes)
    assert changed_fields(one, other) == []
    assert one.format_digest() == other.format_digest()
    assert codec_digest(one, None) == codec_digest(other, None)


def test_two_ways_to_write_one_configuration_have_one_digest():
    exact = {"keys": Exact(), "values": Exact()}
    ways = [
        small_config(num_layers=3, overrides=(LayerOverride(layers=(0, -1), **exact),)),
        small_config(
            num_layers=3,
            overrides=(LayerOverride(layers=(2,), **exact), LayerOverride(layers=(0,), **exact)),
        ),
    ]
    assert ways[0].format_digest() == ways[1].format_digest()
    # None is a window of one page; without a window sinks mean nothing.
    assert small_config(window=None).format_digest() == small_config(window=16).format_digest()
    no_window = small_config(window=0, sinks=0)
    assert small_config(window=0, sinks=5).format_digest() == no_window.format_digest()


def test_key_means_change_the_codec_digest_alone():
    means = np.zeros((1, 1, 8), np.float32)
    digests = {codec_digest(small_config(), value) for value in (None, means, means + 1)}
    assert len(digests) == 3
    assert codec_digest(small_config(), means.astype("<f4")) in digests


def test_digests_are_the_same_in_every_process(root):
    # Hash randomisation and the order of sets must not reach them.
    code = (
        "import sys; sys.path.insert(0, 'tests/wire'); from wire_caches import small_config;"
        "from pagedtq.wire.digests import codec_digest; from pagedtq import TurboQuant;"
        "c = small_config(values=TurboQuant(bits=4));"
        "print(c.format_digest().hex(), codec_digest(c, None).hex())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(root)},
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    config = small_config(values=TurboQuant(bits=4))
    here = f"{config.format_digest().hex()} {codec_digest(config, None).hex()}\n"
    assert seen == {here}
