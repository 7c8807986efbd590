"""Receipts: figures with their conditions, in a form another program can check."""

from __future__ import annotations

import ast

import msgspec
import numpy as np
import pytest

from benchmarks.report import publish
from pagedtq import __version__
from pagedtq.telemetry import BenchmarkReceipt, benchmark_receipt


def test_a_receipt_reads_back_as_itself():
    rows = [{"case": "k4v4", "ms": np.float32(1.5), "worst": float("nan"), "none": None}]
    receipt = benchmark_receipt("trial", rows, command="python -m benchmarks.trial", seed=7)
    assert receipt.rows == [{"case": "k4v4", "ms": 1.5, "worst": "nan", "none": None}]
    assert (receipt.schema, receipt.seed, receipt.versions["pagedtq"]) == (1, 7, __version__)
    assert receipt.versions["numpy"] == np.__version__
    assert receipt.machine.cores >= 1
    assert msgspec.json.decode(receipt.to_json(), type=BenchmarkReceipt) == receipt
    assert (
        "inputs_digest"
        in msgspec.json.schema(BenchmarkReceipt)["$defs"]["BenchmarkReceipt"]["required"]
    )


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"quick": True}, {"inputs": [b"ab"]}, {"inputs": [b"a", b"b"]}]
)
def test_other_inputs_have_another_digest(changes):
    base = {"name": "trial", "rows": [], "command": "x"}
    digests = {
        benchmark_receipt(**base, **options).inputs_digest
        for options in ({}, changes, {"inputs": [b"a"]})
    }
    assert len(digests) == 3
    assert benchmark_receipt(**base).inputs_digest in digests


def test_every_benchmark_publishes(root):
    frame = {"__init__", "conftest", "report", "tables", "figure_style"}
    frame |= {"micro_host", "small_decoder"}
    modules = {path.stem: path for path in (root / "benchmarks").glob("*.py")}
    assert frame < set(modules)
    for name in sorted(set(modules) - frame):
        called = {
            getattr(node.func, "id", getattr(node.func, "attr", None))
            for node in ast.walk(ast.parse(modules[name].read_text()))
            if isinstance(node, ast.Call)
        }
        assert {"arguments", "publish"} <= called, name


def test_what_is_published_is_a_receipt(tmp_path, capsys):
    path = publish("snapshot", [{"ms": 1.0}], json_path=tmp_path / "a.json", seed=3, quick=True)
    receipt = msgspec.json.decode(path.read_bytes(), type=BenchmarkReceipt)
    assert (receipt.name, receipt.rows, receipt.quick) == ("snapshot", [{"ms": 1.0}], True)
    nothing = benchmark_receipt("snapshot", [], command="", seed=3, quick=True)
    # The benchmark's own source is part of its inputs.
    assert receipt.inputs_digest != nothing.inputs_digest
    capsys.readouterr()
