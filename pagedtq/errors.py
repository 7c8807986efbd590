"""Every error pagedtq raises on purpose, in one hierarchy.

A message says what was expected, what came, and where. Numbers in a message are also attributes,
so that a caller can act on them. An operation that raises has changed nothing.
"""

from __future__ import annotations

from typing import Any


class PagedTQError(Exception):
    """Base of all errors raised by pagedtq."""

    # Errors cross process borders; the default would call constructors that want numbers with
    # nothing but the finished text.
    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class ArgumentError(PagedTQError, ValueError):
    """An argument has the wrong value: shape, range, combination."""


class ArgumentTypeError(PagedTQError, TypeError):
    """An argument has the wrong type or dtype."""


class ConfigError(ArgumentError):
    """A configuration contradicts itself or asks for what does not exist."""


class UnsupportedError(ArgumentError):
    """The request is understood and deliberately not supported; the message names what is."""


class NonFiniteError(ArgumentError):
    """Keys, values or queries hold NaN or infinity."""


class OverflowingError(ArgumentError):
    """A value or a vector norm does not fit the type it would be stored in."""


class NotUnitNormError(ArgumentError):
    """A codec in strict unit-norm mode received a vector whose norm is not 1.

    Attributes
    ----------
    norm : float
        The norm that came.
    """

    def __init__(self, message: str, norm: float) -> None:
        super().__init__(message)
        self.norm = norm


class TokenRangeError(ArgumentError):
    """A token id does not fit int32.

    Attributes
    ----------
    token, index : int
        The token, and its place among those given.
    """

    def __init__(self, message: str, token: int, index: int) -> None:
        super().__init__(message)
        self.token, self.index = token, index


class SlotError(ArgumentError):
    """A slot lies outside the pool, appears twice in one mapping, or its page has no owner."""


class UnknownSequence(ArgumentError, KeyError):
    """A sequence id was never opened here, is already closed, or belongs to another cache."""

    # KeyError.__str__ shows the repr of its argument; the message must stay readable.
    def __str__(self) -> str:
        return Exception.__str__(self)


class RequestError(ArgumentError):
    """A scheduler cannot take a request as it is.

    Attributes
    ----------
    request_id : str
        The request.
    """

    def __init__(self, request_id: str, problem: str) -> None:
        super().__init__(f"request {request_id!r}: {problem}")
        self.request_id = request_id


class RequestTooLarge(RequestError):
    """A request that needs more than there is, even alone.

    Attributes
    ----------
    need, total : int
        Units it needs by itself, and units there are.
    """

    def __init__(self, request_id: str, need: int, total: int, unit: str, remedy: str) -> None:
        super().__init__(request_id, f"needs {need} {unit} by itself, there are {total}; {remedy}")
        self.need, self.total = need, total


class UnknownRequest(RequestError, KeyError):
    """A request is not waiting or running here."""

    __str__ = Exception.__str__


class EvictedError(ArgumentError):
    """The operation needs positions whose pages were evicted."""


class SwappedError(ArgumentError):
    """The operation needs a sequence that is swapped out to the host; swap it in first."""


class StepError(PagedTQError, RuntimeError):
    """The call does not fit the state of the open step (or there is none)."""


class ConcurrentCallError(PagedTQError, RuntimeError):
    """Two calls met inside the same tables; the later one has changed nothing."""


class IntegrityError(PagedTQError, AssertionError):
    """``check_integrity()`` found a broken invariant: a defect of pagedtq or a foreign write."""


class BackendUnavailable(PagedTQError, ImportError):
    """The requested backend cannot run here; the message says what to install."""


class KernelCompileError(PagedTQError, RuntimeError):
    """A CUDA kernel does not compile; the message names the specialisation and holds the log."""


class CapacityError(PagedTQError):
    """A pool cannot serve a request; nothing was taken.

    Attributes
    ----------
    need, free, total : int
        Units asked for, free now, and managed in all.
    """

    unit = "units"
    remedy = "close sequences"

    def __init__(self, need: int, free: int, total: int) -> None:
        super().__init__(f"need {need} {self.unit}, {free} free of {total}; {self.remedy}")
        self.need = need
        self.free = free
        self.total = total


class OutOfPages(CapacityError):
    """The page pool cannot serve a request."""

    unit = "pages"
    remedy = "evict, close sequences or raise num_pages"


class OutOfEvictablePages(CapacityError):
    """Too few pages may be evicted; ``free`` counts those that may, ``total`` those in use."""

    unit = "evictable pages"
    remedy = "name more sequences, protect fewer tokens, unpin pages or close sequences"

    def __init__(self, need: int, free: int, total: int) -> None:
        super().__init__(need, free, total)
        self.args = (f"need {need} {self.unit}, found {free} of {total} in use; {self.remedy}",)


class PinLimit(CapacityError):
    """More pages would be pinned than may be; ``free`` counts those that still may."""

    unit = "pins"
    remedy = "unpin pages or raise max_pinned_share"


class OutOfWindowSlots(CapacityError):
    """No window slot is left for a sequence that must write its exact window."""

    unit = "window slots"
    remedy = "close sequences or raise num_window_slots"


class OutOfTokens(CapacityError):
    """A sequence would become longer than it was said to be."""

    unit = "tokens"
    remedy = "make the cache with a larger max_tokens, or with none so that it grows"


class OutOfHostPages(CapacityError):
    """The host tier cannot take the pages of a swap."""

    unit = "host pages"
    remedy = "swap in or close swapped sequences, preempt by recompute, or raise num_host_pages"


class EventsError(PagedTQError):
    """Events cannot be published or received: an endpoint, a message, or a closed end."""


class EventsLost(EventsError):
    """Batches of events are missing for good; what was built from events must be built anew.

    Attributes
    ----------
    expected, received : int
        Sequence numbers: of the next batch, and of the one that came instead. A lower one means
        that the publisher began anew.
    """

    def __init__(self, expected: int, received: int) -> None:
        if received > expected:
            problem = f"batches {expected} to {received - 1} are lost and kept no longer"
        else:
            problem = f"the publisher began anew: expected batch {expected}, got {received}"
        super().__init__(f"{problem}; build anew what was built from events")
        self.expected = expected
        self.received = received


class ReplayTimeout(EventsError, TimeoutError):
    """A request for past batches of events found no answer in time."""


class WorkloadError(ArgumentError):
    """A trace file holds a malformed row.

    Attributes
    ----------
    path : str
        The file.
    line : int
        The 1-based line of the row.
    """

    def __init__(self, path: str, line: int, problem: str) -> None:
        super().__init__(f"{path}:{line}: {problem}")
        self.path = path
        self.line = line


class WireError(PagedTQError, ValueError):
    """A snapshot or a transfer cannot be read; nothing was loaded.

    Attributes
    ----------
    field : str
        The part of the format that is wrong.
    offset : int
        Byte of the file or stream where that part begins.
    """

    def __init__(self, field: str, offset: int, problem: str) -> None:
        super().__init__(f"{field} at byte {offset}: {problem}")
        self.field = field
        self.offset = offset


class WireTruncated(WireError):
    """The file or stream ends inside a field."""


class WireChecksum(WireError):
    """Bytes are not those that were written: a checksum does not match."""


class WireVersion(WireError):
    """Not a file of this format, or one of a version that is not known here."""


class WireMismatch(WireError):
    """The bytes belong to a cache of another configuration, codec or layout."""


class WireMalformed(WireError):
    """Fields contradict each other, although their checksums match."""


def _rebuild(
    kind: type[PagedTQError], args: tuple[Any, ...], attributes: dict[str, Any]
) -> PagedTQError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(attributes)
    return error
