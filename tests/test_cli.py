"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys

import msgspec
import pytest

from pagedtq import __version__
from pagedtq.cli import main, selftest
from pagedtq.cli.info import Info
from pagedtq.cli.plan import Plan
from pagedtq.cli.progress import progress
from pagedtq.sim.report import SimulationReport


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(command):
        try:
            code = main(command.split())
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_simulate_ends_with_a_table_and_a_report_folder(cli, tmp_path):
    code, out, err = cli("simulate --requests 60")
    assert (code, err) == (0, "")
    for name in ("fp16", "fp8", "k4v4", "k4v4-w0", "k3v3", "k2v2"):
        assert f"\n{name} " in out
    folder = tmp_path / "simulate-report"
    assert {path.name for path in folder.iterdir()} == {
        "report.json",
        "utilisation_over_time.png",
        "running_sequences.png",
        "waste_by_page_size.png",
        "throughput.png",
    }
    report = SimulationReport.from_json((folder / "report.json").read_bytes())
    assert report.workload.num_requests == 60
    assert report.hardware.name == "H200"


def test_simulate_prints_its_report_as_json(cli, tmp_path):
    code, out, err = cli(
        "simulate --requests 40 --json --no-plots --formats fp16,k4v4-w128 --seed 7 --rate inf "
        "--budget 6GiB --model qwen2.5-7b --page-size 32 --step-tokens 512 --max-running 9 "
        "--watermark 0.1 --admission chunk --bandwidth 1e12 --out elsewhere"
    )
    assert (code, err) == (0, "")
    report = SimulationReport.from_json(out)
    assert [f.name for f in report.formats] == ["fp16", "k4v4-w128"]
    assert report.formats[1].window_tokens == 128
    assert (report.model.name, report.page_size) == ("qwen2.5-7b", 32)
    assert (report.budget_bytes, report.workload.requests_per_second) == (6 << 30, None)
    assert (report.options.step_tokens, report.options.admission) == (512, "chunk")
    assert report.formats[0].running_peak <= 9
    assert (report.hardware.name, report.hardware.bandwidth) == ("custom", 1e12)
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["report.json"]


def test_simulate_swaps_what_must_give_way(cli):
    command = (
        "simulate --requests 60 --rate inf --formats k4v4-w0 --budget 256MiB --no-plots --json "
        "--watermark 0 --preemption swap --host-memory 1GiB"
    )
    code, out, err = cli(command)
    assert code == 0, err
    report = msgspec.json.decode(out)
    assert (report["host_bytes"], report["overlap_swaps"]) == (1 << 30, True)
    assert report["options"]["preemption"] == "swap"
    swaps = report["formats"][0]["swaps"]
    assert swaps["sequences"] > 0
    assert swaps["link_seconds"] > 0
    code, out, err = cli(command + " --wait-for-swaps --link-bandwidth 1e9")
    assert code == 0, err
    waited = msgspec.json.decode(out)
    assert waited["hardware"]["link_bandwidth"] == 1e9
    assert waited["formats"][0]["swaps"]["wait_seconds"] > swaps["wait_seconds"]


def test_simulate_replays_a_trace_file(cli, tmp_path):
    rows = "".join(f"{i * 0.25},100,{10 + i}\n" for i in range(20))
    header = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
    (tmp_path / "trace.csv").write_text(header + rows)
    command = "simulate --json --no-plots --formats k4v4 --trace vidur:trace.csv"
    report = SimulationReport.from_json(cli(command)[1])
    assert report.workload.name == "vidur:trace.csv"
    assert report.workload.requests_per_second == pytest.approx(4)
    assert report.formats[0].output_tokens == sum(range(10, 30))
    shorter = SimulationReport.from_json(cli(command + " --requests 5 --rate 50")[1])
    assert shorter.workload.num_requests == 5
    assert shorter.workload.requests_per_second == pytest.approx(50)


