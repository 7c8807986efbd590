"""Tests of whole models need the transformers extra; formats do not."""

from tests.integrations.conftest import _MISSING

collect_ignore_glob = ["test_model_*.py"] if _MISSING else []
