"""Run the Python blocks of a Markdown page, for the tests of README and docs."""

from __future__ import annotations

import re
from pathlib import Path

FENCE = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def python_blocks(path: Path) -> list[tuple[int, str]]:
    """Return each block with the line it begins at."""
    text = path.read_text(encoding="utf-8")
    return [(text[: m.start()].count("\n") + 2, m[1]) for m in FENCE.finditer(text)]


def run_blocks(path: Path) -> dict[str, object]:
    """Run all blocks in one namespace, as a reader would; tracebacks name page and line."""
    namespace: dict[str, object] = {"__name__": path.stem}
    for line, block in python_blocks(path):
        exec(compile("\n" * (line - 1) + block, str(path), "exec"), namespace)
    return namespace
