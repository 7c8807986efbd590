"""The GPU benchmark's arithmetic, its stages and its refusal, without a GPU."""

from __future__ import annotations

import json
import os
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import (
    attend_stage,
    correctness_stage,
    peer_folder,
    peer_stages,
    prepare_flashinfer,
    prepare_vllm,
    processes,
    step_stage,
)
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.device_timing import CudaMeter, TrialMeter
from benchmarks.gpu.figures import (
    FAILED,
    NOT_SHOWN,
    PASSED,
    SHOWING,
    Times,
    crossover,
    file_name,
    ratios,
    suite_counts,
    time_columns,
    unshown,
    verdict,
)
from benchmarks.gpu.listing_device import ListingDevice
from benchmarks.gpu.peer_folder import NotHere, add_package
from benchmarks.gpu.processes import pytest_command, run_stage, sanitizer_command, skipped
from benchmarks.gpu.workloads import Workload, at_size, attend_rows, operation_rows
from pagedtq.backends import cupy_device
from pagedtq.cli import build_parser
from pagedtq.paging.layout import PageLayout

BAR = Workload("attend", "k4v4", 64, 32768)


def trial_bench(path=None, size="tiny"):
    return Bench("trial", ListingDevice(), TrialMeter(), 1e6, size, path=path)


def test_without_a_device_the_command_says_so_and_exits_with_its_own_code(capsys, monkeypatch):
    monkeypatch.setattr(command, "missing_cuda", lambda: "CuPy finds no device")
    monkeypatch.setattr(cupy_device, "missing_cuda", lambda: "CuPy finds no device")
    assert command.main(["--quick"]) == command.NO_DEVICE
    captured = capsys.readouterr()
    assert "not measured: the CUDA backend needs CuPy and a device" in captured.err
    assert not captured.out


def test_the_bytes_of_a_workload_are_counted_by_hand():
    # k4v4 at head_dim 128: 64 + 64 bytes of codes and two f16 norms per token and head.
    assert BAR.bytes_moved() == 64 * 32768 * 8 * 132
    assert BAR.bf16_bytes() == 64 * 32768 * 8 * 512
    ragged = BAR._replace(lengths=(100, 28))
    assert ragged.bytes_moved() == 128 * 8 * 132 and ragged.pages == 1 + 3 * ragged.copies
    assert BAR._replace(batch=88, layers=32).bytes_moved() == 88 * 32768 * 8 * 132
    score = Workload("score", "k4v4", 8, 32768)
    assert score.bytes_moved() == 8 * 32768 * 8 * (66 + 4 * 4)
    assert Workload("store", "k2v2", 1, 64).bytes_moved() == 64 * 8 * (68 + 512)
    copy = Workload("copy", "k4v4", 10, 64, layers=32)
    assert copy.bytes_moved() == 2 * 10 * PageLayout(copy.config()).page_bytes
    assert copy._replace(operation="swap").bytes_moved() == copy.bytes_moved() // 2
    assert copy.pages == 21


def test_small_workloads_go_through_more_memory_than_a_cache_holds():
    small = Workload("attend", "k4v4", 1, 8192)
    assert small.copies * small.bytes_moved() >= 256 << 20
    assert small.pages == 1 + small.copies * 128
    assert BAR.copies == 1


def test_the_matrix_holds_every_axis_and_what_has_a_figure_to_reach_comes_first():
    rows = attend_rows(tuple(range(100, 500)))
    assert rows[0] == BAR and rows[3] == BAR._replace(group=8)
    assert len(rows) == len(set(rows))
    for axis, wanted in {
        "batch": {1, 8, 32, 64, 256},
        "group": {1, 4, 8},
        "dim": {64, 128},
        "page": {16, 64},
        "form": {"k4v4", "k3v4", "k3v3", "k2v2", "k8v8", "prod4v4", "exact"},
    }.items():
        assert {getattr(row, axis) for row in rows} >= wanted
    assert {row.tokens for row in rows} >= {1024, 4096, 32768, 131072}
    assert sum(bool(row.lengths) for row in rows) == 2
    others = operation_rows()
    assert {row.operation for row in others} == {"store", "score", "copy", "swap", "attend"}
    assert {row.order for row in others} == {"layer_major", "page_major"}
    assert {row.window for row in others} == {0, 64}
    assert at_size(rows, "full") == rows


