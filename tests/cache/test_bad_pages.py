"""Slots and page ids that a backend refuses."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import NonFiniteError, SlotError
from tests.cache.bad_input import BAD, KIND, PAGES, P, Z, cases, named, refuses

SLOT_MAPPINGS = cases(
    "window",
    (
        "a slot beyond the pool",
        SlotError,
        "in [16, 191], got 192",
        lambda s: s.back_store([P * PAGES]),
    ),
    ("a slot of the null page", SlotError, "got 0", lambda s: s.back_store([-1, 0])),
    ("the last slot of the null page", SlotError, "got 15", lambda s: s.back_store([P - 1])),
    (
        "a slot twice",
        SlotError,
        "appears twice",
        lambda s: s.back_store([P * s.pages[0], P * s.pages[0] + 1, P * s.pages[0]]),
    ),
    (
        "a page without an owner",
        SlotError,
        "has no owner",
        lambda s: s.back_store([P * s.pages[0], P * s.free_page]),
    ),
    ("fewer slots than tokens", BAD, "2 entries", lambda s: s.back_store([P * s.pages[0]], 2)),
    ("slots that are floats", KIND, "slot", lambda s: s.back_store([16.0])),
    ("slots in two dimensions", BAD, "slot", lambda s: s.back_store(np.full((1, 1), 16), 1)),
    ("ragged slots", KIND, "slot", lambda s: s.back_store([[1], [2, 3]])),
    (
        "NaN beside good slots",
        NonFiniteError,
        "keys",
        lambda s: s.cache.backend.store(0, *np.full((2, 1, 2, 16), np.nan, "f"), [P * s.pages[0]]),
    ),
    (
        "storing into layer -1",
        BAD,
        "layer",
        lambda s: s.cache.backend.store(-1, *s.layer_0, [-1] * 4),
    ),
    ("reading a negative slot", SlotError, "got -1", lambda s: s.cache.backend.load(0, [-1])),
    ("reading the null page", SlotError, "got 3", lambda s: s.cache.backend.load(0, [3])),
    ("reading beyond the pool", SlotError, "got 999", lambda s: s.cache.backend.load(0, [999])),
    (
        "reading a free page",
        SlotError,
        "no owner",
        lambda s: s.cache.backend.load(0, [P * s.free_page]),
    ),
    ("reading layer 2", BAD, "layer", lambda s: s.cache.backend.load(2, [P * s.pages[0]])),
)

ONE, TWO = np.array([1]), np.array([1, 2])
WHOLE_PAGES = cases(
    "window",
    ("copying to the null page", BAD, "got 0", lambda s: s.cache.backend.copy_pages(ONE, ONE - 1)),
    ("copying beyond the pool", BAD, "got 12", lambda s: s.cache.backend.copy_pages(ONE, ONE + 11)),
    ("copying a negative page", BAD, "got -1", lambda s: s.cache.backend.copy_pages(-ONE, ONE)),
    ("copying two to one", BAD, "pair up", lambda s: s.cache.backend.copy_pages(TWO, ONE)),
    ("copying a list", BAD, "integer array", lambda s: s.cache.backend.copy_pages([1], ONE)),
    ("copying floats", BAD, "integer array", lambda s: s.cache.backend.copy_pages(ONE, ONE * 2.0)),
    ("gathering beyond the pool", BAD, "got 13", lambda s: s.cache.backend.gather(TWO * 13)),
    ("gathering the null page", BAD, "got 0", lambda s: s.cache.backend.gather(ONE - 1)),
    (
        "scattering slabs of a wrong size",
        BAD,
        "slabs must have shape",
        lambda s: s.cache.backend.scatter(Z((1, 7), "u1"), ONE),
    ),
    (
        "scattering too few slabs",
        BAD,
        "slabs",
        lambda s: s.cache.backend.scatter(s.cache.backend.gather(ONE), TWO),
    ),
    (
        "scattering slabs of floats",
        KIND,
        "slabs must be uint8",
        lambda s: s.cache.backend.scatter(Z((1, s.cache.backend.layout.page_bytes)), ONE),
    ),
    (
        "scattering beyond the pool",
        BAD,
        "got 13",
        lambda s: s.cache.backend.scatter(s.cache.backend.gather(TWO), TWO * 12 - 11),
    ),
    ("clearing the null page", BAD, "got 0", lambda s: s.cache.backend.clear_norms(ONE - 1)),
)


@pytest.mark.parametrize("case", [*SLOT_MAPPINGS, *WHOLE_PAGES], ids=named)
def test_bad_slots_and_pages_are_refused_by_type_and_change_nothing(case):
    refuses(case)
