"""Events over ZeroMQ: numbered batches for everyone, and a buffer for those who missed some.

The wire format is that of vLLM's publisher, so that its subscribers (routers, indexers) understand
it. A batch is published as three frames: topic, sequence number (eight bytes, big-endian, from 0
without a hole), and a `KVEventBatch` in MessagePack. A second socket (ROUTER) answers requests for
the past: a client sends an empty frame and the first number it wants, and gets an empty frame
and the three frames of every batch from there on that is still kept, then one numbered -1.
`pagedtq.serving.EventSubscriber` does all that.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from itertools import islice
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from ..errors import ArgumentTypeError, EventsError, UnsupportedError
from ..paging.arguments import integer, real
from .events import AllBlocksCleared, BlockRemoved, BlockStored, KVCacheEvent, KVEventBatch

if TYPE_CHECKING:
    import zmq

#: Bytes of a sequence number.
NUMBER_BYTES = 8
#: What stands in place of a number behind the last replayed batch.
END = (-1).to_bytes(NUMBER_BYTES, "big", signed=True)


#: Most that is counted in a socket's options, and the longest wait in them: milliseconds in int32.
MOST, MAX_SECONDS = 1 << 29, 2_000_000
#: A time stamp is a number of seconds that float64 tells from the next one.
MAX_STAMP = 1 << 52


def load_zmq() -> ModuleType:
    """Return the module ``zmq``.

    Raises
    ------
    UnsupportedError
        If pyzmq is not installed.
    """
    try:
        import zmq
    except ImportError as error:
        raise UnsupportedError(
            'events over sockets need pyzmq: pip install "pagedtq[events]"'
        ) from error
    return zmq


def check_names(endpoint: str, replay_endpoint: str | None, topic: str) -> None:
    """Refuse endpoints and topics that are no text.

    Raises
    ------
    ArgumentTypeError
        Naming the parameter.
    """
    for name, value in (
        ("endpoint", endpoint),
        ("replay_endpoint", "" if replay_endpoint is None else replay_endpoint),
        ("topic", topic),
    ):
        if not isinstance(value, str):
            raise ArgumentTypeError(f"{name} must be text, got {type(value).__name__}")


class EventPublisher:
    """Publishes batches of events; safe to call from several threads.

    Subscribers never hold the publisher up: one that does not read fast enough loses batches,
    sees that by their numbers and asks for them again.

    Parameters
    ----------
    endpoint : str
        Where to publish, bound here; ``"tcp://127.0.0.1:*"`` takes any free port.
    replay_endpoint : str, optional
        Where to answer requests for past batches; without it none are kept.
    topic : str
        First frame of every message, by which subscribers select.
    num_kept : int
        Most batches kept for replay; older ones are forgotten.
    data_parallel_rank : int, optional
        Goes into every batch.
    high_water_mark : int
        Messages that wait for a slow subscriber before it begins to lose some.
    linger_s : float
        How long `close` waits for messages that are on their way.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        For a bad name or number.
    EventsError
        If an endpoint cannot be bound.
    UnsupportedError
        If pyzmq is not installed.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None = None,
        *,
        topic: str = "",
        num_kept: int = 10_000,
        data_parallel_rank: int | None = None,
        high_water_mark: int = 100_000,
        linger_s: float = 1.0,
    ) -> None:
        zmq = load_zmq()
        check_names(endpoint, replay_endpoint, topic)
        if data_parallel_rank is not None:
            integer("data_parallel_rank", data_parallel_rank, 0, MOST)
        high_water_mark = integer("high_water_mark", high_water_mark, 1, MOST)
        linger_s = real("linger_s", linger_s, 0, MAX_SECONDS)
        kept = integer("num_kept", num_kept, 0, MOST)
        self.topic, self.data_parallel_rank = topic, data_parallel_rank
        if replay_endpoint is None:
            kept = 0
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=kept)
        self._encoder = msgspec.msgpack.Encoder()
        self._next = 0
        self._closed = False
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._context.linger = int(1000 * linger_s)
        self._thread: threading.Thread | None = None
        try:
            self._socket = self._context.socket(zmq.PUB)
            self._socket.sndhwm = high_water_mark
            self.endpoint = _bind(self._socket, endpoint)
            self.replay_endpoint: str | None = None
            if replay_endpoint is not None:
                router = self._context.socket(zmq.ROUTER)
                # A whole replay must fit, and as much again that the client has not confirmed yet.
                router.sndhwm = 2 * (kept + 1)
                self.replay_endpoint = _bind(router, replay_endpoint)
                self._start_replay(router)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    @property
    def next_sequence(self) -> int:
        """Number that the next batch gets; as many were published."""
        return self._next

    def publish(
        self,
        events: Sequence[BlockStored | BlockRemoved | AllBlocksCleared],
        ts: float | None = None,
    ) -> int | None:
        """Publish events as one batch and return its number; None, and no batch, without any.

        Parameters
        ----------
        events : sequence
            What `BlockManager.take_events` returned.
        ts : float, optional
            When they happened, in seconds since the epoch; now by default.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If one is no event, or ``ts`` no time; nothing is published then.
        EventsError
            If the publisher is closed.
        """
        try:
            events = list(events)
        except TypeError:
            raise ArgumentTypeError(f"expected events, got {type(events).__name__}") from None
        if ts is not None:
            ts = real("ts", ts, -MAX_STAMP, MAX_STAMP)
        for event in events:
            if not isinstance(event, KVCacheEvent):
                raise ArgumentTypeError(f"expected events, got {type(event).__name__}")
        with self._lock:
            if self._closed:
                raise EventsError(f"the publisher of {self.endpoint} is closed")
            if not events:
                return None
            stamp = time.time() if ts is None else ts
            batch = KVEventBatch(stamp, events, self.data_parallel_rank)
            payload = self._encoder.encode(batch)
            number = self._next
            # A PUB socket drops what a subscriber has no room for instead of waiting.
            self._socket.send_multipart(_message(self.topic, number, payload))
            self._kept.append((number, payload))
            self._next = number + 1
        return number

    def close(self) -> None:
        """Send what is on its way, stop answering, free the ports; a second time does nothing."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._socket.close()
        if self._thread is not None:
            self._stop.send(b"")
            self._thread.join()
            self._stop.close()
        self._context.term()

    def __enter__(self) -> EventPublisher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- replay, on a thread of its own -------------------------------------------------------

    def _start_replay(self, router: zmq.Socket[bytes]) -> None:
        zmq = load_zmq()
        # Both ends before the thread runs: a socket belongs to one thread at a time.
        stopped = self._context.socket(zmq.PAIR)
        stopped.bind("inproc://stop")
        self._stop = self._context.socket(zmq.PAIR)
        self._stop.connect("inproc://stop")
        self._thread = threading.Thread(
            target=self._serve, args=(router, stopped), name="pagedtq-replay", daemon=True
        )
        self._thread.start()

    def _serve(self, router: zmq.Socket[bytes], stopped: zmq.Socket[bytes]) -> None:
        zmq = load_zmq()
        poller = zmq.Poller()
        poller.register(router, zmq.POLLIN)
        poller.register(stopped, zmq.POLLIN)
        with router, stopped:
            while stopped not in dict(poller.poll()):
                self._answer(router, router.recv_multipart())

    def _answer(self, router: zmq.Socket[bytes], request: list[bytes]) -> None:
        """Send what is kept from a number on; to a request that makes no sense, nothing but END."""
        client, kept = request[0], []
        if len(request) == 3 and len(request[2]) == NUMBER_BYTES:
            with self._lock:
                first = self._next - len(self._kept)
                skipped = max(int.from_bytes(request[2], "big") - first, 0)
                kept = list(islice(self._kept, min(skipped, len(self._kept)), None))
        # The client's queue has room for all of it; a client that left is dropped by ZeroMQ.
        for number, payload in kept:
            router.send_multipart([client, b"", *_message(self.topic, number, payload)])
        router.send_multipart([client, b"", b"", END, b""])


def _message(topic: str, number: int, payload: bytes) -> list[bytes]:
    return [topic.encode(), number.to_bytes(NUMBER_BYTES, "big"), payload]


def _bind(socket: zmq.Socket[bytes], endpoint: str) -> str:
    """Bind a socket and return where, with the port that was taken."""
    zmq: Any = load_zmq()
    try:
        socket.bind(endpoint)
    except zmq.ZMQError as error:
        raise EventsError(f"cannot bind {endpoint!r}: {error}") from error
    bound: str = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return bound