def test_trials_are_small_and_keep_the_kernels():
    small = at_size(attend_rows(), "listing")
    assert {(row.form, row.dim, row.page) for row in small} == {
        (row.form, row.dim, row.page) for row in attend_rows()
    }
    assert all(row.batch <= 2 and row.tokens <= 300 for row in small)


def test_figures_are_medians_spreads_shares_and_ratios():
    times = Times(tuple(x / 1e6 for x in (20, 10, 30, 40, 50)))
    columns = time_columns(times, 30_000, copy_rate=4e9)
    assert columns["us"] == pytest.approx(30) and columns["us p10"] == pytest.approx(10)
    assert columns["us p90"] == pytest.approx(50)
    assert columns["GB/s"] == pytest.approx(1.0) and columns["of copy"] == pytest.approx(0.25)
    base = {
        "plain bf16": Times((90e-6,)),
        "SDPA bf16 x": Times((60e-6,)),
        "plain fp8": Times((45e-6,)),
    }
    want = {"x plain bf16": 3, "x SDPA bf16 x": 2, "x plain fp8": 1.5}
    want |= {"x best bf16": 2, "x best fp8": 1.5}
    assert ratios(times, base) == pytest.approx(want)


def test_the_crossover_is_where_bfloat16_stops_being_faster():
    plain = {"format": "k4v4", "group": 4, "d": 128, "page": 64, "lengths": "equal"}
    rows = [
        {**plain, "batch": b, "tokens": t, "x best bf16": x}
        for b, t, x in ((1, 1024, 0.8), (1, 32768, 1.5), (1, 8192, 0.95), (64, 1024, 1.2))
    ]
    rows.append({**rows[0], "d": 64, "x best bf16": 0.1})
    one, many = crossover(rows)
    assert (one["bf16 faster up to"], one["k4v4 faster from"]) == (8192, 32768)
    assert (many["bf16 faster up to"], many["k4v4 faster from"]) == (0, 1024)
    assert one["8192 tokens"] == 0.95


def test_results_are_named_after_the_device():
    assert file_name("NVIDIA H200") == "gpu-nvidia-h200"
    assert file_name("NVIDIA A100-SXM4-80GB ") == "gpu-nvidia-a100-sxm4-80gb"


@pytest.mark.slow
@pytest.mark.parametrize("stage", [s for s in correctness_stage.INSIDE if s != "correctness"])
def test_every_stage_builds_its_arguments_without_a_device(stage, monkeypatch):
    """Nothing is run; what a library lacks here is a row with the reason."""
    monkeypatch.setattr(attend_stage, "azure_lengths", lambda bench: (30, 17, 80))
    bench = trial_bench()
    correctness_stage.INSIDE[stage](bench)
    bench.finish()
    assert bench.state == "passed", [row for row in bench.rows if row.get("error")]
    reasons = {row["error"] for row in bench.rows if "error" in row}
    assert all(reason.startswith("not run: ") for reason in reasons)


@pytest.mark.slow
def test_the_listing_names_the_kernels_of_the_full_run(monkeypatch):
    monkeypatch.setattr(attend_stage, "azure_lengths", lambda bench: (300, 17))
    bench = trial_bench(size="full")
    launches = correctness_stage.listing(bench)
    assert not bench.rows
    kernels = {launch.kernel for launch in launches}
    assert kernels >= {
        *("attend", "merge", "rotate_queries", "store", "score", "copy_pages", "attend_window"),
        *("plain_decode", "merge_units", "prmt_rate", "imma_rate"),
    }
    attend = [launch.macros for launch in launches if launch.kernel == "attend"]
    # Formats at d 128 and 64, small pages, both group sizes in one; then the suite's, at every
    # dimension: what is measured compiles first.
    assert {macros["HEAD_DIM"] for macros in attend[:10]} == {64, 128}
    assert {macros["HEAD_DIM"] for macros in attend} >= {20, 64, 80, 96, 128, 160, 256, 512}
    assert len(attend) >= 60


def test_the_meter_times_one_operation_of_many():
    class Event:
        now = 0.0

        def record(self, stream):
            self.at = Event.now

        def synchronize(self):
            pass

    cuda = SimpleNamespace(
        Event=Event,
        get_current_stream=lambda: None,
        get_elapsed_time=lambda begin, end: end.at - begin.at,
    )
    meter = CudaMeter(SimpleNamespace(xp=SimpleNamespace(cuda=cuda)), budget=0.25)

    def call():  # eight milliseconds
        Event.now += 8.0

    times = meter.measure(call, calls=4)
    assert len(times.seconds) == 15 and times.median == pytest.approx(2e-3)

    def slow():
        Event.now += 2000.0

    assert len(meter.measure(slow).seconds) == 5


