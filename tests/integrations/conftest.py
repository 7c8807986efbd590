"""Tests of models need the transformers extra; the models are made here, nothing is downloaded."""

from __future__ import annotations

import pytest

from tests.model_libraries import MISSING

collect_ignore_glob = ["test_transformers_*.py"] if MISSING else []


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    if not MISSING:
        import torch

        torch.set_num_threads(1)
