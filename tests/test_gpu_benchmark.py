"""The GPU benchmark's arithmetic, its stages and its refusal, without a GPU."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu.figures import Times, ceiling_row, file_name, row_of, suite_counts, verdict
from benchmarks.gpu.stages import pytest_command, run_stage, sanitizer_command, skipped
from benchmarks.gpu.workloads import Workload, fitting, full, quick
from pagedtq.backends import cupy_device
from pagedtq.paging.layout import PageLayout


def test_without_a_device_the_command_says_so_and_exits_with_its_own_code(capsys, monkeypatch):
    monkeypatch.setattr(cupy_device, "missing_cuda", lambda: "CuPy finds no device")
    assert command.main(["--quick"]) == command.NO_DEVICE
    captured = capsys.readouterr()
    assert "not measured: the CUDA backend needs CuPy and a device" in captured.err
    assert not captured.out


def test_the_bytes_of_a_workload_are_counted_by_hand():
    # k4v4 at head_dim 128: 64 + 64 bytes of codes and two f16 norms per token and head.
    attend = Workload("attend", "k4v4", 64, 32768)
    assert attend.bytes_moved() == 64 * 32768 * 8 * 132
    assert attend.bf16_bytes() == 64 * 32768 * 8 * 512
    score = Workload("score", "k4v4", 8, 32768)
    assert score.bytes_moved() == 8 * 32768 * 8 * (66 + 4 * 4)
    assert Workload("store", "k2v2", 1, 64).bytes_moved() == 64 * 8 * (68 + 512)
    page = PageLayout(attend.config()).page_bytes
    assert Workload("copy", "k4v4", 10, 64).bytes_moved() == 2 * 10 * page
    assert Workload("swap", "k4v4", 10, 64).bytes_moved() == 10 * page
    assert Workload("copy", "k4v4", 10, 64).pages == 21


def test_the_matrix_holds_the_shape_with_a_bar_and_drops_what_does_not_fit():
    assert Workload("attend", "k4v4", 64, 32768) in full()
    assert len(full()) == len(set(full()))
    fit, large = fitting(full(), 12 << 30)
    assert set(fit) | set(large) == set(full())
    assert Workload("attend", "exact", 64, 32768) in large
    assert Workload("attend", "k4v4", 1, 32768) in fit
    assert {row.operation for row in quick()} == {row.operation for row in full()}


def test_figures_are_medians_shares_and_ratios():
    workload = Workload("attend", "k4v4", 64, 32768)
    times = Times((0.002, 0.001, 0.004))
    row = row_of(workload, "eager", times, 4300.0, Times((0.006,)))
    assert row["ms median"] == 2.0 and row["ms best"] == 1.0
    assert row["GB/s"] == pytest.approx(workload.bytes_moved() / 2e6)
    assert row["of copy bandwidth"] == pytest.approx(row["GB/s"] / 4300)
    assert row["speed vs torch bf16"] == 3.0
    assert row_of(workload, "eager", times, None)["speed vs torch bf16"] is None
    ceiling = ceiling_row("device copy", 2 << 30, times)
    assert set(ceiling) == set(row)
    assert ceiling["GB/s"] == pytest.approx((2 << 30) / 2e6)


def test_results_are_named_after_the_device():
    assert file_name("NVIDIA H200") == "gpu-nvidia-h200"
    assert file_name("NVIDIA A100-SXM4-80GB ") == "gpu-nvidia-a100-sxm4-80gb"


def test_stages_report_passes_failures_and_what_did_not_run():
    code = "print('tests'); print('3 passed, 2 skipped in 0.1s')"
    passed = run_stage("suite", [sys.executable, "-c", code], 60)
    assert passed["state"] == "passed" and passed["tests"] == {"passed": 3, "skipped": 2}
    failed = run_stage("suite", [sys.executable, "-c", "print('boom'); raise SystemExit(1)"], 60)
    assert failed["state"] == "failed" and "boom" in failed["output"]
    slow = run_stage("suite", [sys.executable, "-c", "import time; time.sleep(60)"], 0.1)
    assert slow["state"] == "out of time"
    none = skipped("compute-sanitizer memcheck", "compute-sanitizer is not installed")
    assert none["state"] == "not run: compute-sanitizer is not installed"
    assert verdict([passed, none, slow]) == 0 and verdict([passed, failed]) == 1
    assert suite_counts("...\n1 failed, 4 passed in 3s\n") == {"failed": 1, "passed": 4}


def test_the_sanitizer_runs_the_small_part_of_the_suite():
    line = sanitizer_command("racecheck", "/opt/compute-sanitizer")
    assert line[:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"]
    assert "tests/gpu" in line and "-k" in line
    assert pytest_command()[:3] == [sys.executable, "-m", "pytest"]


def test_a_report_is_on_disk_after_every_stage(tmp_path, capsys):
    options = command.parse(["--json", str(tmp_path / "result.json")])
    report = command.Report("NVIDIA H200", options)
    row = row_of(Workload("attend", "k4v4", 1, 64), "eager", Times((1e-3,)), 4000.0)
    report.write([row], ["no bfloat16 baseline: PyTorch is not installed"])
    report.add(skipped("GPU suite", "asked not to"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["device"] == "NVIDIA H200" and result["date"]
    assert result["rows"][0]["operation"] == "attend"
    assert result["stages"][0]["stage"] == "GPU suite"
    assert np.isclose(result["rows"][0]["ms median"], 1.0)
    assert "gpu-nvidia-h200" in capsys.readouterr().out
