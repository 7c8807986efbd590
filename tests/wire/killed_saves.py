"""Saves in processes that are killed with SIGKILL; prints what each left behind, as JSON.

``python killed_saves.py FOLDER``. Each save is a forked child. Some die at a chosen system call,
halfway through it where it is a write; some at a random moment.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from wire_caches import append, one_sequence, small_config

import pagedtq.wire.atomic
import pagedtq.wire.writing
from pagedtq.wire import save_cache
from pagedtq.wire.atomic import leftovers


def die_at(at):
    """Make the process kill itself at its n-th call that changes the disk."""
    calls = 0

    def dying(name, real):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls > at:
                if name == "write":
                    real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments)

        return call

    for name in ("write", "fsync", "replace"):
        setattr(os, name, dying(name, getattr(os, name)))


def in_child(cache, path, at=None):
    child = os.fork()
    if child == 0:
        if at is not None:
            die_at(at)
        save_cache(cache, path)
        os._exit(0)
    return child


def main(folder):
    path = folder / "cache.ptq"
    pagedtq.wire.writing.PIECE_BYTES = 700
    cache, seq = one_sequence(small_config(num_pages=100))
    save_cache(cache, path)
    old = path.read_bytes()
    append(cache, seq, 700)
    save_cache(cache, folder / "new")
    new = (folder / "new").read_bytes()
    found = []

    def look(status):
        data = path.read_bytes()
        content = "old" if data == old else "new" if data == new else "neither"
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        found.append({"killed": killed, "content": content, "left": len(leftovers(path))})
        path.write_bytes(old)
        return killed

    at = 0
    while look(os.waitpid(in_child(cache, path, at), 0)[1]):
        at += 1
    moments = random.Random(1)
    for _ in range(30):
        child = in_child(cache, path)
        time.sleep(moments.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        look(os.waitpid(child, 0)[1])
    save_cache(cache, path)
    print(json.dumps({"saves": found, "at last": sorted(file.name for file in folder.iterdir())}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
