"""The frame of the benchmarks: table and JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.report import arguments, publish, table

ROWS = [
    {"case": "k4v4", "tokens": 8192, "ms": np.float32(1.5), "ratio": 0.0001234},
    {"case": "exact", "tokens": 16, "ms": 1234567.0, "more": True},
]


def test_table_aligns_numbers_to_the_right_and_text_to_the_left():
    lines = table(ROWS).splitlines()
    assert lines[0] == "case   tokens        ms     ratio"
    assert lines[2] == "k4v4     8192       1.5  0.000123"
    assert lines[3] == "exact      16  1.23e+06"


def test_table_of_nothing_says_so():
    assert table([]) == "(no rows)"


def test_publish_prints_one_table_and_writes_rows_with_their_conditions(tmp_path, capsys):
    path = publish("trial", ROWS, notes=["two threads"], json_path=tmp_path / "a" / "b.json")
    printed = capsys.readouterr().out
    assert table(ROWS) in printed
    assert "two threads" in printed
    result = json.loads(path.read_text())
    assert set(result) >= {"rows", "notes", "versions", "machine", "date", "command", "seed"}
    assert result["rows"][0] == {"case": "k4v4", "tokens": 8192, "ms": 1.5, "ratio": 0.0001234}
    assert set(result["versions"]) >= {"pagedtq", "python", "numpy", "msgspec"}
    assert set(result["machine"]) >= {"cpu", "cores"}
    assert result["machine"]["cores"] >= 1


def test_published_command_can_be_repeated_and_holds_no_machine_path(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/trial.py", "--json", "/here/r", "--seed", "3"])
    path = publish("trial", ROWS, json_path=tmp_path / "r.json", seed=3)
    result = json.loads(path.read_text())
    assert result["command"] == "python -m benchmarks.trial --seed 3"
    assert result["seed"] == 3


def test_infinity_is_written_as_text_because_json_has_none(tmp_path):
    path = publish("trial", [{"lse": float("-inf")}], json_path=tmp_path / "r.json")
    assert json.loads(path.read_text())["rows"] == [{"lse": "-inf"}]


def test_quick_run_keeps_no_result_unless_told_where(tmp_path):
    assert publish("trial", ROWS, quick=True) is None
    assert publish("trial", ROWS, quick=True, json_path=tmp_path / "r.json").is_file()


def test_all_benchmarks_share_their_options():
    args = arguments("trial", "what", ["--json", "x.json", "--quick"])
    assert (args.json, args.quick, args.seed) == (Path("x.json"), True, 0)
    with pytest.raises(SystemExit):
        arguments("trial", "what", ["--unknown"])
