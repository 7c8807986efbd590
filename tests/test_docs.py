"""The documentation's code runs, and what it shows exists."""

from __future__ import annotations

import re

import pytest

from markdown_code import python_blocks, run_blocks

LINK = re.compile(r"(?:\]\(|\{image\} |src=\")([\w./-]+\.(?:svg|md|png))")


PAGES = ["quickstart", "page-format", "wire-format", "compat", "serving", "eviction"]


@pytest.mark.parametrize("page", PAGES)
def test_code_of_the_page_runs(root, page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_blocks(root / "docs" / f"{page}.md")


def test_no_other_page_holds_code_that_is_not_run(root):
    pages = {path.stem for path in (root / "docs").rglob("*.md") if python_blocks(path)}
    # The last one needs torch: tests/integrations runs it.
    assert pages <= {*PAGES, "integrations"}


def test_figures_and_pages_that_are_linked_exist(root):
    pages = [root / "README.md", *(root / "docs").rglob("*.md")]
    links = [(page, target) for page in pages for target in LINK.findall(page.read_text())]
    assert len(links) > 10
    for page, target in links:
        assert (page.parent / target).is_file(), f"{page.name} links {target}"


@pytest.mark.slow
def test_figures_can_be_drawn_again_from_the_layout(root, tmp_path):
    from docs.figures import draw_all, measured_figures

    draw_all(tmp_path)
    drawn = {path.name for path in tmp_path.iterdir()}
    measured = {f"{draw.__name__}.svg" for draw in measured_figures}
    assert drawn == {"page.svg", "window.svg"} | measured
    assert all((root / "docs" / "_static" / name).is_file() for name in drawn)
