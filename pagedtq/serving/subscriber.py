"""The other end of `EventPublisher`: every batch once and in order, or an error naming the rest."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from ..errors import EventsError, EventsLost, ReplayTimeout
from ..paging.arguments import integer, real
from .events import KVEventBatch
from .publisher import END, MAX_SECONDS, NUMBER_BYTES, check_names, load_zmq

if TYPE_CHECKING:
    import zmq


class NumberedBatch(NamedTuple):
    """A batch and its sequence number."""

    sequence: int
    batch: KVEventBatch


class EventSubscriber:
    """Receives the batches of one publisher, ours or vLLM's, in order and without repetition.

    With a replay endpoint it fetches what it missed: what was published before it came, what was
    dropped on the way, and what no later batch gave away as missing. What the publisher keeps no
    longer is reported as `EventsLost`; a model of the cache must then be built anew. To be
    used by one thread.

    Parameters
    ----------
    endpoint : str
        Where the publisher publishes.
    replay_endpoint : str, optional
        Where it answers requests for past batches.
    topic : str
        Only messages whose topic begins so are received.
    start : int or None
        First number wanted; None for whatever comes first.
    replay_timeout_s : float
        How long to wait for an answer.
    silence_s : float
        After so long without a message it asks whether it missed the last ones.

    Raises
    ------
    ArgumentError, ArgumentTypeError
        For a bad name or number.
    EventsError
        If an endpoint is malformed.
    UnsupportedError
        If pyzmq is not installed.

    Notes
    -----
    A publisher that begins anew (its process was restarted) is noticed when it sends a number that
    it had sent before; the protocol says nothing else about it.
    """

    def __init__(
        self,
        endpoint: str,
        replay_endpoint: str | None = None,
        *,
        topic: str = "",
        start: int | None = 0,
        replay_timeout_s: float = 5.0,
        silence_s: float = 1.0,
    ) -> None:
        module = load_zmq()
        check_names(endpoint, replay_endpoint, topic)
        replay_timeout_s = real("replay_timeout_s", replay_timeout_s, 0, MAX_SECONDS)
        silence_s = real("silence_s", silence_s, 0, MAX_SECONDS)
        self.endpoint, self.replay_endpoint = endpoint, replay_endpoint
        self.replay_timeout_s, self.silence_s = replay_timeout_s, silence_s
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._expected = None if start is None else integer("start", start, 0, (1 << 63) - 1)
        self._newest = -1
        # A past is fetched at once, so that a late joiner need not wait for the next batch.
        self._behind = start is not None and replay_endpoint is not None
        self._waiting: deque[tuple[int, bytes]] = deque()
        self._context = module.Context()
        self._context.linger = 0
        self._replay: zmq.Socket[bytes] | None = None
        try:
            self._socket = self._context.socket(module.SUB)
            self._socket.subscribe(topic.encode())
            self._connect(self._socket, endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    @property
    def next_sequence(self) -> int | None:
        """Number of the next batch; None before the first one, if it may be any."""
        return self._expected

    def receive(self, timeout_s: float | None = None) -> NumberedBatch | None:
        """Return the next batch.

        Parameters
        ----------
        timeout_s : float, optional
            How long to wait; for ever by default.

        Returns
        -------
        NumberedBatch or None
            None if none came in time: with a replay endpoint, then none was published.

        Raises
        ------
        ArgumentError, ArgumentTypeError
            If ``timeout_s`` is no time.
        EventsLost
            If batches are missing for good. The next call goes on behind them.
        ReplayTimeout
            If a request for past batches found no answer.
        EventsError
            If a message is malformed (it is dropped), or the subscriber is closed.
        """
        if self._context.closed:
            raise EventsError(f"the subscriber to {self.endpoint} is closed")
        if timeout_s is not None:
            timeout_s = real("timeout_s", timeout_s, 0, MAX_SECONDS)
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._behind:
                self._catch_up()
            if self._waiting:
                return self._deliver()
            # The last batches may have been dropped, with none behind them to show it.
            asks = self.replay_endpoint is not None and self._expected is not None
            quiet = time.monotonic() + self.silence_s if asks else None
            due = min((end for end in (deadline, quiet) if end is not None), default=None)
            if self._socket.poll(_milliseconds(due)):
                self._take(_parse(self._socket.recv_multipart()))
                continue
            if asks:
                self._catch_up()
            if not self._waiting and due == deadline:
                return None

    def close(self) -> None:
        """Close the sockets; a second time does nothing."""
        self._context.destroy(linger=0)

    def __enter__(self) -> EventSubscriber:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _take(self, message: tuple[int, bytes]) -> None:
        """Sort a message in: the next one, one that was replayed already, or one too far on."""
        number = message[0]
        # Live messages only ever count up, so this one is another publisher's.
        anew = number <= self._newest
        self._newest = number
        expected = self._expected
        if anew and expected is not None:
            self._expected = 0 if self.replay_endpoint is not None else number
            self._behind = self.replay_endpoint is not None
            if not self._behind:
                self._waiting.append(message)
            raise EventsLost(expected, number)
        if expected is None:
            self._expected = expected = number
        if number < expected:
            return
        if number > expected and self.replay_endpoint is not None:
            self._catch_up()
        if not self._waiting or self._waiting[-1][0] < number:
            self._waiting.append(message)

    def _deliver(self) -> NumberedBatch:
        number, payload = self._waiting[0]
        expected = self._expected
        if expected is not None and number > expected:
            self._expected = number
            raise EventsLost(expected, number)
        self._waiting.popleft()
        # Before decoding: a batch that cannot be read is not tried again.
        self._expected = number + 1
        try:
            return NumberedBatch(number, self._decoder.decode(payload))
        except msgspec.DecodeError as error:
            raise EventsError(f"batch {number} cannot be decoded: {error}") from error

    def _catch_up(self) -> None:
        """Fetch everything from the expected number on."""
        zmq: Any = load_zmq()
        assert self.replay_endpoint is not None and self._expected is not None
        if self._replay is None:
            self._replay = self._context.socket(zmq.DEALER)
            # All of it must fit, however much is kept.
            self._replay.rcvhwm = 0
            self._connect(self._replay, self.replay_endpoint)
        replay = self._replay
        replay.send_multipart([b"", self._expected.to_bytes(NUMBER_BYTES, "big")])
        deadline = time.monotonic() + self.replay_timeout_s
        fetched: list[tuple[int, bytes]] = []
        while replay.poll(_milliseconds(deadline)):
            frames = replay.recv_multipart()
            if frames[-2:-1] == [END]:
                self._behind = False
                self._waiting.extend(fetched)
                return
            message = _parse(frames[1:])
            if message[0] >= self._expected:
                fetched.append(message)
        # Its answer may still come; a new socket will not take it for one to a later request.
        replay.close(linger=0)
        self._replay = None
        raise ReplayTimeout(
            f"{self.replay_endpoint} did not answer within {self.replay_timeout_s} s"
        )

    def _connect(self, socket: zmq.Socket[bytes], endpoint: str) -> None:
        zmq: Any = load_zmq()
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            raise EventsError(f"cannot connect to {endpoint!r}: {error}") from error


def _parse(frames: list[bytes]) -> tuple[int, bytes]:
    """Return number and payload of a message."""
    if len(frames) != 3 or len(frames[1]) != NUMBER_BYTES:
        sizes = [len(frame) for frame in frames]
        raise EventsError(
            f"expected a message of topic, {NUMBER_BYTES} bytes and batch, got frames of {sizes}"
        )
    return int.from_bytes(frames[1], "big"), frames[2]


def _milliseconds(deadline: float | None) -> int | None:
    """Return how long to poll until a deadline, None for ever."""
    return None if deadline is None else max(int(1000 * (deadline - time.monotonic())), 0)
