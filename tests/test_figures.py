"""The figures on the pages are those of the committed results."""

import subprocess
import sys

import pytest


def test_readme_and_performance_page_show_the_committed_results(root):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.tables", "--check"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_plots_on_the_pages_show_the_committed_results(root):
    pytest.importorskip("matplotlib")
    from docs.plots import digest_of, measured_figures

    for draw, result in measured_figures.items():
        drawn = (root / "docs" / "_static" / f"{draw.__name__}.svg").read_text(encoding="utf-8")
        assert digest_of(result) in drawn, f"{draw.__name__} is stale: run python -m docs.figures"
