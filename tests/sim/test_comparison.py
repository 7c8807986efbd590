"""Formats share one budget, reports are deterministic, and survive JSON."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from pagedtq.errors import ArgumentError
from pagedtq.models import MODELS
from pagedtq.sim.comparison import DEFAULT_FORMATS, simulate_formats
from pagedtq.sim.generator import azure_conversation
from pagedtq.sim.plots import draw_plots
from pagedtq.sim.report import SimulationReport, write_report
from pagedtq.sim.table import format_table, report_table
from pagedtq.sim.workload import Workload
from pagedtq.sizing import Format

LLAMA = MODELS["llama-3.1-8b"]
BUDGET = 4 << 30


def simulate(formats=DEFAULT_FORMATS, requests=250, rate=100.0, **more):
    return simulate_formats(
        azure_conversation(requests, seed=1).at_rate(rate),
        [Format.parse(name) for name in formats],
        LLAMA,
        budget_bytes=BUDGET,
        **more,
    )


@pytest.fixture(scope="module")
def report():
    return simulate()


def without_wall_time(report):
    text = msgspec.to_builtins(report)
    for f in text["formats"]:
        f["wall_seconds"] = 0
    return text


def test_every_format_serves_the_whole_workload_within_the_same_budget(report):
    assert report.budget_bytes == BUDGET
    workload = azure_conversation(250, seed=1)
    for f in report.formats:
        assert f.capacity.total_bytes <= BUDGET < f.capacity.total_bytes + f.capacity.page_bytes
        assert (f.requests_served, f.requests_rejected) == (250, 0)
        assert f.output_tokens == workload.output_tokens.sum()
        assert f.prompt_tokens == workload.prompt_tokens.sum()
        assert f.simulated_seconds >= f.linear_layers_seconds > 0


def test_fewer_bytes_hold_more_sequences_and_serve_faster_and_the_window_costs(report):
    by_name = {f.name: f for f in report.formats}
    for less, more in (("fp16", "fp8"), ("fp8", "k4v4"), ("k4v4", "k4v4-w0"), ("k3v3", "k2v2")):
        assert by_name[less].running_mean < by_name[more].running_mean
        assert by_name[less].relative_throughput < by_name[more].relative_throughput
    assert by_name["fp16"].relative_throughput == 1
    assert by_name["fp16"].occupancy > 0.8
    assert by_name["k4v4"].running_peak <= by_name["k4v4"].capacity.num_window_slots


def test_means_lie_within_what_was_seen(report):
    for f in report.formats:
        assert 0 < f.running_mean <= f.running_peak
        assert 0.95 < f.utilisation < 1
        assert 0 < f.occupancy <= 1
        time = f.timeline
        assert len(time.seconds) == len(time.running) == len(time.utilisation)
        assert np.mean(time.running) == pytest.approx(f.running_mean)
        assert max(time.tokens) <= f.capacity.tokens
        assert f.first_token_seconds["p50"] <= f.first_token_seconds["p99"]


def test_two_runs_give_the_same_report():
    one, two = (simulate(("fp16", "k4v4"), 120) for _ in range(2))
    assert without_wall_time(one) == without_wall_time(two)
    slow = simulate(("fp16", "k4v4"), 120, fast_forward=False)
    assert without_wall_time(one) == without_wall_time(slow)


def test_the_json_report_parses_back_to_the_same_structs(report, tmp_path):
    path = write_report(report, tmp_path / "new" / "folder")
    assert SimulationReport.from_json(path.read_bytes()) == report
    for text in (b"{}", b"nonsense", report.to_json().replace(b'"schema": 3', b'"schema": 99')):
        with pytest.raises(ArgumentError):
            SimulationReport.from_json(text)


def test_the_table_has_a_line_per_format(report):
    lines = report_table(report).splitlines()
    assert lines[0].startswith("llama-3.1-8b, 4 GiB for the cache, pages of 64 tokens; 250 request")
    assert [line.split()[0] for line in lines[4:]] == list(DEFAULT_FORMATS)
    assert format_table(("a", "bb"), [("long", "1")]) == "a     bb\n----  --\nlong   1"


def test_rejected_requests_are_counted_and_explained():
    workload = Workload("long", np.zeros(2), np.array([10, 40_000]), np.array([5, 5]))
    report = simulate_formats(
        workload, [Format.parse("fp16"), Format.parse("k4v4")], LLAMA, budget_bytes=BUDGET
    )
    fp16, ours = report.formats
    assert (fp16.requests_served, fp16.requests_rejected, fp16.output_tokens) == (1, 1, 5)
    assert "40004 tokens in 626 pages, the pool has 511" in fp16.rejection
    assert (ours.requests_rejected, ours.rejection) == (0, None)
    assert "fp16: 1 requests rejected" in report_table(report)


def test_a_report_of_nothing_served_is_still_a_report(tmp_path):
    workload = Workload("too long", np.zeros(1), np.array([10**6]), np.array([5]))
    report = simulate_formats(workload, [Format.parse("fp16")], LLAMA, budget_bytes=BUDGET)
    (only,) = report.formats
    assert (only.steps, only.output_tokens_per_second, only.relative_throughput) == (0, 0, 0)
    assert SimulationReport.from_json(report.to_json()) == report
    assert len(draw_plots(report, tmp_path)) == 4


def test_no_formats_or_too_small_a_budget_are_refused():
    with pytest.raises(ArgumentError, match="at least one format"):
        simulate(())
    with pytest.raises(ArgumentError, match="need at least"):
        simulate_formats(azure_conversation(1), [Format.parse("fp16")], LLAMA, budget_bytes=1 << 20)


def test_the_plots_are_png_files_of_some_content(report, tmp_path):
    paths = draw_plots(report, tmp_path / "plots")
    assert [path.name for path in paths] == [
        "utilisation_over_time.png",
        "running_sequences.png",
        "waste_by_page_size.png",
        "throughput.png",
    ]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 10_000
