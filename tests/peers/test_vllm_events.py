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
