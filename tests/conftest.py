"""Shared fixtures: reproducible Hypothesis runs, plots without a display, the public traces."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports matplotlib: a test must never open a window.
os.environ["MPLBACKEND"] = "Agg"
# The suite is about the host wherever it does not say otherwise, on machines with a GPU too.
os.environ["PAGEDTQ_BACKEND"] = "host"

# Claims that several test modules import explain their failures too.
pytest.register_assert_rewrite(
    *(f"tests.parity.{name}" for name in ("captures", "claims", "operands", "poison", "twins"))
)

settings.register_profile(
    "pagedtq",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("pagedtq")

ROOT = Path(__file__).parents[1]

#: Where public request traces lie if fetched; see docs/workloads-and-simulation.md.
TRACES = Path(os.environ.get("PAGEDTQ_TRACES", ROOT.parent / "shared" / "traces"))


def _trace(name: str) -> Path:
    path = TRACES / name
    if not path.is_file():
        pytest.skip(f"trace {name} is not in {TRACES} (set PAGEDTQ_TRACES to its folder)")
    return path


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def azure_conversation() -> Path:
    """Azure LLM inference trace 2023, conversation hour (CC-BY-4.0): 19 366 requests."""
    return _trace("AzureLLMInferenceTrace_conv_2023.csv")


@pytest.fixture(scope="session")
def mooncake_conversation() -> Path:
    """Mooncake conversation trace, FAST '25 release (Apache-2.0): 12 031 requests."""
    return _trace("mooncake_conversation_trace.jsonl")
