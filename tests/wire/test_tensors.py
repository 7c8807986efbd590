"""Decoded tensors as safetensors: what another program finds in the file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from wire_caches import busy_cache, one_sequence, small_config

from pagedtq import CacheConfig, Exact
from pagedtq.errors import StepError
from pagedtq.wire import save_tensors


def read_tensors(path):
    """Read a safetensors file by its specification, and prove that it keeps to it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    body, end, tensors = data[8 + size :], 0, {}
    assert data[8:9] == b"{" and size % 8 == 0
    for name, entry in header.items():
        begin, stop = entry["data_offsets"]
        # No holes, no overlaps.
        assert begin == end
        end = stop
        dtype = {"F32": "<f4", "I64": "<i8"}[entry["dtype"]]
        tensors[name] = np.frombuffer(body[begin:stop], dtype).reshape(entry["shape"])
    assert end == len(body)
    return metadata, tensors


def test_every_layer_of_every_sequence_is_there_as_it_reads(tmp_path):
    cache = busy_cache(small_config(num_layers=2, num_kv_heads=2))
    save_tensors(cache, tmp_path / "cache.safetensors")
    metadata, tensors = read_tensors(tmp_path / "cache.safetensors")
    assert CacheConfig.from_json(metadata["config"]) == cache.config
    ids = cache.tables.sequence_ids().tolist()
    assert len(tensors) == len(ids) * (1 + 2 * 2)
    for index, seq in enumerate(ids):
        for layer in range(2):
            keys, values, positions = cache.load(layer, seq)
            prefix = f"sequences.{index}"
            np.testing.assert_array_equal(tensors[f"{prefix}.positions"], positions)
            np.testing.assert_array_equal(tensors[f"{prefix}.layers.{layer}.keys"], keys)
            np.testing.assert_array_equal(tensors[f"{prefix}.layers.{layer}.values"], values)


def test_the_safetensors_package_reads_it(tmp_path):
    numpy_reader = pytest.importorskip("safetensors.numpy")
    cache, seq = one_sequence(small_config(keys=Exact(), values=Exact()))
    save_tensors(cache, tmp_path / "cache.safetensors")
    tensors = numpy_reader.load_file(tmp_path / "cache.safetensors")
    np.testing.assert_array_equal(tensors["sequences.0.layers.0.keys"], cache.load(0, seq)[0])


def test_an_open_step_must_end_first(tmp_path):
    cache, seq = one_sequence()
    cache.begin_step(seq)
    with pytest.raises(StepError, match="extract must wait"):
        save_tensors(cache, tmp_path / "cache.safetensors")
    assert list(tmp_path.iterdir()) == []
