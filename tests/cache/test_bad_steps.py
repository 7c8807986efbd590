"""What a step refuses while it is open, and what needs one."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq import KeepFirstLast
from pagedtq.errors import NonFiniteError, OverflowingError, StepError
from tests.cache.bad_input import BAD, KIND, Z, cases, named, refuses

NO_STEP = cases(
    "window",
    ("a store without a step", StepError, "begin_step", lambda s: s.cache.store(0, *s.layer_0)),
    ("a commit without a step", StepError, "begin_step", lambda s: s.cache.commit()),
    ("an abort without a step", StepError, "begin_step", lambda s: s.cache.abort_step()),
)
IN_STEP = cases(
    "window",
    ("an append", StepError, "open step", lambda s: s.append(to=s.empty)),
    ("another step", StepError, "a step is open", lambda s: s.cache.begin_step(s.empty)),
    ("a fork", StepError, "a step is open", lambda s: s.cache.fork(s.long)),
    ("a fork of another", StepError, "a step is open", lambda s: s.cache.fork(s.twin)),
    ("an eviction", StepError, "a step is open", lambda s: s.cache.evict(s.long, [0])),
    ("a policy", StepError, "open", lambda s: s.cache.evict(s.long, KeepFirstLast(1, 1))),
    ("a truncation", StepError, "a step is open", lambda s: s.cache.truncate(s.long, 3)),
    ("a close", StepError, "a step is open", lambda s: s.cache.close(s.long)),
    ("a close of another", StepError, "a step is open", lambda s: s.cache.close(s.empty)),
    ("a boundary", StepError, "open", lambda s: s.cache.tables.set_start(s.twin, 0, 0)),
    ("a layer twice", StepError, "already stored", lambda s: s.cache.store(1, *s.layer_0)),
    ("a commit too early", StepError, "layers [0] are not", lambda s: s.cache.commit()),
    (
        "fewer tokens",
        BAD,
        "the step has 4 tokens, got 3",
        lambda s: s.cache.store(0, s.layer_0[0][:3], s.layer_0[1][:3]),
    ),
    ("no tokens", BAD, "has 4 tokens", lambda s: s.cache.store(0, *(a[:0] for a in s.layer_0))),
    ("all layers at once", BAD, "keys must have", lambda s: s.cache.store(0, *s.tokens(4))),
    ("NaN in the last value", NonFiniteError, "(3, 1, 15)", lambda s: s.store_spoiled(np.nan)),
    ("infinity in the last key", NonFiniteError, "keys", lambda s: s.store_spoiled(np.inf, 0)),
    ("overflow", OverflowingError, "f16", lambda s: s.store_spoiled(1e5)),
    ("a norm too large", OverflowingError, "32752", lambda s: s.store_spoiled(5e4)),
    ("float64", KIND, "float64", lambda s: s.cache.store(0, *(a.astype("f8") for a in s.layer_0))),
    ("lists", KIND, "list", lambda s: s.cache.store(0, *(a.tolist() for a in s.layer_0))),
    ("layer 2 of 2", BAD, "layer must be in [0, 1]", lambda s: s.cache.store(2, *s.layer_0)),
    ("layer -1", BAD, "layer must be in [0, 1]", lambda s: s.cache.store(-1, *s.layer_0)),
    ("layer 0.0", KIND, "layer", lambda s: s.cache.store(0.0, *s.layer_0)),
    ("layer False", KIND, "layer", lambda s: s.cache.store(False, *s.layer_0)),
    ("layer [0]", KIND, "layer", lambda s: s.cache.store([0], *s.layer_0)),
    ("reading a layer not stored", StepError, "layer 0 is not stored", lambda s: s.attend()),
    ("scoring it", StepError, "layer 0", lambda s: s.cache.score(0, s.queries(), s.long)),
    ("loading it", StepError, "layer 0", lambda s: s.cache.load(0, s.short)),
    in_step=True,
)
IN_STEP += cases(
    "plain",
    (
        "an eviction, without a window",
        StepError,
        "open",
        lambda s: s.cache.evict(s.long, [0]),
    ),
    (
        "fewer tokens, without a window",
        BAD,
        "4 tokens",
        lambda s: s.cache.store(0, *Z((2, 3, 2, 16), "f")),
    ),
    ("NaN, without a window", NonFiniteError, "values", lambda s: s.store_spoiled(np.nan)),
    in_step=True,
)


@pytest.mark.parametrize("case", [*NO_STEP, *IN_STEP], ids=named)
def test_what_a_step_does_not_allow_is_refused_by_type_and_changes_nothing(case):
    refuses(case)
