"""Tests of whole models need the transformers extra; formats do not."""

from tests.model_libraries import MISSING

collect_ignore_glob = ["test_model_*.py"] if MISSING else []
