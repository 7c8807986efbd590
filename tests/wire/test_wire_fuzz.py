"""Wrong bytes by the thousand: a typed error and an untouched cache, or a sound sequence.

``PAGEDTQ_FUZZ=100000 pytest tests/wire/test_wire_fuzz.py`` runs longer than the suite does, and
``python -m benchmarks.wire_fuzz`` looks for inputs by what they cover.
"""

from __future__ import annotations

import functools
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from wire_caches import (
    COUNTS,
    append,
    frozen,
    one_sequence,
    small_config,
    with_header,
    with_metadata,
)

from benchmarks.wire_fuzz import decoders_and_seeds, resealed
from pagedtq import PagedKVCache, TurboQuant
from pagedtq.errors import CapacityError, WireError
from pagedtq.wire import export_sequence, import_sequence
from pagedtq.wire.header import HEADER_BYTES

EXAMPLES = int(os.environ.get("PAGEDTQ_FUZZ", "1000"))

fuzzed = settings(
    max_examples=EXAMPLES,
    # A long run is for what has not been tried before.
    derandomize=EXAMPLES == 1000,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example],
)


@functools.cache
def streams():
    """Valid streams to start from: a ring only, pages and ring, no window."""
    found = []
    for config, tokens in (
        (small_config(), 5),
        (small_config(), 53),
        (small_config(window=0, values=TurboQuant(bits=3)), 20),
    ):
        cache, seq = one_sequence(config, tokens)
        found.append((config, b"".join(export_sequence(cache, seq))))
    return found


@functools.cache
def target(which):
    """A cache to import into, and what it looks like."""
    cache = PagedKVCache(streams()[which][0])
    seq = cache.open()
    append(cache, seq, 19, seed=7)
    return cache, frozen(cache)


def survive(which, data):
    """Import bytes: either a typed error and nothing changed, or a sound cache."""
    cache, before = target(which)
    try:
        seq = import_sequence(cache, [data])
    except (WireError, CapacityError) as error:
        if isinstance(error, WireError):
            assert error.field and 0 <= error.offset <= len(data)
        assert frozen(cache) == before
        return
    # Accepted: every operation on it must work, and leave no trace when it is closed.
    cache.check_integrity()
    if cache.length(seq) < 1000:
        append(cache, seq, 17)
        cache.load(0, seq)
        cache.truncate(seq, cache.length(seq) // 2)
        cache.check_integrity()
    cache.close(seq)
    cache.check_integrity()
    target.cache_clear()


@st.composite
def damage(draw):
    """Cut, repeat, overwrite, insert and flip a valid stream."""
    which = draw(st.integers(0, 2))
    data = bytearray(streams()[which][1])
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 80))
        kind = draw(st.sampled_from(["flip", "set", "cut", "repeat", "insert", "end"]))
        if kind == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set":
            data[at : at + 8] = draw(st.binary(min_size=1, max_size=8))
        elif kind == "cut":
            del data[at : at + length]
        elif kind == "repeat":
            data[at:at] = data[at : at + length]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=40))
        elif kind == "end":
            del data[at:]
    return which, bytes(data)


@given(damage())
@fuzzed
def test_damaged_streams_never_raise_anything_untyped(damaged):
    survive(*damaged)


@given(st.integers(0, 2), st.binary(max_size=400))
@fuzzed
def test_arbitrary_bytes_never_raise_anything_untyped(which, data):
    survive(which, data)


NUMBERS = st.one_of(st.integers(-3, 70), st.sampled_from([-(1 << 63), (1 << 63) - 1, 1 << 40]))
COUNT_NAMES = (*COUNTS, "version", "kind", "page_format")


@st.composite
def forgery(draw):
    """Change header and metadata, then make all their checksums right again."""
    which = draw(st.integers(0, 2))
    data = streams()[which][1]
    states_edits = draw(st.lists(st.tuples(st.integers(0, 6), NUMBERS), max_size=3))
    block_edits = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 6)), max_size=2))
    text_edits = draw(st.lists(st.tuples(st.integers(0, 500), st.integers(32, 126)), max_size=2))

    def change(text, states, blocks):
        for column, value in states_edits:
            states[0, column] = value
        for index, value in block_edits:
            if index < blocks.size:
                blocks[index] = value
        changed = bytearray(text)
        for at, byte in text_edits:
            changed[at % len(changed)] = byte
        return bytes(changed)

    data = with_metadata(data, change)
    fields = draw(
        st.dictionaries(st.sampled_from(COUNT_NAMES), st.integers(0, 1 << 63), max_size=2)
        | st.dictionaries(st.sampled_from(COUNT_NAMES), st.integers(0, 300), max_size=2)
    )
    limits = {"version": 0xFFFF, "kind": 0xFFFF, "page_format": 0xFFFFFFFF}
    fields = {name: value & limits.get(name, -1) for name, value in fields.items()}
    assert len(data) > HEADER_BYTES
    return which, with_header(data, **fields)


@given(forgery())
@fuzzed
def test_forged_fields_with_right_checksums_never_raise_anything_untyped(forged):
    survive(*forged)


def test_the_longer_run_begins_with_inputs_that_are_accepted(tmp_path):
    decoders, seeds = decoders_and_seeds(tmp_path)
    for decode, data in zip(decoders, seeds, strict=True):
        decode(data)
        assert resealed(data) == data
        # Damage behind a checksum is found by it, and by what it breaks when that is right again.
        damaged = with_header(data, total_bytes=len(data) - 1)
        broken = damaged[:170] + bytes([damaged[170] ^ 1]) + damaged[171:]
        sealed = resealed(broken)
        assert sealed[:HEADER_BYTES] == damaged[:HEADER_BYTES]
        for wrong, fields in ((broken, {"header"}), (sealed, {"total_bytes", "end"})):
            with pytest.raises(WireError) as caught:
                decode(wrong)
            assert caught.value.field in fields
