"""Our events are vLLM's on the wire, both ways; opt-in, see vllm_environment.sh."""

from __future__ import annotations

import time

import msgspec
import pytest

kv_events = pytest.importorskip("vllm.distributed.kv_events")

from pagedtq.serving import (  # noqa: E402
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventSubscriber,
    KVEventBatch,
)

OURS = [
    BlockStored([b"\x01" * 32, 7], None, [1, 2, 3, 4], 2, None, "GPU", None),
    BlockRemoved([7], "GPU"),
    AllBlocksCleared(),
]
THEIRS = [
    kv_events.BlockStored(
        block_hashes=[b"\x01" * 32, 7],
        parent_block_hash=None,
        token_ids=[1, 2, 3, 4],
        block_size=2,
        lora_id=None,
        medium="GPU",
        lora_name=None,
    ),
    kv_events.BlockRemoved(block_hashes=[7], medium="GPU"),
    kv_events.AllBlocksCleared(),
]


FILLED = {
    "block_hashes": [b"a"],
    "parent_block_hash": b"p",
    "token_ids": [1, 2],
    "block_size": 2,
    "lora_id": 3,
    "medium": "CPU",
    "lora_name": "adapter",
    "extra_keys": [("adapter", "salt")],
    "group_idx": 1,
    "kv_cache_spec_kind": "full_attention",
    "kv_cache_spec_sliding_window": 128,
    "locality": "REMOTE",
    "ownership": "disk",
    "session_id": "s",
    "lookahead_token_ids": [[5]],
}


@pytest.mark.parametrize(
    "kind",
    [BlockStored, BlockRemoved, AllBlocksCleared, KVEventBatch],
    ids=lambda kind: kind.__name__,
)
def test_our_fields_are_vllms_in_order_and_with_its_defaults(kind):
    theirs = getattr(kv_events, kind.__name__)
    assert kind.__struct_fields__ == theirs.__struct_fields__
    assert kind.__struct_defaults__ == theirs.__struct_defaults__
    ours, other = kind.__struct_config__, theirs.__struct_config__
    assert (ours.tag, ours.array_like, ours.omit_defaults) == (
        other.tag,
        other.array_like,
        other.omit_defaults,
    )


@pytest.mark.parametrize("name", ["BlockStored", "BlockRemoved"])
def test_no_field_that_vllm_fills_is_lost(name):
    theirs = getattr(kv_events, name)
    event = theirs(**{field: FILLED[field] for field in theirs.__struct_fields__})
    data = msgspec.msgpack.encode(kv_events.KVEventBatch(ts=1.5, events=[event]))
    again = msgspec.msgpack.encode(msgspec.msgpack.decode(data, type=KVEventBatch))
    assert again == data


def test_vllm_decodes_our_batch():
    data = msgspec.msgpack.encode(KVEventBatch(1.5, OURS, 2))
    assert msgspec.msgpack.decode(data, type=kv_events.KVEventBatch) == kv_events.KVEventBatch(
        ts=1.5, events=THEIRS, data_parallel_rank=2
    )


def test_we_decode_vllms_batch():
    data = msgspec.msgpack.encode(kv_events.KVEventBatch(ts=1.5, events=THEIRS))
    assert msgspec.msgpack.decode(data, type=KVEventBatch) == KVEventBatch(1.5, OURS)


def test_our_subscriber_reads_vllms_publisher_and_its_replay(tmp_path):
    endpoints = f"ipc://{tmp_path}/pub", f"ipc://{tmp_path}/replay"
    publisher = kv_events.ZmqEventPublisher(0, *endpoints, topic="kv")
    try:
        for _ in range(3):
            publisher.publish(kv_events.KVEventBatch(ts=1.5, events=THEIRS))
        # Its thread takes them from a queue.
        time.sleep(0.5)
        with EventSubscriber(*endpoints, topic="kv", silence_s=0.1) as subscriber:
            got = [subscriber.receive(5.0) for _ in range(3)]
    finally:
        publisher.shutdown()
    assert [one.sequence for one in got] == [0, 1, 2]
    assert all(one.batch == KVEventBatch(1.5, OURS, 0) for one in got)
