"""The page on peers' behaviours names tests that exist."""

from __future__ import annotations

import re


def test_every_test_that_the_page_names_exists(root):
    named = set(re.findall(r"`(test_\w+)`", (root / "docs" / "peer-behaviours.md").read_text()))
    defined = {
        name
        for path in (root / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)
    }
    assert len(named) > 45
    assert named <= defined, named - defined
