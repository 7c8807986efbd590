"""Files that appear whole or not at all, and what is left of writers that were killed.

A file is written under a name of its own, ``.NAME.PID-RANDOM.tmp`` in the folder of its target, and
renamed when all of it is on disk. Its writer holds an advisory lock on it. A writer that is killed
leaves its file behind and its lock not, so the next one to the same target knows what nobody writes
any more, whichever machine or container the writer was in, and removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

AnyPath = str | os.PathLike[str]

#: Every so many bytes the disk is told to start, so that it works while the next ones are made.
_FLUSH_BYTES = 64 << 20
# Like fsync without the file's times; macOS has fsync only.
_flush = getattr(os, "fdatasync", os.fsync)


def write_atomically(path: AnyPath, chunks: Iterable[Any]) -> None:
    """Write chunks into a file that replaces ``path`` when all of it is on disk.

    Parameters
    ----------
    path : path
        The file. Leftovers of writers to the same path that were killed are removed.
    chunks : iterable of bytes-like
        Its content; each is written before the next is asked for.

    Raises
    ------
    OSError
        If the file cannot be written; as after any other interruption, an old file under this name
        is as it was.
    """
    target = Path(path)
    _remove_leftovers(target)
    temporary, lock = _create(target)
    try:
        try:
            # Closed before the rename, because closing may report a failed write, too; the lock
            # lasts until both are, so that nobody takes the complete file for a leftover.
            descriptor = os.dup(lock)
            try:
                _write(descriptor, chunks)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, target)
        finally:
            os.close(lock)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # The new name is durable only when the folder is.
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def leftovers(path: AnyPath) -> list[Path]:
    """List the temporary files of writers to ``path``, running or killed."""
    target = Path(path)
    pattern = re.compile(rf"\.{re.escape(target.name)}\.\d+-[0-9a-f]{{8}}\.tmp")
    return [file for file in target.parent.iterdir() if pattern.fullmatch(file.name)]


def _write(descriptor: int, chunks: Iterable[Any]) -> None:
    with ThreadPoolExecutor(1, thread_name_prefix="pagedtq-flush") as thread:
        flushing: Future[Any] | None = None
        waiting = 0
        for chunk in chunks:
            view = memoryview(chunk)
            while len(view):
                written = os.write(descriptor, view)
                view, waiting = view[written:], waiting + written
            if waiting >= _FLUSH_BYTES and (flushing is None or flushing.done()):
                _result(flushing)
                flushing, waiting = thread.submit(_flush, descriptor), 0
        _result(flushing)


def _result(flushing: Future[Any] | None) -> None:
    """Raise what a flush raised: the kernel reports a failed write to one call only."""
    if flushing is not None:
        flushing.result()


def _create(target: Path) -> tuple[Path, int]:
    """Create a temporary file for a target, and lock it."""
    while True:
        name = f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp"
        temporary = target.with_name(name)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        # Where a file system has no locks, leftovers cannot be told from files in use and stay.
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        # Between its creation and its lock it looked like a leftover; it may have been removed.
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of a target that nobody holds a lock on."""
    for file in leftovers(target):
        # Not ours to open, gone already, or locked by a writer that is alive: left alone.
        with contextlib.suppress(OSError):
            descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.unlink()
            finally:
                os.close(descriptor)
