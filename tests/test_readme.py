"""The README's promises: two commands that CI runs as written, an example that works."""

from __future__ import annotations

import re

import pytest

from markdown_code import python_blocks, run_blocks

COMMANDS = [
    'python3 -m venv .venv && .venv/bin/pip install ".[plots]" && .venv/bin/pagedtq simulate',
    '.venv/bin/pip install ".[test]" && .venv/bin/pytest',
]


@pytest.fixture(scope="module")
def readme(root):
    return root / "README.md"


def test_readme_fits_on_150_lines(readme):
    assert len(readme.read_text().splitlines()) <= 150


def test_readme_has_exactly_two_commands_to_copy(readme):
    blocks = re.findall(r"^```sh\n(.*?)\n```", readme.read_text(), re.MULTILINE | re.DOTALL)
    assert blocks == COMMANDS


def test_continuous_integration_runs_the_two_commands_as_written(root):
    script = (root / ".ci" / "run").read_text()
    lines = [line.strip() for line in script.splitlines()]
    for command in COMMANDS:
        assert lines.count(command) == 1
    assert "set -euo pipefail" in lines
    assert re.search(r"^for step in main_job .*\btests\b", script, re.MULTILINE)


def test_public_workflow_calls_the_same_script(root):
    workflow = (root / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: bash .ci/run" in workflow


def test_example_of_the_readme_runs(readme, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert len(python_blocks(readme)) == 1
    namespace = run_blocks(readme)
    assert namespace["out"].shape == (2, 32, 128)
    assert namespace["lse"].shape == (2, 32)
    assert capsys.readouterr().out.strip()
