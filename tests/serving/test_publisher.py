"""Events over a real socket: numbers, replay, what a slow or late subscriber is told."""

from __future__ import annotations

import sys
import threading

import msgspec
import pytest
import zmq
from served import COMMON, admit, manager_of, request_of

from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    EventsError,
    EventsLost,
    ReplayTimeout,
    UnsupportedError,
)
from pagedtq.serving import (
    AllBlocksCleared,
    BlockRemoved,
    EventPublisher,
    EventSubscriber,
    KVEventBatch,
)

ANY = "tcp://127.0.0.1:*"
SOON = 5.0


def removed(number: int) -> list[BlockRemoved]:
    return [BlockRemoved([number], "GPU")]


@pytest.fixture
def publisher():
    with EventPublisher(ANY, ANY, topic="kv") as made:
        yield made


def joined(publisher, **options) -> EventSubscriber:
    options = {"silence_s": 0.1} | options
    return EventSubscriber(publisher.endpoint, publisher.replay_endpoint, **options)


def subscribed(publisher) -> EventSubscriber:
    """A subscriber whose subscription has arrived: it has seen the first batch it was sent."""
    subscriber = joined(publisher)
    publisher.publish(removed(0))
    assert subscriber.receive(SOON).sequence == 0
    while not subscriber._socket.poll(20):
        publisher.publish(removed(0))
    while subscriber.receive(0.05) is not None:
        pass
    return subscriber


def drop_live(subscriber, count: int) -> None:
    """Lose messages on their way, as a full queue would."""
    for _ in range(count):
        assert subscriber._socket.poll(1000 * SOON)
        subscriber._socket.recv_multipart()


def raw(endpoint, kind=zmq.DEALER):
    context = zmq.Context()
    context.linger = 0
    socket = context.socket(kind)
    socket.connect(endpoint)
    return context, socket


def test_a_managers_events_arrive_as_they_were_taken(publisher):
    manager = manager_of(enable_events=True)
    first = request_of("0", COMMON)
    admit(manager, first)
    events = manager.take_events()
    assert publisher.publish(events, ts=1.5) == 0
    manager.free(first)
    manager.reset_prefix_cache()
    assert publisher.publish(manager.take_events()) == 1
    with joined(publisher) as subscriber:
        assert subscriber.receive(SOON) == (0, KVEventBatch(1.5, events))
        assert subscriber.receive(SOON).batch.events == [AllBlocksCleared()]
        assert subscriber.next_sequence == publisher.next_sequence == 2


def test_a_late_joiner_is_given_the_past_in_order_and_then_the_present(publisher):
    for number in range(5):
        publisher.publish(removed(number))
    with joined(publisher, start=2) as subscriber:
        got = [subscriber.receive(SOON) for _ in range(3)]
        publisher.publish(removed(5))
        got.append(subscriber.receive(SOON))
    assert [(one.sequence, one.batch.events) for one in got] == [
        (number, removed(number)) for number in range(2, 6)
    ]


def test_a_gap_is_filled_from_the_buffer_and_nothing_comes_twice(publisher):
    with subscribed(publisher) as subscriber:
        first = subscriber.next_sequence
        for number in range(first, first + 4):
            publisher.publish(removed(number))
        drop_live(subscriber, 2)
        got = [subscriber.receive(SOON).sequence for _ in range(4)]
        assert got == list(range(first, first + 4))
        assert subscriber.receive(0.05) is None


def test_a_lost_last_batch_is_found_without_a_later_one(publisher):
    with subscribed(publisher) as subscriber:
        number = publisher.publish(removed(7))
        drop_live(subscriber, 1)
        assert subscriber.receive(0.05).sequence == number
        assert subscriber.receive(0.05) is None
        number = publisher.publish(removed(8))
        drop_live(subscriber, 1)
        assert subscriber.receive().sequence == number


def test_what_is_kept_no_longer_is_said_once_and_the_rest_still_comes():
    with EventPublisher(ANY, ANY, num_kept=3) as publisher:
        for number in range(10):
            publisher.publish(removed(number))
        with joined(publisher) as subscriber:
            with pytest.raises(EventsLost, match="batches 0 to 6 are lost") as caught:
                subscriber.receive(SOON)
            assert (caught.value.expected, caught.value.received) == (0, 7)
            assert [subscriber.receive(SOON).sequence for _ in range(3)] == [7, 8, 9]
            assert subscriber.receive(0.05) is None


