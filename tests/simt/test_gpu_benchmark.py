"""The GPU benchmark's stages, run on the CPU over the kernels' own source."""

from __future__ import annotations

import pytest
from harness_device import HarnessDevice

from benchmarks.gpu import attend_stage, correctness_stage, operation_stage, step_stage
from benchmarks.gpu.baselines import PLAIN
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.ceilings import ceilings
from benchmarks.gpu.device_timing import TrialMeter
from benchmarks.gpu.workloads import Workload

# Kernels of these are compiled for other tests already.
SMALL = Workload("attend", "k4v4", 2, 40, dim=64, page=16, heads=2)


class Launches(HarnessDevice):
    """A device whose graphs are counted, and that copies as CuPy does."""

    graphs = 0

    def capture(self):
        self.graphs += 1
        return super().capture()


@pytest.fixture
def bench():
    return Bench("trial", Launches(), TrialMeter(), 1e6, "tiny")


def errors(bench):
    return [row for row in bench.rows if row.get("error")]


@pytest.mark.parametrize(
    "row",
    [
        SMALL,
        SMALL._replace(form="exact", lengths=(33, 7)),
        SMALL._replace(window=16),
        SMALL._replace(layers=2, order="page_major"),
        SMALL._replace(operation="score"),
        SMALL._replace(operation="store", tokens=20),
        SMALL._replace(operation="store", tokens=1),
        SMALL._replace(operation="copy", layers=2),
        SMALL._replace(operation="swap", layers=2),
    ],
    ids=lambda row: f"{row.operation}-{row.form}-w{row.window}-l{row.layers}",
)
def test_a_workload_is_measured(bench, row, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.workloads._MOST_COPIES", 2)
    stage = attend_stage if row.operation == "attend" and row.layers == 1 else operation_stage
    if stage is attend_stage:
        stage.one(bench, row, {})
    else:
        stage.one(bench, row)
    assert bench.rows and not errors(bench)
    assert all(line["us"] > 0 and line["GB/s"] > 0 for line in bench.rows)
    assert (bench.device.graphs > 0) == (row.operation != "swap")


def test_the_plain_baselines_are_measured_and_the_better_cut_counts(bench, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.baselines.copies_of", lambda nbytes: 2)
    found = attend_stage.measure_baselines(bench, SMALL._replace(lengths=(40, 9)))
    assert set(found) == {"plain bf16", "plain fp8"}
    assert len(bench.rows) == len(PLAIN) and not errors(bench)


def test_every_ceiling_has_a_rate(bench):
    ceilings(bench)
    names = [row["how"] for row in bench.rows]
    assert names[:2] == ["device copy", "device read (maximum)"] and "IMMA m16n8k32" in names
    assert not errors(bench)


@pytest.mark.parametrize("row", [SMALL, SMALL._replace(window=16)], ids=("plain", "window"))
def test_the_comparison_with_the_host_passes_and_can_fail(bench, row, monkeypatch):
    row = row._replace(batch=3, tokens=0, lengths=(70, 33, 7))
    correctness_stage.compare(bench, row)
    assert bench.rows[-1]["ok"] and bench.rows[-1]["bytes different"] == 0
    monkeypatch.setattr(correctness_stage, "BOUND", 1e-9)
    correctness_stage.compare(bench, row)
    assert bench.rows[-1]["ok"] is False
    bench.finish()
    assert bench.state == "failed"


@pytest.mark.parametrize("fp8", [False, True])
def test_the_plain_kernels_are_compared_with_float64(bench, fp8):
    correctness_stage.compare_plain(bench, {"operation": "plain decode"}, fp8, 64)
    assert bench.rows[-1]["ok"]


def test_a_step_of_several_layers_is_one_graph(bench):
    step_stage.one(bench, SMALL._replace(operation="step", layers=2))
    assert [row["how"] for row in bench.rows] == ["graph", "eager"]
    assert bench.device.graphs == 1
