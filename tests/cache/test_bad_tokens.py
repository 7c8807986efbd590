"""Keys and values that are refused: by shape, by type, by content."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq.errors import NonFiniteError, NotUnitNormError, OverflowingError, UnsupportedError
from tests.cache.bad_input import BAD, KIND, SCENES, Scene, Z, cases, named, refuses

TOKENS = cases(
    "window",
    ("keys without layers", BAD, "keys must have shape [2,", lambda s: s.append(s.layer_0[0])),
    ("one layer only", BAD, "keys must have shape [2,", lambda s: s.append(s.tokens(2)[0][:1])),
    (
        "values of 3 layers",
        BAD,
        "values must have",
        lambda s: s.append(values=Z((3, 2, 2, 16), "f")),
    ),
    ("another number of heads", BAD, "KV heads", lambda s: s.append(Z((2, 2, 3, 16), "f"))),
    (
        "values with fewer heads",
        BAD,
        "values must",
        lambda s: s.append(values=Z((2, 2, 1, 16), "f")),
    ),
    ("another head_dim", BAD, "head_dim", lambda s: s.append(Z((2, 2, 2, 8), "f"))),
    (
        "values of another head_dim",
        UnsupportedError,
        "v_head_dim != head_dim is not supported",
        lambda s: s.append(values=Z((2, 2, 2, 8), "f")),
    ),
    (
        "fewer values",
        BAD,
        "values must have shape [2,",
        lambda s: s.append(values=Z((2, 1, 2, 16), "f")),
    ),
    ("float64", KIND, "float64", lambda s: s.append(Z((2, 2, 2, 16)))),
    ("float64 values", KIND, "values must be f32", lambda s: s.append(values=Z((2, 2, 2, 16)))),
    ("int8", KIND, "int8", lambda s: s.append(Z((2, 2, 2, 16), np.int8))),
    ("complex", KIND, "complex64", lambda s: s.append(Z((2, 2, 2, 16), np.complex64))),
    ("lists", KIND, "list", lambda s: s.append(s.tokens(2)[0].tolist())),
    ("lists of values", KIND, "list", lambda s: s.append(values=s.tokens(2)[1].tolist())),
    ("a number", KIND, "int", lambda s: s.append(1)),
    ("uint16 of no declared type", KIND, "uint16", lambda s: s.append(Z((2, 2, 2, 16), np.uint16))),
    ("not the declared type", KIND, "must be f16", lambda s: s.append(dtype="f16")),
    ("a type that does not exist", KIND, "must be f8", lambda s: s.append(dtype="f8")),
    (
        "keys and values of two types",
        KIND,
        "values must be f32",
        lambda s: s.append(values=Z((2, 2, 2, 16), np.float16)),
    ),
    (
        "float16 in the other byte order",
        KIND,
        "byte order",
        lambda s: s.append(*(a.astype(">f2") for a in s.tokens(2))),
    ),
    (
        "float32 in the other byte order",
        KIND,
        "byte order",
        lambda s: s.append(*(a.astype(">f4") for a in s.tokens(2))),
    ),
    (
        "NaN in the last key",
        NonFiniteError,
        "(1, 1, 15)",
        lambda s: s.append(**s.spoiled(np.nan, 0)),
    ),
    ("NaN in the last value", NonFiniteError, "values", lambda s: s.append(**s.spoiled(np.nan))),
    ("infinity", NonFiniteError, "inf", lambda s: s.append(**s.spoiled(np.inf))),
    ("minus infinity", NonFiniteError, "-inf", lambda s: s.append(**s.spoiled(-np.inf, 0))),
    (
        "NaN in float16",
        NonFiniteError,
        "nan",
        lambda s: s.append(**{k: a.astype("f2") for k, a in s.spoiled(np.nan).items()}),
    ),
    (
        "NaN in bfloat16 bits",
        NonFiniteError,
        "nan",
        lambda s: s.append(*[np.full((2, 2, 2, 16), 0x7FC1, np.uint16)] * 2, dtype="bf16"),
    ),
    ("overflow of f16", OverflowingError, "must fit f16", lambda s: s.append(**s.spoiled(65520.0))),
    ("negative overflow", OverflowingError, "f16", lambda s: s.append(**s.spoiled(-7e4, 0))),
    ("a norm too large", OverflowingError, "32752", lambda s: s.append(**s.spoiled(4e4, 0))),
    ("a value's norm too large", OverflowingError, "value", lambda s: s.append(**s.spoiled(-4e4))),
)
TOKENS += cases(
    "bf16",
    (
        "overflow of bf16",
        OverflowingError,
        "must fit bf16",
        lambda s: s.append(**s.spoiled(3.4e38)),
    ),
    (
        "a norm too large in bf16",
        OverflowingError,
        "32752",
        lambda s: s.append(**s.spoiled(32800.0)),
    ),
)
TOKENS += cases(
    "f32",
    (
        "a norm too large in f32",
        OverflowingError,
        "32752",
        lambda s: s.append(**s.spoiled(1e30, 0)),
    ),
    (
        "a norm too large of small elements",
        OverflowingError,
        "32752",
        lambda s: s.append(np.full((2, 2, 2, 16), 9000, "f")),
    ),
)
TOKENS += cases(
    "exact16",
    (
        "overflow of exact f16 pages",
        OverflowingError,
        "f16",
        lambda s: s.append(**s.spoiled(65520.0)),
    ),
    (
        "overflow of exact f16 keys",
        OverflowingError,
        "f16",
        lambda s: s.append(**s.spoiled(-1e9, 0)),
    ),
)
TOKENS += cases(
    "exact keys",
    # 65504 fits f16, but as a bfloat16 it is 65536.
    (
        "overflow after rounding",
        OverflowingError,
        "f16",
        lambda s: s.append(**s.spoiled(65504.0, 0)),
    ),
)
TOKENS += cases(
    "unit",
    ("a key of norm 2", NotUnitNormError, "norm 1", lambda s: s.append(2 * s.tokens(2)[0])),
    ("a zero key", NotUnitNormError, "norm 1", lambda s: s.append(Z((2, 2, 2, 16), "f"))),
    (
        "the last key not of norm 1",
        NotUnitNormError,
        "head 1",
        lambda s: s.append(**s.spoiled(0.9, 0)),
    ),
)


@pytest.mark.parametrize("case", TOKENS, ids=named)
def test_bad_tokens_are_refused_by_type_and_change_nothing(case):
    refuses(case)


@pytest.mark.parametrize("kind", SCENES)
def test_the_scene_itself_accepts_good_input(kind):
    for in_step in (False, True):
        scene = Scene(kind, in_step)
        scene.attend(layer=1)
        if in_step:
            scene.cache.store(0, *scene.layer_0)
            scene.cache.commit()
        scene.append()
        scene.attend()
        assert scene.cache.stats().pages_free <= 5
