"""Threads that share a list of work."""

import threading
import time

import pytest

from pagedtq.backends.workers import Workers


def test_an_exception_waits_until_every_thread_has_stopped():
    started, running = threading.Barrier(2, timeout=10), set()

    def work(item):
        running.add(item)
        started.wait()
        if item == 0:
            running.remove(item)
            raise ValueError("the first piece is bad")
        time.sleep(0.05)
        running.remove(item)

    with pytest.raises(ValueError, match="first piece"):
        Workers(2).run(work, [0, 1], parallel=True)
    assert not running


@pytest.mark.parametrize("num_threads", [1, 2, None])
def test_every_item_is_done_once(num_threads):
    done = []
    Workers(num_threads).run(done.append, list(range(100)), parallel=True)
    assert sorted(done) == list(range(100))