def test_what_fails_becomes_a_row_and_the_stage_goes_on(tmp_path):
    bench = trial_bench(tmp_path / "rows.json")

    def broken():
        raise RuntimeError("an illegal memory access")

    def absent():
        raise NotHere("PyTorch is not installed")

    assert bench.attempt({"how": "first"}, broken) is None
    assert bench.attempt({"how": "second"}, absent) is None
    assert bench.attempt({"how": "third"}, lambda: 7) == 7
    known = json.loads((tmp_path / "rows.json").read_text())
    assert [row["error"] for row in known["rows"]] == [
        "failed: RuntimeError: an illegal memory access",
        "not run: PyTorch is not installed",
    ]
    assert known["state"] == "running"
    bench.finish()
    assert json.loads((tmp_path / "rows.json").read_text())["state"] == "failed"


def test_nothing_begins_when_the_time_is_over_or_the_memory_too_small(monkeypatch):
    bench = Bench("trial", ListingDevice(), TrialMeter(), 0.0, "tiny")
    assert bench.attempt({}, lambda: 1) is None
    assert bench.rows[0]["error"] == "not measured: out of time"
    monkeypatch.setattr(bench.meter, "free_bytes", lambda: 1 << 30)
    assert not bench.fits({}, 1 << 31)
    assert bench.rows[1]["error"] == "not measured: needs 2048 MiB of 1024"


def test_every_peer_that_does_not_run_here_says_why():
    names = [name for builders in peer_stages.BUILDERS.values() for name in builders]
    assert {"FlashInfer bf16", "vLLM turboquant_4bit_nc", "SDPA bf16 enable_gqa"} <= set(names)
    with pytest.raises(NotHere, match="no nothing was prepared"):
        add_package("nothing")


def test_what_peers_measured_reaches_the_stage_that_compares(tmp_path):
    shape = BAR._replace(form="exact")
    label = {**shape.label(), "operation": "baseline", "how": "FlashInfer bf16"}
    path = tmp_path / "times.json"
    peer_stages.keep([{**label, "us": 2000.0}, {**label, "error": "no"}, {"us": 1.0}], path)
    assert peer_stages.known(path, shape) == {"FlashInfer bf16": Times((0.002,))}
    assert peer_stages.known(path, shape._replace(group=8)) == {}
    assert peer_stages.known(None, shape) == peer_stages.known(tmp_path / "none", shape) == {}
    bench = trial_bench()
    bench.peers = lambda shape: {"FlashInfer bf16": Times((0.002,))}
    attend_stage.attend(bench)
    ours = next(row for row in bench.rows if row.get("how") == "graph")
    # The meter of trials says a millisecond for a graph, shared by its calls.
    ratio = 0.002 / (1e-6 * ours["us"])
    assert ours["x FlashInfer bf16"] == pytest.approx(ratio)
    assert ours["x best bf16"] <= ratio and "x best fp8" in ours
    assert not bench.notes


def test_a_peers_fault_is_its_own():
    for stage, state in (("flashinfer", "passed"), ("attend", "failed")):
        bench = Bench(stage, ListingDevice(), TrialMeter(), 1e6, "tiny")
        bench.row({}, error="failed: RuntimeError: undefined symbol")
        bench.finish()
        assert bench.state == state


def test_the_largest_batch_fills_the_budget():
    row = step_stage.largest("k4v4", 128 << 30)
    used = PageLayout(row.config()).pool_bytes
    assert used <= 128 << 30 < used + 129 * PageLayout(row.config()).page_bytes
    assert step_stage.largest("exact", 128 << 30).batch < row.batch / 3.8


def test_processes_report_passes_failures_and_what_did_not_run():
    code = "print('tests'); print('3 passed, 2 skipped in 0.1s')"
    passed = run_stage("suite", [sys.executable, "-c", code], 60)
    assert passed["state"] == "passed" and passed["tests"] == {"passed": 3, "skipped": 2}
    failed = run_stage("suite", [sys.executable, "-c", "print('boom'); raise SystemExit(1)"], 60)
    assert failed["state"] == "failed" and "boom" in failed["output"]
    slow = run_stage("suite", [sys.executable, "-c", "import time; time.sleep(60)"], 0.1)
    assert slow["state"] == "out of time"
    none = skipped("memcheck", "compute-sanitizer is not installed")
    assert none["state"] == "not run: compute-sanitizer is not installed"
    assert suite_counts("...\n1 failed, 4 passed in 3s\n") == {"failed": 1, "passed": 4}


