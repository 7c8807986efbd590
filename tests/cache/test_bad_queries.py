"""Queries and options of reading that are refused."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import NonFiniteError, UnknownSequence, UnsupportedError
from tests.cache.bad_input import BAD, KIND, Z, cases, named, refuses

QUERIES = cases(
    "window",
    ("3 query heads", BAD, "multiple of 2 heads", lambda s: s.attend(s.queries(heads=3))),
    ("no query heads", BAD, "multiple of 2 heads", lambda s: s.attend(s.queries(heads=0))),
    ("queries of another dim", BAD, "queries must have", lambda s: s.attend(s.queries(dim=8))),
    ("queries in two dimensions", BAD, "queries must have", lambda s: s.attend(s.queries()[0])),
    ("two queries for one sequence", BAD, "queries must have", lambda s: s.attend(s.queries(2))),
    ("float64 queries", KIND, "float64", lambda s: s.attend(s.queries(dtype="f8"))),
    ("integer queries", KIND, "int32", lambda s: s.attend(s.queries(dtype="i4"))),
    ("uint16 queries", KIND, "uint16", lambda s: s.attend(s.queries(dtype="u2"))),
    ("swapped bytes", KIND, "byte order", lambda s: s.attend(s.queries(dtype=">f2"))),
    ("a list of queries", KIND, "list", lambda s: s.attend(s.queries().tolist())),
    ("NaN in a query", NonFiniteError, "(0, 3, 15)", lambda s: s.attend(s.spoiled_queries(np.nan))),
    ("infinity in a query", NonFiniteError, "inf", lambda s: s.attend(s.spoiled_queries(np.inf))),
    ("a group of 65", UnsupportedError, "1 to 64", lambda s: s.attend(s.queries(heads=130))),
    (
        "more queries than tokens",
        BAD,
        "3 tokens",
        lambda s: s.attend(s.queries(4), s.short, q_lens=[4]),
    ),
    ("a query of an empty one", BAD, "0 tokens", lambda s: s.attend(ids=s.empty, q_lens=[1])),
    ("q_lens that do not add up", BAD, "queries must have", lambda s: s.attend(q_lens=[2])),
    ("q_lens of floats", KIND, "q_lens", lambda s: s.attend(q_lens=[1.0])),
    ("q_lens of bools", KIND, "q_lens", lambda s: s.attend(q_lens=[True])),
    ("ragged q_lens", KIND, "q_lens", lambda s: s.attend(q_lens=[[1], [1, 2]])),
    ("too many q_lens", BAD, "q_lens", lambda s: s.attend(q_lens=[1, 0])),
    ("a negative q_len", BAD, "q_lens", lambda s: s.attend(ids=[s.long, s.short], q_lens=[2, -1])),
    ("one number as q_lens", KIND, "q_lens", lambda s: s.attend(q_lens=1)),
    ("sm_scale NaN", BAD, "sm_scale must be finite", lambda s: s.attend(sm_scale=np.nan)),
    ("sm_scale infinite", BAD, "sm_scale", lambda s: s.attend(sm_scale=np.inf)),
    ("sm_scale a bool", KIND, "sm_scale must be a number", lambda s: s.attend(sm_scale=True)),
    ("soft_cap a bool", KIND, "soft_cap must be a number", lambda s: s.attend(soft_cap=True)),
    ("sm_scale a string", KIND, "sm_scale", lambda s: s.attend(sm_scale="1")),
    ("sm_scale an array", KIND, "sm_scale", lambda s: s.attend(sm_scale=np.ones(4))),
    ("soft_cap 0", BAD, "soft_cap must be positive", lambda s: s.attend(soft_cap=0.0)),
    ("soft_cap negative", BAD, "soft_cap", lambda s: s.attend(soft_cap=-30.0)),
    ("soft_cap NaN", BAD, "soft_cap", lambda s: s.attend(soft_cap=np.nan)),
    ("soft_cap a string", KIND, "soft_cap", lambda s: s.attend(soft_cap="30")),
    ("window_left negative", BAD, "window_left", lambda s: s.attend(window_left=-1)),
    ("window_left a float", KIND, "window_left", lambda s: s.attend(window_left=7.0)),
    ("3 sink logits for 4 heads", BAD, "sink_logits", lambda s: s.attend(sink_logits=Z(3, "f"))),
    ("a list of sink logits", KIND, "sink_logits", lambda s: s.attend(sink_logits=[0.0] * 4)),
    ("sink logits of integers", KIND, "sink_logits", lambda s: s.attend(sink_logits=Z(4, "i4"))),
    (
        "NaN as sink logit",
        NonFiniteError,
        "sink",
        lambda s: s.attend(sink_logits=np.full(4, np.nan)),
    ),
    ("keys without values", BAD, "come together", lambda s: s.attend(keys=s.layer_0[0][:1])),
    ("values without keys", BAD, "come together", lambda s: s.attend(values=s.layer_0[0][:1])),
    (
        "a chunk of more tokens than queries",
        BAD,
        "one row per query token",
        lambda s: s.attend(keys=s.layer_0[0], values=s.layer_0[1]),
    ),
    (
        "NaN in the chunk",
        NonFiniteError,
        "values",
        lambda s: s.attend(keys=s.layer_0[0][:1], values=np.full((1, 2, 16), np.nan, "f")),
    ),
    (
        "a chunk whose values have another dim",
        UnsupportedError,
        "v_head_dim",
        lambda s: s.attend(keys=s.layer_0[0][:1], values=Z((1, 2, 8), "f")),
    ),
    (
        "ALiBi",
        UnsupportedError,
        "ALiBi is not supported",
        lambda s: s.attend(alibi_slopes=np.ones(4, "f")),
    ),
    ("attending in layer 2", BAD, "layer must be in [0, 1]", lambda s: s.attend(layer=2)),
    ("attending in layer -1", BAD, "layer must be in [0, 1]", lambda s: s.attend(layer=-1)),
    ("attending in no layer", KIND, "layer", lambda s: s.attend(layer=None)),
    ("attending over a closed one", UnknownSequence, "open", lambda s: s.attend(ids=s.closed)),
    (
        "attending over two caches",
        UnknownSequence,
        "another",
        lambda s: s.attend(s.queries(2), [s.long, s.foreign]),
    ),
    ("scoring two queries", BAD, "queries", lambda s: s.cache.score(0, s.queries(2), s.long)),
    (
        "scoring NaN",
        NonFiniteError,
        "queries",
        lambda s: s.cache.score(0, s.spoiled_queries(np.nan), s.long),
    ),
    ("scoring in layer -2", BAD, "layer", lambda s: s.cache.score(-2, s.queries(), s.long)),
    (
        "scoring a foreign one",
        UnknownSequence,
        "open",
        lambda s: s.cache.score(0, s.queries(), s.foreign),
    ),
    (
        "codes of what only the ring holds",
        BAD,
        "positions [80, 85) are in the exact window only",
        lambda s: s.cache.load(0, s.long, exact=False),
    ),
    ("loading layer 2", BAD, "layer must be in", lambda s: s.cache.load(2, s.long)),
    ("loading layer -1", BAD, "layer must be in", lambda s: s.cache.load(-1, s.long)),
    ("loading layer '0'", KIND, "layer", lambda s: s.cache.load("0", s.long)),
    ("loading a closed one", UnknownSequence, "open", lambda s: s.cache.load(0, s.closed)),
    ("loading two", KIND, "seq_id", lambda s: s.cache.load(0, [s.long, s.short])),
)
QUERIES += cases(
    "plain",
    (
        "ALiBi, without a window",
        UnsupportedError,
        "ALiBi",
        lambda s: s.attend(alibi_slopes=Z(4, "f")),
    ),
    ("3 sink logits, without a window", BAD, "sink", lambda s: s.attend(sink_logits=Z(3, "f"))),
    (
        "float64 queries, without a window",
        KIND,
        "float64",
        lambda s: s.attend(s.queries(dtype="f8")),
    ),
)
QUERIES += cases(
    "mixed",
    ("the window of a layer without", BAD, "no exact window", lambda s: s.cache.backend.window(0)),
)


@pytest.mark.parametrize("case", QUERIES, ids=named)
def test_bad_queries_are_refused_by_type_and_change_nothing(case):
    refuses(case)
