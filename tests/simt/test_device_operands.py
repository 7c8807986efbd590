"""What lies on the device already: refused by shape, type and layout, or read as it lies."""

from __future__ import annotations

import numpy as np
import pytest
from harness_device import HarnessDevice

from pagedtq.errors import ArgumentError, ArgumentTypeError
from tests.parity.cases import HEADS, make_config
from tests.parity.twins import Twins


class Operands:
    """A sequence of 40 tokens on both sides, and good arguments on the device for calls on it."""

    def __init__(self) -> None:
        self.device = HarnessDevice()
        self.twins = Twins(make_config("k4v4", 64, 16, window=0, num_layers=1), self.device)
        self.twins.append([self.twins.open()], [40])
        tables, ids = self.twins.cuda.tables, self.twins.members([0], 1)
        self.backend = self.twins.cuda.backend
        self.table, self.reads = tables.block_table(ids), tables.reads(ids, False)
        self.keys, self.values = (self.up(part.astype(np.float16)) for part in self.twins.draw(3))
        self.slots = self.up(self.table[0, 2] * 16 + np.arange(8, 11))
        self.plan = self.backend.plan(1, 8)
        self.plan.update(self.table, self.reads)

    def up(self, array, dtype=None):
        return self.device.upload(np.ascontiguousarray(array, dtype))

    def attend(self, queries=None, out=None, lse=None, **options):
        queries = np.ones((1, 8, 64), np.float32) if queries is None else queries
        out = self.up(np.ones((1, 8, 64), np.float32)) if out is None else out
        lse = self.up(np.ones((1, 8), np.float32)) if lse is None else lse
        self.plan.attend(0, self.up(queries), 0.1, out=out, lse=lse, **options)

    def attend_paged(self, page):
        table = self.table.copy()
        table[0, 1] = page
        self.backend.attend(0, np.ones((1, 8, 64), np.float32), table, self.reads, 0.1)

    def store(self, keys=None, values=None, slots=None, dtype=None):
        keys = self.keys if keys is None else keys
        values = self.values if values is None else values
        self.backend.store(0, keys, values, self.slots if slots is None else slots, dtype)


HALVES, WIDE = np.zeros((1, 8, 64), np.float16), np.zeros((1, 8, 128), np.float32)
ONES = np.ones((3, HEADS, 64), np.float32)
INDICES = r"indices on the device must be int64\[n\], got "

#: What is passed, and how it is refused.
REFUSED = {
    "out of halves": (lambda o: o.attend(out=o.up(HALVES)), "out must be float32 on the device"),
    "out on the host": (lambda o: o.attend(out=WIDE[..., :64]), "out must be float32 on the dev"),
    "out of another shape": (
        lambda o: o.attend(out=o.up(WIDE)), r"out must have shape \[1, 8, 64\]"
    ),
    "out with gaps": (lambda o: o.attend(out=o.up(WIDE)[..., ::2]), "out must be contiguous"),
    "lse of doubles": (
        lambda o: o.attend(lse=o.up(WIDE[..., 0], float)), "lse must be float32 on the device"
    ),
    "lse on the host": (lambda o: o.attend(lse=WIDE[..., 0]), "lse must be float32 on the device"),
    "lse with gaps": (lambda o: o.attend(lse=o.up(WIDE)[..., 0]), "lse must be contiguous"),
    "sink logits of halves": (
        lambda o: o.attend(sink_logits=o.up(HALVES[0, :, 0])),
        "sink_logits on the device must be float32, got float16",
    ),
    "slots of 32 bits": (lambda o: o.store(slots=o.up(range(3), np.int32)), INDICES + "int32"),
    "too few slots": (
        lambda o: o.store(slots=o.slots[:2]), r"slot_mapping must have 3 entries, got shape \[2\]"
    ),
    "a column of slots": (
        lambda o: o.store(slots=o.slots[:, None]), r"must have 3 entries, got shape \[3, 1\]"
    ),
    "slots to load of 32 bits": (
        lambda o: o.backend.load(0, o.up(range(16, 19), np.int32)), INDICES + r"int32\[3\]"
    ),
    "a square of slots to load": (
        lambda o: o.backend.load(0, o.up(np.full((2, 2), 16))), INDICES + r"int64\[2, 2\]"
    ),
    "keys on the host": (lambda o: o.store(keys=ONES), "must both lie on the device or on"),
    "values on the host": (lambda o: o.store(values=ONES), "must both lie on the device or on"),
    "values of another type": (
        lambda o: o.store(values=o.up(ONES)), "values must be f16, got float32"
    ),
    "keys of another type than declared": (
        lambda o: o.store(dtype="bf16"), "keys must be bf16, got float16"
    ),
    "keys of doubles": (lambda o: o.store(keys=o.up(ONES, float)), "keys must be .*, got float64"),
    "keys of half the channels": (
        lambda o: o.store(keys=o.keys[..., :32]), r"keys must have shape \[any, 2, 64\]"
    ),
    "values of fewer tokens": (
        lambda o: o.store(values=o.values[:2]), r"values must have shape \[3, 2, 64\]"
    ),
    "a negative page in a table": (
        lambda o: o.attend_paged(-1), r"pages must be in \[0, 47\], got -1 in block_table"
    ),
    "a negative page to clear": (
        lambda o: o.backend.clear_norms(np.array([3, -1])), r"in \[1, 47\], got -1"
    ),
    "a negative page to copy from": (
        lambda o: o.backend.copy_pages(np.array([-1]), np.array([3])), r"in \[1, 47\], got -1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_runs(what):
    call, message = REFUSED[what]
    operands = Operands()
    before, launched = operands.device.download(operands.backend.pool), len(operands.device.log)
    with pytest.raises((ArgumentError, ArgumentTypeError), match=message):
        call(operands)
    assert np.array_equal(operands.device.download(operands.backend.pool), before)
    assert len(operands.device.log) == launched


def test_what_does_not_lie_side_by_side_is_read_as_it_lies():
    operands = Operands()
    up, twins, host = operands.up, operands.twins, operands.twins.host
    keys, values = operands.keys.view(np.ndarray), operands.values.view(np.ndarray)
    slots = operands.slots.view(np.ndarray)
    host.backend.store(0, keys, values, slots)
    # Every second token and slot, last first: distances that are not those of dense rows.
    reverse = up(np.repeat(keys, 2, axis=0))[::-2], up(np.repeat(values, 2, axis=0))[::-2]
    operands.store(*reverse, up(np.repeat(slots, 2))[::-2])
    twins.check_pages()
    # Of queries, heads that lie among others.
    queries = twins.queries(1, 8)
    want = host.attend(0, queries[:, ::2], twins.members([0], 0), sm_scale=0.1)
    got = operands.plan.attend(0, up(queries)[:, ::2], 0.1)
    twins.check_state(*map(twins.fetch, got), *want)
    loaded = operands.backend.load(0, up(np.repeat(slots, 2))[::-2])
    for ours, theirs in zip(loaded, host.backend.load(0, slots[::-1].copy())):
        np.testing.assert_allclose(twins.fetch(ours), theirs, rtol=0, atol=1e-5)
