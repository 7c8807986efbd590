"""The error hierarchy: what a caller may catch, read and send to another process."""

from __future__ import annotations

import copy
import pickle

import pytest

from pagedtq import errors
from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    BackendUnavailable,
    CapacityError,
    ConfigError,
    EventsError,
    EventsLost,
    EvictedError,
    IntegrityError,
    KernelCompileError,
    NonFiniteError,
    NotUnitNormError,
    OutOfPages,
    OutOfWindowSlots,
    OverflowingError,
    PagedTQError,
    ReplayTimeout,
    RequestError,
    RequestTooLarge,
    SlotError,
    StepError,
    TokenRangeError,
    UnknownRequest,
    UnknownSequence,
    UnsupportedError,
    WireChecksum,
    WireError,
    WireTruncated,
    WorkloadError,
)

ALL = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, PagedTQError)
]

SAMPLES = [
    ConfigError("sinks must be in [0, 64], got 65"),
    UnknownSequence("sequence 7 is not open here"),
    KernelCompileError("attend.cu [HEAD_DIM=128] does not compile for sm_90"),
    NotUnitNormError("expected norm 1, got 1.5 in token 3", 1.5),
    TokenRangeError("token_ids must fit int32, got 2147483648 at 3", 1 << 31, 3),
    BackendUnavailable("backend 'cuda' needs CuPy"),
    OutOfPages(12, 3, 1024),
    OutOfWindowSlots(1, 0, 64),
    RequestTooLarge("chat-7", 12, 10, "pages", "raise num_pages"),
    UnknownRequest("chat-7", "is not here"),
    WorkloadError("trace.csv", 17, "expected 3 columns, got 2"),
    EventsLost(3, 7),
    ReplayTimeout("tcp://127.0.0.1:5557 did not answer within 5.0 s"),
    WireChecksum("page 3", 640, "CRC32 is 0000beef, its footer says 0000dead"),
]


@pytest.mark.parametrize("kind", ALL)
def test_every_error_is_caught_by_the_base_and_documented(kind):
    assert issubclass(kind, PagedTQError)
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (ArgumentError, ValueError),
        (ConfigError, ValueError),
        (UnsupportedError, ValueError),
        (NonFiniteError, ValueError),
        (OverflowingError, ValueError),
        (NotUnitNormError, ValueError),
        (TokenRangeError, ValueError),
        (SlotError, ValueError),
        (EvictedError, ValueError),
        (WorkloadError, ValueError),
        (WireError, ValueError),
        (WireTruncated, WireError),
        (UnknownSequence, KeyError),
        (RequestError, ValueError),
        (UnknownRequest, KeyError),
        (ArgumentTypeError, TypeError),
        (StepError, RuntimeError),
        (IntegrityError, AssertionError),
        (EventsLost, EventsError),
        (ReplayTimeout, TimeoutError),
        (BackendUnavailable, ImportError),
    ],
)
def test_error_is_also_the_builtin_a_caller_expects(kind, builtin):
    assert issubclass(kind, builtin)


def test_running_out_of_capacity_is_no_argument_error():
    assert issubclass(OutOfPages, CapacityError)
    assert issubclass(OutOfWindowSlots, CapacityError)
    assert not issubclass(CapacityError, ArgumentError)


def test_capacity_errors_carry_their_numbers_and_say_what_helps():
    error = OutOfPages(12, 3, 1024)
    assert (error.need, error.free, error.total) == (12, 3, 1024)
    expected = "need 12 pages, 3 free of 1024; evict, close sequences or raise num_pages"
    assert str(error) == expected
    expected = "need 1 window slots, 0 free of 64; close sequences or raise num_window_slots"
    assert str(OutOfWindowSlots(1, 0, 64)) == expected


def test_workload_error_reads_like_a_compiler_message():
    error = WorkloadError("trace.csv", 17, "expected 3 columns, got 2")
    assert str(error) == "trace.csv:17: expected 3 columns, got 2"
    assert (error.path, error.line) == ("trace.csv", 17)


def test_wire_error_says_which_field_and_where():
    error = WireTruncated("page 3", 640, "expected 136 bytes, 7 are left")
    assert str(error) == "page 3 at byte 640: expected 136 bytes, 7 are left"
    assert (error.field, error.offset) == ("page 3", 640)


def test_unknown_sequence_prints_its_message_without_quotes():
    assert str(UnknownSequence("sequence 7 is not open here")) == "sequence 7 is not open here"


@pytest.mark.parametrize("error", SAMPLES, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("clone", [lambda e: pickle.loads(pickle.dumps(e)), copy.copy])
def test_error_survives_pickling_with_text_and_attributes(error, clone):
    twin = clone(error)
    assert type(twin) is type(error)
    assert str(twin) == str(error)
    assert vars(twin) == vars(error)
