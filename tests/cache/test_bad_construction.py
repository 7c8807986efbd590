"""Caches that are not made."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq import CacheConfig, PagedKVCache, TurboQuant
from pagedtq.errors import ArgumentTypeError, ConfigError, NonFiniteError
from tests.cache.bad_input import BAD, DIM, KIND, Z, cases, named, refuses
from tests.cache.bank import HEADS, LAYERS

MEANS = (LAYERS, HEADS, DIM)
CONSTRUCTION = cases(
    "window",
    ("a backend that is not", BAD, "auto, host or cuda", lambda s: PagedKVCache(s.config, "tpu")),
    (
        "a type to accumulate in",
        BAD,
        "float16",
        lambda s: PagedKVCache(s.config, accumulate="float16"),
    ),
    ("0 threads", BAD, "num_threads", lambda s: PagedKVCache(s.config, num_threads=0)),
    ("-1 threads", BAD, "num_threads", lambda s: PagedKVCache(s.config, num_threads=-1)),
    ("1.5 threads", KIND, "num_threads", lambda s: PagedKVCache(s.config, num_threads=1.5)),
    (
        "means of one layer",
        BAD,
        "key_means must have shape [2, 2, 16]",
        lambda s: PagedKVCache(s.config, key_means=Z(MEANS[1:], "f")),
    ),
    (
        "means of 3 heads",
        BAD,
        "means",
        lambda s: PagedKVCache(s.config, key_means=Z((2, 3, 16), "f")),
    ),
    (
        "NaN in the means",
        NonFiniteError,
        "key_means",
        lambda s: PagedKVCache(s.config, key_means=np.full(MEANS, np.nan, "f")),
    ),
    ("float64 means", KIND, "float64", lambda s: PagedKVCache(s.config, key_means=Z(MEANS))),
    (
        "a list of means",
        KIND,
        "means",
        lambda s: PagedKVCache(s.config, key_means=Z(MEANS).tolist()),
    ),
    (
        "a window of a page and a half",
        ConfigError,
        "multiple",
        lambda s: s.config.replace(window=24),
    ),
    ("a negative window", ConfigError, "window", lambda s: s.config.replace(window=-16)),
    ("more sinks than a page holds", ConfigError, "sinks", lambda s: s.config.replace(sinks=17)),
    (
        "a window without slots",
        ConfigError,
        "slots",
        lambda s: s.config.replace(num_window_slots=0),
    ),
    ("one page", ConfigError, "num_pages", lambda s: s.config.replace(num_pages=1)),
    (
        "Prod values",
        ConfigError,
        "prod",
        lambda s: s.config.replace(values=TurboQuant(estimator="prod")),
    ),
)


@pytest.mark.parametrize("case", CONSTRUCTION, ids=named)
def test_bad_options_of_a_cache_are_refused_by_type(case):
    refuses(case)


@pytest.mark.parametrize("config", [None, {}, "k4v4", CacheConfig])
def test_what_is_no_configuration_is_refused_by_type(config):
    with pytest.raises(ArgumentTypeError, match="config must be a CacheConfig"):
        PagedKVCache(config)
