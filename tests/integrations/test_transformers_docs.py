"""The page about integrations runs."""

from __future__ import annotations

from markdown_code import run_blocks


def test_code_of_the_page_runs(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(root / "docs" / "integrations.md")
