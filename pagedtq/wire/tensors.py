"""Decoded keys and values as a safetensors file, for tools that know no pages.

The format (https://github.com/huggingface/safetensors) is a length, a JSON header and the tensors'
bytes; it is written here directly, one tensor at a time, so that only one is decoded at any moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from ..cache import PagedKVCache
from .atomic import AnyPath, write_atomically


def save_tensors(cache: PagedKVCache, path: AnyPath) -> None:
    """Decode all sequences and save them as safetensors.

    Sequence ``i`` (in the order of opening) and layer ``l`` become
    ``sequences.{i}.layers.{l}.keys`` and ``.values``, float32 ``[n, num_kv_heads, head_dim]``,
    and ``sequences.{i}.positions``, int64 ``[n]``: what attention reads, the exact window exactly.
    The file's metadata hold the configuration as JSON under ``config``.

    Parameters
    ----------
    cache : PagedKVCache
        The cache; no step may be open.
    path : path
        The file; replaced atomically.

    Raises
    ------
    StepError
        If a step is open.
    OSError
        If the file cannot be written.
    """
    ids = cache.tables.sequence_ids().tolist()
    # Refuses an open step, whose layers may not be stored yet.
    cache.tables.extract(ids, sealed_only=False)
    write_atomically(path, _tensor_chunks(cache, ids))


def _tensor_chunks(cache: PagedKVCache, ids: list[int]) -> Iterator[bytes]:
    config = cache.config
    row = config.num_kv_heads * config.head_dim
    positions = [cache.load(0, seq_id)[2] for seq_id in ids]
    entries: dict[str, Any] = {"__metadata__": {"config": config.to_json().decode()}}
    end = 0
    for index, places in enumerate(positions):
        begin, end = end, end + 8 * len(places)
        entries[f"sequences.{index}.positions"] = _entry("I64", [len(places)], begin, end)
        shape = [len(places), config.num_kv_heads, config.head_dim]
        for layer in range(config.num_layers):
            for stream in ("keys", "values"):
                begin, end = end, end + len(places) * row * 4
                label = f"sequences.{index}.layers.{layer}.{stream}"
                entries[label] = _entry("F32", shape, begin, end)
    header = msgspec.json.encode(entries)
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for seq_id, places in zip(ids, positions):
        yield places.astype("<i8").tobytes()
        for layer in range(config.num_layers):
            keys, values, _ = cache.load(layer, seq_id)
            yield keys.astype("<f4").tobytes()
            yield values.astype("<f4").tobytes()


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