def test_without_a_buffer_a_gap_is_lost():
    with EventPublisher(ANY) as publisher:
        assert publisher.replay_endpoint is None
        with EventSubscriber(publisher.endpoint, start=None) as subscriber:
            while (got := subscriber.receive(0.02)) is None:
                publisher.publish(removed(0))
            while subscriber.receive(0.05) is not None:
                pass
            assert got.sequence < subscriber.next_sequence == publisher.next_sequence
            first = publisher.publish(removed(1))
            publisher.publish(removed(2))
            drop_live(subscriber, 1)
            with pytest.raises(EventsLost) as caught:
                subscriber.receive(SOON)
            assert (caught.value.expected, caught.value.received) == (first, first + 1)
            assert subscriber.receive(SOON).batch.events == removed(2)


@pytest.mark.parametrize("replay", [True, False])
def test_a_publisher_that_begins_anew_is_noticed(replay):
    def made(endpoint=ANY, replay_endpoint=ANY):
        return EventPublisher(endpoint, replay_endpoint if replay else None)

    first = made()
    endpoints = first.endpoint, first.replay_endpoint
    if replay:
        subscriber = subscribed(first)
    else:
        subscriber = EventSubscriber(*endpoints, start=None)
        while subscriber.receive(0.02) is None:
            first.publish(removed(1))
        while subscriber.receive(0.05) is not None:
            pass
    # More than the second one will have published before the subscriber is back.
    for _ in range(500):
        first.publish(removed(1))
        subscriber.receive(SOON)
    first.close()
    expected = subscriber.next_sequence
    with made(*endpoints) as second, subscriber:
        while not subscriber._socket.poll(20):
            second.publish(removed(2))
        with pytest.raises(EventsLost, match="began anew") as caught:
            subscriber.receive(SOON)
        assert caught.value.expected == expected > caught.value.received
        if replay:
            numbers = [subscriber.receive(SOON).sequence for _ in range(second.next_sequence)]
            assert numbers == list(range(second.next_sequence))
        else:
            assert subscriber.receive(SOON).sequence == caught.value.received


def test_the_frames_are_those_that_vllms_subscribers_read():
    with EventPublisher(ANY, ANY, topic="kv@one", data_parallel_rank=2) as publisher:
        publisher.publish(removed(1), ts=3.0)
        publisher.publish(removed(2), ts=4.0)
        context, replay = raw(publisher.replay_endpoint)
        replay.send_multipart([b"", (1).to_bytes(8, "big")])
        answers = [replay.recv_multipart() for _ in range(2)]
        context.destroy()
    payload = msgspec.msgpack.encode(
        [4.0, [{"type": "BlockRemoved", "block_hashes": [2], "medium": "GPU"}], 2]
    )
    assert answers == [
        [b"", b"kv@one", (1).to_bytes(8, "big"), payload],
        [b"", b"", b"\xff" * 8, b""],
    ]


def test_a_senseless_request_is_answered_with_the_end_alone(publisher):
    publisher.publish(removed(0))
    context, replay = raw(publisher.replay_endpoint)
    for request in ([b""], [b"", b"3"], [b"", b"", b"", b""], [b"", (1 << 60).to_bytes(8, "big")]):
        replay.send_multipart(request)
        assert replay.recv_multipart() == [b"", b"", b"\xff" * 8, b""]
    context.destroy()
    # And the next one is served.
    with joined(publisher) as subscriber:
        assert subscriber.receive(SOON).sequence == 0


def test_a_subscriber_takes_its_topic_only():
    with EventPublisher(ANY, topic="a") as publisher:
        other = EventSubscriber(publisher.endpoint, topic="b", start=None)
        with EventSubscriber(publisher.endpoint, topic="a", start=None) as subscriber, other:
            while subscriber.receive(0.02) is None:
                publisher.publish(removed(0))
            assert other.receive(0.05) is None