def stage_of(name, state="passed"):
    return {"stage": name, "state": state}


def test_a_run_that_did_not_show_correctness_is_no_success():
    shown = [stage_of(name) for name in SHOWING]
    assert verdict([stage_of("attend", "out of time"), *shown]) == PASSED
    assert verdict([stage_of("attend", "failed"), *shown]) == FAILED
    for name in SHOWING:
        others = [stage for stage in shown if stage["stage"] != name]
        for state in ("out of time", "not run: compute-sanitizer is not installed"):
            stages = [*others, stage_of(name, state)]
            assert verdict(stages) == NOT_SHOWN
            assert unshown(stages) == [f"{name}: {state}"]
            assert verdict([*stages, stage_of("step", "failed")]) == FAILED
    # What was not asked for is not held against the rest; the command says that it is missing.
    assert verdict([stage_of("attend")]) == PASSED
    assert len({PASSED, FAILED, NOT_SHOWN, command.NO_DEVICE}) == 4


def test_a_comparison_that_was_left_out_shows_nothing():
    for stage, state in (("correctness", "out of time"), ("attend", "passed")):
        bench = Bench(stage, ListingDevice(), TrialMeter(), 0.0, "tiny")
        bench.attempt({}, lambda: 1)
        bench.finish()
        assert bench.state == state


def test_what_a_stage_says_of_itself_counts_where_its_process_ended_well(tmp_path, monkeypatch):
    def run(name, line, seconds, extra=None):
        path = Path(line[line.index("--json") + 1])
        path.write_text(json.dumps({"state": "out of time", "rows": []}))
        return {**skipped(name, ""), "state": "passed"}

    monkeypatch.setattr(command, "run_stage", run)
    options = command.parse([])
    stage, _ = command.run_one("correctness", 10.0, options, tmp_path)
    assert stage["state"] == "out of time"


def test_what_a_stage_started_ends_with_it():
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
    line = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    stage = run_stage("suite", [sys.executable, "-c", line], 5.0)
    assert stage["state"] == "out of time"
    while is_alive(int(stage["output"])):  # until the system has buried it
        time.sleep(0.01)


