"""Progress on stderr: a bar if tqdm is there, lines without it, nothing unless on a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], object] | None]:
    """Show how far a run is; the callback takes the number of parts done so far."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{label} ...", end="", file=sys.stderr, flush=True)
        yield None
        print(" done", file=sys.stderr)
        return
    with tqdm(total=total, desc=f"{label:<9}", leave=False, file=sys.stderr) as bar:
        yield lambda done: bar.update(done - bar.n)
