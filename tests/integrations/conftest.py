"""Tiny models with random weights, made from their configurations: nothing is downloaded."""

from __future__ import annotations

import importlib.util
import os

import pytest

#: Set in CI, where a missing library is a failure and not a skip.
REQUIRED = "PAGEDTQ_REQUIRE_TRANSFORMERS"

_MISSING = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
if _MISSING and os.environ.get(REQUIRED):
    raise RuntimeError(f"{REQUIRED} is set but {' and '.join(_MISSING)} cannot be imported")

collect_ignore_glob = ["test_transformers_*.py"] if _MISSING else []


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    if not _MISSING:
        import torch

        torch.set_num_threads(1)
