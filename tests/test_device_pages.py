"""From a device's result to tables and plots, on a made-up result that is kept nowhere."""

from __future__ import annotations

import json

import pytest

from benchmarks import tables
from benchmarks.gpu.figures import crossover
from benchmarks.gpu.pages import BARS, NOT_MEASURED, bars, device_page

SHAPE = {"batch": 64, "tokens": 32768, "group": 4, "d": 128, "page": 64, "lengths": "equal"}


@pytest.fixture
def result():
    """What a run might write: some bars reached, some missed, some not measured."""
    attend = {"stage": "attend", "operation": "attend", "how": "graph", **SHAPE}
    times = {"us": 600.0, "us p10": 590.0, "us p90": 610.0, "GB/s": 3700.0, "of copy": 0.86}
    rows = [
        {**attend, "format": "k4v4", **times, "x best bf16": 3.2, "x best fp8": 1.4},
        {**attend, "format": "k4v4", "tokens": 1024, **times, "x best bf16": 0.8},
        {**attend, "format": "k2v2", "us": 350.0, "of copy": 0.8, "x best bf16": 5.5},
        {**attend, "operation": "baseline", "format": "", "how": "plain bf16 /4", "us": 1950.0},
        {**attend, "operation": "baseline", "format": "", "how": "FlashInfer bf16",
         "error": "not run: no flashinfer-trimmed was prepared (--peers)"},
        {"stage": "operations", "operation": "window on against off", **SHAPE, "slower %": 4.0},
        {"stage": "operations", "operation": "store", "how": "graph", "format": "k4v4",
         "batch": 64, "tokens": 1, "us": 5.0},
        {"stage": "ceilings", "how": "device copy", "us": 500.0, "GB/s": 4300.0, "of copy": 1.0},
        {"stage": "ceilings", "how": "PRMT", "us": 9.0, "T operations/s": 16.0, "unit": "lanes"},
    ]  # fmt: skip
    rows += [{"stage": "attend", "operation": "crossover", **line} for line in crossover(rows)]
    return {
        "name": "gpu-made-up", "device": "Made-up", "rows": rows, "notes": ["a note"],
        "versions": {"pagedtq": "0"}, "date": "2026-01-01T00:00:00", "command": "made up",
        "stages": [{"stage": "attend", "state": "passed", "seconds": 3.0, "tests": {"passed": 2}}],
    }  # fmt: skip


def test_bars_say_what_was_measured_and_whether_it_is_enough(result):
    lines = {line["what"]: line for line in bars(result["rows"])}
    assert len(lines) == len(BARS)
    long = "k4v4, 64 sequences of 32 k tokens, group 4: of copy bandwidth"
    assert (lines[long]["measured"], lines[long]["reached"]) == (0.86, "yes")
    assert lines["k4v4, group 4: times the best fp8"]["reached"] == "no"
    assert lines["exact window of 64 tokens and 4 sinks: slower by %"]["reached"] == "yes"
    assert lines["store, a step of 64 sequences: us"]["reached"] == "yes"
    assert lines["score: of copy bandwidth"]["measured"] == "not measured"
    assert lines["score: of copy bandwidth"]["reached"] == ""


def test_a_result_becomes_a_page_and_baselines_that_did_not_run_have_their_reason(result):
    text = device_page(result, tables.markdown)
    assert "| k4v4, group 4: times the best bf16 | >= 3 | 3.2 | yes |" in text
    assert "no flashinfer-trimmed was prepared" in text.partition("#### Not measured")[2]
    assert "FlashInfer" not in text.partition("#### Not measured")[0]
    assert "| attend | passed | 3 | 2 passed |" in text
    assert "| PRMT | 9 |  | 16 |" in text and "1024 tokens" in text
    assert text.endswith("- a note")


def test_without_a_result_the_page_says_not_measured(tmp_path):
    assert tables.device_sections(tmp_path) == NOT_MEASURED
    assert tables.draw_devices(tmp_path, tmp_path) == []


def test_one_command_finds_results_draws_them_and_shows_the_plots(result, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "gpu-made-up.json").write_text(json.dumps(result))
    monkeypatch.setattr(tables, "STATIC", tmp_path)
    paths = tables.draw_devices(tmp_path, tmp_path)
    assert [path.name for path in paths] == [
        "gpu-made-up-attend.svg",
        "gpu-made-up-crossover.svg",
    ]
    assert all("<svg" in path.read_text() for path in paths)
    text = tables.device_sections(tmp_path)
    assert "![gpu-made-up-attend.svg](_static/gpu-made-up-attend.svg)" in text