def test_publishing_from_several_threads_numbers_every_batch_once(publisher):
    def publish(name: int) -> None:
        for at in range(50):
            publisher.publish(removed(1000 * name + at))

    threads = [threading.Thread(target=publish, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with joined(publisher) as subscriber:
        got = [subscriber.receive(SOON) for _ in range(200)]
    assert [one.sequence for one in got] == list(range(200))
    hashes = [one.batch.events[0].block_hashes[0] for one in got]
    for name in range(4):
        mine = [number for number in hashes if number // 1000 == name]
        assert mine == [1000 * name + at for at in range(50)]


def test_an_empty_batch_is_not_published(publisher):
    assert publisher.publish([]) is None
    assert publisher.next_sequence == 0


def test_what_is_no_event_is_refused_and_takes_no_number(publisher):
    with pytest.raises(ArgumentTypeError, match="expected events, got str"):
        publisher.publish([*removed(1), "BlockRemoved"])
    assert publisher.publish(removed(1)) == 0


def test_closing_frees_the_ports_and_stops_the_thread():
    publisher = EventPublisher(ANY, ANY)
    endpoints = publisher.endpoint, publisher.replay_endpoint
    publisher.publish(removed(0))
    publisher.close()
    publisher.close()
    assert not [one for one in threading.enumerate() if one.name == "pagedtq-replay"]
    with pytest.raises(EventsError, match="is closed"):
        publisher.publish(removed(1))
    with EventPublisher(*endpoints) as again:
        assert again.next_sequence == 0


def test_an_endpoint_that_is_taken_or_malformed_is_named(publisher):
    for endpoints in ((publisher.endpoint,), (ANY, publisher.endpoint), ("nowhere",)):
        with pytest.raises(EventsError, match=f"cannot bind '{endpoints[-1]}'"):
            EventPublisher(*endpoints)
    with pytest.raises(EventsError, match="cannot connect to 'nowhere'"):
        EventSubscriber("nowhere")


def test_no_answer_to_a_replay_is_an_error_and_not_for_ever(publisher):
    publisher.publish(removed(0))
    with EventPublisher(ANY) as silent:
        # A PUB socket takes the connection and never answers.
        subscriber = EventSubscriber(publisher.endpoint, silent.endpoint, replay_timeout_s=0.05)
        with subscriber, pytest.raises(ReplayTimeout, match="did not answer within"):
            subscriber.receive(SOON)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([b"kv", b"\0" * 8], "frames of"),
        ([b"kv", b"\0" * 7, b""], "frames of"),
        ([b"kv", b"\0" * 8, b"\xc1"], "batch 0 cannot be decoded"),
        ([b"kv", b"\0" * 8, msgspec.msgpack.encode([1.0, [{"type": "Unknown"}]])], "decoded"),
    ],
)
def test_a_malformed_message_is_one_error_and_the_next_one_is_received(frames, message):
    context = zmq.Context()
    context.linger = 0
    socket = context.socket(zmq.PUB)
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    with EventSubscriber(f"tcp://127.0.0.1:{port}", start=None) as subscriber:
        while not subscriber._socket.poll(20):
            socket.send_multipart(frames)
        with pytest.raises(EventsError, match=message):
            subscriber.receive(SOON)
        good = msgspec.msgpack.encode(KVEventBatch(1.0, removed(1)))
        socket.send_multipart([b"kv", (1000).to_bytes(8, "big"), good])
        while True:
            try:
                got = subscriber.receive(SOON)
            except EventsError:
                continue
            break
        assert got == (1000, KVEventBatch(1.0, removed(1)))
    context.destroy()


def test_a_closed_subscriber_says_so(publisher):
    subscriber = joined(publisher)
    subscriber.close()
    subscriber.close()
    with pytest.raises(EventsError, match="is closed"):
        subscriber.receive(SOON)


@pytest.mark.parametrize("options", [{"num_kept": -1}, {"high_water_mark": 0}])
def test_a_bad_size_is_refused_and_leaves_no_port_bound(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        EventPublisher(ANY, ANY, **options)


def test_without_pyzmq_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "zmq", None)
    for end in (EventPublisher, EventSubscriber):
        with pytest.raises(UnsupportedError, match=r"pagedtq\[events\]"):
            end(ANY)
