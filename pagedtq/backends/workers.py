"""A few threads that share a list of independent pieces of work."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from ..paging.arguments import integer

Item = TypeVar("Item")


class Workers:
    """Run a function over items on several threads.

    NumPy releases the GIL inside large array operations only, so callers pass few, large items;
    a list of small ones is better run inline (``parallel=False``).

    Parameters
    ----------
    num_threads : int or None
        Threads to use; None for one per CPU this process may run on.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        if num_threads is None:
            num_threads = len(os.sched_getaffinity(0))
        self.num_threads = integer("num_threads", num_threads, 1)
        self._pool: ThreadPoolExecutor | None = None

    def run(self, work: Callable[[Item], None], items: Sequence[Item], parallel: bool) -> None:
        """Call ``work`` on every item; the first exception is raised after all threads stopped."""
        threads = min(self.num_threads, len(items)) if parallel else 1
        if threads <= 1:
            for item in items:
                work(item)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.num_threads, thread_name_prefix="pagedtq")
        # Threads take the next item when they are free, so unequal items balance out.
        # `next` on a counter is atomic under the GIL.
        counter = itertools.count()

        def drain() -> None:
            while (index := next(counter)) < len(items):
                work(items[index])

        futures = [self._pool.submit(drain) for _ in range(threads)]
        wait(futures)
        for future in futures:
            future.result()
