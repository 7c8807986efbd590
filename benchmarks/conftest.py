"""Micro-benchmarks write a receipt, too: into the file that ``--benchmark-json`` names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from pagedtq.telemetry import benchmark_receipt


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(
    config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]
) -> None:
    """Add the receipt of what ran."""
    rows = [
        {"what": entry["name"], "us best": entry["stats"]["min"] * 1e6}
        for entry in output_json["benchmarks"]
    ]
    receipt = benchmark_receipt(
        "micro_host",
        rows,
        command="pytest benchmarks/micro_host.py --benchmark-json FILE",
        inputs=[Path(__file__).with_name("micro_host.py").read_bytes()],
    )
    output_json["receipt"] = msgspec.to_builtins(receipt)
