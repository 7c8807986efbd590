"""Events: what is announced when, their wire format, and that they add up to the prefix map."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import numpy as np
import pytest
from served import admit, decode, manager_of, request_of

from pagedtq.errors import ArgumentError
from pagedtq.paging import PageTables, SharingOptions
from pagedtq.serving import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventLog,
    KVEventBatch,
)


def test_the_fields_are_frozen():
    fields = {kind.__name__: kind.__struct_fields__ for kind in (BlockStored, BlockRemoved)}
    assert fields == {
        "BlockStored": (
            "block_hashes",
            "parent_block_hash",
            "token_ids",
            "block_size",
            "lora_id",
            "medium",
            "lora_name",
            "extra_keys",
            "group_idx",
            "kv_cache_spec_kind",
            "kv_cache_spec_sliding_window",
            "locality",
            "ownership",
            "session_id",
            "lookahead_token_ids",
        ),
        "BlockRemoved": ("block_hashes", "medium", "group_idx", "locality", "ownership"),
    }
    assert AllBlocksCleared.__struct_fields__ == ()
    assert KVEventBatch.__struct_fields__ == ("ts", "events", "data_parallel_rank")
    # What a subscriber may leave out.
    assert BlockStored.__struct_defaults__ == (None,) * 8
    assert BlockRemoved.__struct_defaults__ == (None,) * 3


def test_what_other_publishers_fill_is_read_and_kept():
    """A group of layers, an adapter, a tier elsewhere: all that vLLM's events can say."""
    stored = {
        "type": "BlockStored",
        "block_hashes": [b"a", b"b"],
        "parent_block_hash": 5,
        "token_ids": [1, 2, 3, 4],
        "block_size": 2,
        "lora_id": 3,
        "medium": "CPU",
        "lora_name": "adapter",
        "extra_keys": [["adapter", "salt"], None],
        "group_idx": 1,
        "kv_cache_spec_kind": "sliding_window",
        "kv_cache_spec_sliding_window": 128,
        "locality": "REMOTE",
        "ownership": "disk",
        "session_id": "s",
        "lookahead_token_ids": [[5], []],
    }
    removed = {
        "type": "BlockRemoved",
        "block_hashes": [b"a"],
        "medium": "CPU",
        "group_idx": 1,
        "locality": "LOCAL",
        "ownership": "disk",
    }
    sent = [0.5, [stored, removed], 1]
    batch = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=KVEventBatch)
    first, second = batch.events
    assert (first.lora_name, first.group_idx, first.locality) == ("adapter", 1, "REMOTE")
    assert (second.group_idx, second.ownership) == (1, "disk")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(batch)) == sent


def test_the_bytes_on_the_wire_are_frozen():
    batch = KVEventBatch(
        ts=1.5,
        events=[
            BlockStored([b"\x01", 2], b"\x00", [7, 8], 2, None, "GPU", None),
            BlockRemoved([b"\x01"], "GPU"),
            AllBlocksCleared(),
        ],
    )
    data = msgspec.msgpack.encode(batch)
    assert msgspec.msgpack.decode(data) == [
        1.5,
        [
            {
                "type": "BlockStored",
                "block_hashes": [b"\x01", 2],
                "parent_block_hash": b"\x00",
                "token_ids": [7, 8],
                "block_size": 2,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
            },
            {"type": "BlockRemoved", "block_hashes": [b"\x01"], "medium": "GPU"},
            {"type": "AllBlocksCleared"},
        ],
        None,
    ]
    assert msgspec.msgpack.decode(data, type=KVEventBatch) == batch
    ranked = msgspec.msgpack.encode(KVEventBatch(0.0, [], 3))
    assert msgspec.msgpack.decode(ranked) == [0.0, [], 3]