def is_alive(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_sanitizer_runs_the_small_part_of_the_suite():
    line = sanitizer_command("racecheck", "/opt/compute-sanitizer")
    assert line[:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"]
    assert all((processes.ROOT / name).exists() for name in processes.SMALL_FILES)
    assert line[-len(("-q", "-p", "x", "-x", "-k", "x")) - 2 :][:2] == list(processes.SMALL_FILES)
    assert line[-1] == processes.SMALL and "a_little" in line[-1]
    assert pytest_command()[:3] == [sys.executable, "-m", "pytest"]


def test_the_simulation_is_a_command_that_parses_and_its_report_is_read(tmp_path):
    line = processes.simulate_command(tmp_path, quick=False)
    options = build_parser().parse_args(line[3:])
    assert (options.model.name, options.execute, options.backend) == ("llama-3.1-8b", 16, "cuda")
    forms = [{"name": "k4v4", "execution": {"decode_tokens_per_second": 9.0}}, {"name": "fp8"}]
    (tmp_path / "report.json").write_text(json.dumps({"formats": forms}))
    row = {"stage": "simulate", "format": "k4v4", "decode_tokens_per_second": 9.0}
    assert command.simulated(tmp_path) == [row]


def fake_stage(path, seconds=0.0):
    """A stage's process: it keeps a row, and hangs."""
    known = {"device": "NVIDIA H200", "state": "running", "notes": ["a note"]}
    known["rows"] = [{"stage": "attend", "operation": "attend", "us": 1.0}]
    return (
        f"import pathlib, time; pathlib.Path({str(path)!r}).write_text({json.dumps(known)!r}); "
        f"time.sleep({seconds})"
    )


def test_the_command_runs_stages_as_processes_and_keeps_what_a_hanging_one_found(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(command, "missing_cuda", lambda: None)
    monkeypatch.setattr(command, "find_sanitizer", lambda: None)
    lines = []

    def run(name, line, seconds, extra=None):
        lines.append((name, line, seconds))
        if name == "attend":
            path = line[line.index("--json") + 1]
            return processes.run_stage(name, [sys.executable, "-c", fake_stage(path, 60)], 3.0)
        if "--inside" in line:
            Path(line[line.index("--json") + 1]).write_text('{"state": "passed"}')
        return {**skipped(name, "not here"), "state": "passed"}

    monkeypatch.setattr(command, "run_stage", run)
    result = tmp_path / "result.json"
    assert command.main(["--json", str(result), "--peers", str(tmp_path)]) == NOT_SHOWN
    names = [name for name, *_ in lines]
    assert names == [name for name in command.STAGES if name not in ("memcheck", "racecheck")]
    assert sum(seconds for *_, seconds in lines) > 60
    inside = next(line for name, line, _ in lines if name == "attend")
    assert inside[3:5] == ["--inside", "attend"] and "--peers" in inside
    known = json.loads(result.read_text())
    assert known["device"] == "NVIDIA H200" and known["notes"] == ["a note"]
    assert known["rows"] == [{"stage": "attend", "operation": "attend", "us": 1.0}]
    states = {stage["stage"]: stage["state"] for stage in known["stages"]}
    assert states["attend"] == "out of time"
    assert states["memcheck"] == "not run: compute-sanitizer is not installed"
    captured = capsys.readouterr()
    assert "gpu" in known["name"] and "attend: out of time" in captured.out
    assert "correctness not shown by memcheck: not run: compute-sanitizer" in captured.err


def test_only_the_stages_asked_for_run_and_others_are_refused_by_name(capsys):
    assert command.parse(["--only", "attend,step"]).only == ["attend", "step"]
    with pytest.raises(SystemExit):
        command.parse(["--only", "attend,nothing"])
    assert "no stage 'nothing'" in capsys.readouterr().err
    assert sum(command.STAGES.values()) <= 60 * 7.6
    assert np.all(np.array(list(command.STAGES.values())) >= 10)


@pytest.mark.parametrize("packed", [False, True], ids=("installed", "wheel"))
def test_vllms_files_are_taken_out_as_they_are_with_their_licence(tmp_path, packed):
    installed = tmp_path / "installed"
    for name in (*prepare_vllm.FILES, "vllm-0.33.0.dist-info/licenses/LICENSE"):
        (installed / name).parent.mkdir(parents=True, exist_ok=True)
        (installed / name).write_text(f"# {name}\n")
    (installed / "vllm/__init__.py").write_text("raise ImportError('all of vLLM')\n")
    source = installed
    if packed:
        source = tmp_path / "vllm.whl"
        with zipfile.ZipFile(source, "w") as wheel:
            for path in sorted(installed.rglob("*")):
                wheel.write(path, path.relative_to(installed))
    prepare_vllm.main([str(source), str(tmp_path / "peers")])
    target = tmp_path / "peers/vllm-turboquant"
    assert (target / prepare_vllm.FILES[0]).read_text() == f"# {prepare_vllm.FILES[0]}\n"
    assert (target / "LICENSE").exists() and (target / "vllm/triton_utils.py").exists()
    # Packages hold nothing of their own, so importing them imports nothing else.
    assert not (target / "vllm/__init__.py").read_text()
    assert (target / "vllm/v1/attention/ops/__init__.py").exists()
    assert add_prepared(tmp_path / "peers") == target


def add_prepared(folder):
    peer_folder.use_folder(folder)
    try:
        return peer_folder.add_package("vllm-turboquant")
    finally:
        sys.path.remove(str(folder / "vllm-turboquant"))
        peer_folder._folders.remove(folder)


def test_what_flashinfer_imported_and_built_is_where_it_looks_first(tmp_path):
    unpacked, built = tmp_path / "unpacked", tmp_path / "cache/decode.so"
    template = unpacked / "flashinfer/data/csrc/batch_decode.cu"
    core, licence = unpacked / "flashinfer/jit/core.py", unpacked / "f.dist-info/LICENSE"
    for path in (core, licence, template, template.with_name("moe.cu"), built):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    library = unpacked / "flashinfer/data/aot/decode/decode.so"
    lines = [
        ["python", str(core)],
        ["a", "remark"],
        ["library", str(built), str(library)],
    ]
    prepare_flashinfer.collect(lines, unpacked, tmp_path / "trimmed")
    found = {str(p.relative_to(tmp_path / "trimmed")) for p in (tmp_path / "trimmed").rglob("*.*")}
    data = "flashinfer/data"
    assert found == {
        *("flashinfer/jit/core.py", f"{data}/aot/decode/decode.so", f"{data}/csrc/batch_decode.cu")
    }
    assert (tmp_path / "trimmed/LICENSE").read_text() == "LICENSE"