def test_simulate_sweeps_budgets_of_a_trace_that_names_its_content(cli, tmp_path):
    rows = [
        {"timestamp": 100 * at, "input_length": 700, "output_length": 3, "hash_ids": [0, at + 1]}
        for at in range(9)
    ]
    (tmp_path / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = "simulate --trace mooncake:talks.jsonl --formats fp16,k4v4"
    code, out, err = cli(f"{command} --sweep 1GiB,4GiB")
    assert (code, err) == (0, "")
    assert out.count("fp16") == out.count("k4v4") == 2
    assert "written to simulate-report/: sweep.json, hit_rate.png" in out
    code, out, err = cli(f"{command} --json --no-plots")
    assert json.loads(out)["formats"][0]["tokens_found"] == 8 * 512
    code, out, err = cli(f"{command} --json --no-plots --no-sharing")
    assert json.loads(out)["formats"][0]["tokens_found"] == 0


def test_simulate_executes_on_request(cli):
    code, out, _ = cli(
        "simulate --requests 10 --model tiny --formats fp16,fp8,k4v4 --budget 64MiB "
        "--execute 2 --execute-steps 2 --no-plots --json"
    )
    assert code == 0
    fp16, fp8, ours = SimulationReport.from_json(out).formats
    assert fp16.execution.mean_relative_error < 1e-5 < ours.execution.mean_relative_error
    assert fp8.execution is None
    code, out, _ = cli(
        "simulate --requests 10 --model tiny --formats k4v4 --execute 1 --execute-steps 1 "
        "--no-plots"
    )
    assert "executed  backend  stored/s" in out


def test_simulate_without_matplotlib_says_so_and_goes_on(cli, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    code, out, err = cli("simulate --requests 5 --formats fp16")
    assert code == 0
    assert 'no plots: plots need matplotlib: pip install "pagedtq[plots]"' in err
    assert "written to simulate-report/: report.json\n" in out


def test_plan_says_what_fits(cli, tmp_path):
    code, out, err = cli("plan --budget 40GiB --tokens 8192")
    assert (code, err) == (0, "")
    assert "llama-3.1-8b, 40 GiB, pages of 64 tokens, sequences of 8192 tokens" in out
    assert "\nk4v4 " in out
    plan = msgspec.json.decode(cli("plan --json --formats k4v4,fp16")[1], type=Plan)
    ours, fp16 = plan.formats
    assert (fp16.bytes_per_token, ours.bytes_per_token) == (131072, 33792)
    assert fp16.sequences_vs_fp16 == 1 < ours.sequences_vs_fp16
    (tmp_path / "my.json").write_text(
        '{"name": "mine", "num_layers": 4, "num_kv_heads": 2, "num_q_heads": 2, "head_dim": 80,'
        ' "weight_bytes": 1}'
    )
    assert "mine, 4 GiB" in cli("plan --model my.json")[1]
    assert "-\n" in cli("plan --tokens 1000000")[1]


def test_info_names_versions_machine_and_backends(cli):
    code, out, _ = cli("info")
    assert code == 0
    assert out.splitlines()[0].split(maxsplit=1) == ["pagedtq", f"{__version__}, page format 1"]
    answer = msgspec.json.decode(cli("info --json")[1], type=Info)
    assert answer.pagedtq == __version__
    assert answer.backends["host"] == "available"
    assert answer.backends["auto"] == "host"
    assert answer.backends["cuda"]
    assert answer.cores >= 1


def test_selftest_passes_here_and_fails_with_code_1_when_a_figure_is_bad(cli, monkeypatch):
    code, out, _ = cli("selftest")
    assert code == 0
    assert "FAILED" not in out
    answer = json.loads(cli("selftest --json")[1])
    assert answer["passed"] is True
    assert all(check["value"] <= check["bar"] for check in answer["checks"])
    monkeypatch.setattr(
        selftest, "codec_checks", lambda seed: [selftest.Check(name="x", value=2.0, bar=1.0)]
    )
    code, out, _ = cli("selftest")
    assert code == 1
    assert "FAILED" in out


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("", "required: COMMAND"),
        ("dance", "invalid choice"),
        ("simulate --formats fp32", "unknown format 'fp32'"),
        ("simulate --formats ,", "at least one format"),
        ("simulate --formats k4v4,k4v4", "appears twice"),
        ("simulate --formats k4v4-w10", "multiple of page_size"),
        ("simulate --budget lots", "expected a size such as 40GiB"),
        ("simulate --budget 1MiB", "need at least"),
        ("simulate --model gpt-0", "unknown model 'gpt-0'"),
        ("simulate --model absent.json", "cannot read absent.json"),
        ("simulate --model bad.json", "bad.json: "),
        ("simulate --model odd.json", "multiple of num_kv_heads"),
        ("simulate --page-size 17", "invalid choice"),
        ("simulate --requests 0", "at least 1"),
        ("simulate --sweep lots", "expected a size such as 40GiB"),
        ("simulate --sweep 1GiB,1GiB", "each once"),
        ("simulate --sweep 1GiB", "does not say which prompts begin alike"),
        ("simulate --requests many", "invalid positive_int value"),
        ("simulate --rate 0", "must be positive"),
        ("simulate --seed -1", "must not be negative"),
        ("simulate --watermark 2", "watermark must be in"),
        ("simulate --step-tokens 0", "step_tokens must be at least 1"),
        ("simulate --efficiency 0", "efficiency must be in"),
        ("simulate --trace azure", "kind:path"),
        ("simulate --trace azure:absent.csv", "cannot read trace absent.csv"),
        ("simulate --trace azure:bad.csv", "bad.csv:2: expected 3 fields, got 1"),
        ("simulate --requests 3 --formats fp16 --out bad.csv/x", "cannot write"),
        ("plan --budget 1kB", "need at least"),
        ("plan --tokens 0", "at least 1"),
        ("info extra", "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_one_line_on_stderr_and_code_2(cli, tmp_path, command, problem):
    (tmp_path / "bad.json").write_text("[]")
    (tmp_path / "odd.json").write_text(
        '{"name": "x", "num_layers": 1, "num_kv_heads": 2, "num_q_heads": 3, "head_dim": 64,'
        ' "weight_bytes": 1}'
    )
    (tmp_path / "bad.csv").write_text("TIMESTAMP,ContextTokens,GeneratedTokens\nx\n")
    code, out, err = cli(command)
    assert (code, out) == (2, "")
    assert problem in err
    assert "Traceback" not in err
    assert err.splitlines()[-1].startswith("pagedtq")


def test_help_and_version_work(cli):
    assert cli("--version") == (0, f"pagedtq {__version__}\n", "")
    for command in ("simulate", "plan", "inspect", "convert", "info", "selftest"):
        code, out, _ = cli(f"{command} --help")
        assert code == 0
        assert "--json" in out


def test_interruption_is_code_130(cli, monkeypatch):
    def interrupt(seed):
        raise KeyboardInterrupt

    monkeypatch.setattr(selftest, "codec_checks", interrupt)
    code, _, err = cli("selftest")
    assert code == 130
    assert "interrupted" in err


def test_progress_is_shown_on_a_terminal_only(monkeypatch, capsys):
    with progress("fp16", 10) as update:
        assert update is None
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("fp16", 10) as update:
        if update is not None:
            update(4)
            update(10)
    shown = capsys.readouterr().err
    assert "fp16" in shown


def test_progress_without_tqdm_is_a_plain_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress("k4v4", 10) as update:
        assert update is None
    assert capsys.readouterr().err == "k4v4 ... done\n"


def test_the_module_runs_as_a_process_and_a_closed_pipe_is_no_error(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "pagedtq"]
    done = subprocess.run(
        [*command, "simulate", "--requests", "30", "--json", "--no-plots", "--out", str(tmp_path)],
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert SimulationReport.from_json(done.stdout).workload.num_requests == 30
    piped = subprocess.run(
        f"{sys.executable} -m pagedtq plan --json | true; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        check=False,
    )
    assert piped.stderr == b""
    wrong = subprocess.run([*command, "plan", "--budget", "x"], capture_output=True, check=False)
    assert wrong.returncode == 2