@pytest.mark.parametrize("count", [2, 3, 10])
def test_one_event_stores_all_blocks_of_a_call_and_each_eviction_is_one(count):
    manager = manager_of(count + 1, enable_events=True)
    first = request_of("0", [1] * (16 * count))
    admit(manager, first)
    (stored,) = manager.take_events()
    assert stored.block_hashes == first.block_hashes
    assert stored.parent_block_hash is None
    assert stored.token_ids == [1] * (16 * count)
    assert (stored.block_size, stored.medium) == (16, "GPU")
    manager.free(first)
    assert manager.take_events() == []
    second = request_of("1", [2] * (16 * count))
    admit(manager, second)
    events = manager.take_events()
    assert [type(event) for event in events] == [BlockRemoved] * count + [BlockStored]
    # The last block of a freed request goes first.
    assert [event.block_hashes for event in events[:-1]] == [[h] for h in first.block_hashes[::-1]]
    manager.free(second)
    manager.reset_prefix_cache()
    assert manager.take_events() == [AllBlocksCleared()]


def test_a_block_names_the_one_before_it():
    manager = manager_of(enable_events=True)
    first = request_of("0", [1] * 40)
    admit(manager, first)
    decode(manager, first, [5] * 10)
    _, filled = manager.take_events()
    assert filled.parent_block_hash == first.block_hashes[1]
    assert filled.block_hashes == first.block_hashes[2:]
    assert filled.token_ids == [1] * 8 + [5] * 8
    second = request_of("1", [1] * 32 + [9] * 16)
    admit(manager, second)
    (tail,) = manager.take_events()
    assert (tail.parent_block_hash, tail.token_ids) == (first.block_hashes[1], [9] * 16)


def test_the_parent_is_the_one_of_the_chain_even_if_its_page_is_gone():
    tables = PageTables(4, 20, sharing=SharingOptions())
    log = tables.prefix.observer = EventLog(4)
    keys = [b"a", b"b", b"c"]
    seq_id = tables.open(block_keys=keys[:2])
    tables.commit(tables.reserve([seq_id], 12))
    tables.evict(seq_id, [1])
    tables.publish_keys(seq_id, keys[2:])
    assert [event.parent_block_hash for event in log.take()] == [None, b"b"]


def test_hashes_can_be_given_as_their_last_64_bits():
    log = EventLog(4, int_hashes=True)
    log.stored([bytes(range(32))], bytes(31) + b"\x07", np.arange(4, dtype=np.int32))
    (stored,) = log.take()
    assert stored.block_hashes == [0x18191A1B1C1D1E1F]
    assert stored.parent_block_hash == 7


def test_events_add_up_to_the_prefix_map():
    rng = random.Random(7)
    manager, model, running = manager_of(30, 4, enable_events=True), Counter(), []
    chains = {}
    for step in range(600):
        if running and (len(running) > 5 or rng.random() < 0.35):
            manager.free(running.pop(rng.randrange(len(running))))
        elif running and rng.random() < 0.4:
            request = rng.choice(running)
            if len(manager.get_blocks(request.request_id)) < 12 and manager.num_free_blocks:
                decode(manager, request, [rng.randrange(2)])
        elif rng.random() < 0.05:
            manager.evict_blocks({rng.randrange(1, 30)})
        else:
            tokens = [rng.randrange(2) if at % 4 == 0 else 0 for at in range(rng.randint(1, 24))]
            skip = rng.random() < 0.2
            request = request_of(str(step), tokens, 4, skip_reading_prefix_cache=skip)
            if admit(manager, request)[1] is not None:
                running.append(request)
        if not running and rng.random() < 0.3:
            assert manager.reset_prefix_cache()
        for event in manager.take_events():
            if isinstance(event, BlockStored):
                parent = event.parent_block_hash
                for at, key in enumerate(event.block_hashes):
                    model[key] += 1
                    named = parent, tuple(event.token_ids[4 * at : 4 * at + 4])
                    assert chains.setdefault(key, named) == named
                    parent = key
            elif isinstance(event, BlockRemoved):
                model.subtract(event.block_hashes)
            else:
                model.clear()
        prefix = manager.tables.prefix
        held = np.flatnonzero(prefix.held).tolist()
        assert Counter(prefix.key_of(page) for page in held) == +model
        assert min(model.values(), default=0) >= 0
    assert len(chains) > 60


def test_a_log_needs_a_block_size():
    with pytest.raises(ArgumentError, match="block_size"):
        EventLog(0)
