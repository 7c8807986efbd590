"""A save that is interrupted leaves the old file; a finished one is on disk under its name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from wire_caches import append, assert_same_sequence, one_sequence, small_config

from pagedtq.wire import load_cache, save_cache, save_tensors
from pagedtq.wire.atomic import leftovers, write_atomically


@pytest.fixture
def old(tmp_path):
    """A folder with a saved cache, and a cache that is to replace it."""
    cache, seq = one_sequence(small_config(num_pages=100))
    path = tmp_path / "cache.ptq"
    save_cache(cache, path)
    append(cache, seq, 700)
    return cache, path, path.read_bytes()


class Interruption(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


def count_calls(monkeypatch, name, cache, path):
    calls = []
    real = getattr(os, name)
    monkeypatch.setattr(os, name, lambda *a, **k: (calls.append(a), real(*a, **k))[1])
    save_cache(cache, path)
    monkeypatch.undo()
    return len(calls)


def fail_at(monkeypatch, name, at, error):
    real, calls = getattr(os, name), []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) > at:
            if name == "write":
                # Part of it reached the disk.
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            raise error
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interruption()])
def test_an_interruption_at_any_write_leaves_the_old_file(old, monkeypatch, error):
    cache, path, before = old
    # Small pieces, so that there are many writes.
    monkeypatch.setattr("pagedtq.wire.writing.PIECE_BYTES", 700)
    with monkeypatch.context() as patched:
        writes = count_calls(patched, "write", cache, path.with_name("other"))
    path.with_name("other").unlink()
    monkeypatch.setattr("pagedtq.wire.writing.PIECE_BYTES", 700)
    assert writes > 10
    for at in range(writes):
        with monkeypatch.context() as patched:
            fail_at(patched, "write", at, error)
            with pytest.raises(type(error)):
                save_cache(cache, path)
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]
    save_cache(cache, path)
    assert path.read_bytes() != before


@pytest.mark.parametrize("step", ["fsync", "close", "replace"])
def test_an_interruption_behind_the_last_write_leaves_the_old_file(old, monkeypatch, step):
    cache, path, before = old
    with monkeypatch.context() as patched:
        fail_at(patched, step, 0, OSError(5, "Input/output error"))
        with pytest.raises(OSError, match="Input/output error"):
            save_cache(cache, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_error_while_gathering_leaves_the_old_file(old, monkeypatch):
    cache, path, before = old

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(type(cache.backend.pages), "gather", fail)
    with pytest.raises(MemoryError):
        save_cache(cache, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_short_writes_are_continued(old, monkeypatch):
    cache, path, _ = old
    real = os.write
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda fd, data: real(fd, bytes(data)[:777]))
        save_cache(cache, path)
    loaded = load_cache(path)
    seq = int(cache.tables.sequence_ids()[0])
    assert_same_sequence(cache, seq, loaded, int(loaded.tables.sequence_ids()[0]))


def test_bytes_are_on_disk_before_the_name_and_the_name_before_the_return(old, monkeypatch):
    cache, path, _ = old
    order = []
    for name in ("write", "fsync", "replace"):
        real = getattr(os, name)

        def noted(*arguments, _name=name, _real=real):
            order.append(_name)
            return _real(*arguments)

        monkeypatch.setattr(os, name, noted)
    save_cache(cache, path)
    assert order[-4:] == ["write", "fsync", "replace", "fsync"]


def test_a_loaded_cache_may_be_saved_over_its_own_file(old):
    _, path, before = old
    loaded = load_cache(path)
    save_cache(loaded, path)
    assert path.read_bytes() == before


def test_tensors_are_saved_atomically_too(old, monkeypatch):
    cache, path, before = old
    with monkeypatch.context() as patched:
        fail_at(patched, "write", 2, OSError(28, "No space left on device"))
        with pytest.raises(OSError, match="No space"):
            save_tensors(cache, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.slow
def test_a_process_killed_at_any_step_leaves_the_old_file_or_the_new_one_whole(tmp_path):
    script = Path(__file__).with_name("killed_saves.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    saves = report["saves"]
    finished = next(i for i, save in enumerate(saves) if not save["killed"])
    # Every write, the sync, the rename, and the sync of the folder.
    assert finished > 10
    assert [save["content"] for save in saves[: finished + 1]] == [
        *["old"] * (finished - 1),
        # Killed behind the rename, which may be lost to a power failure but not to this.
        "new",
        "new",
    ]
    assert {save["content"] for save in saves} == {"old", "new"}
    # What one leaves the next removes, so that they never add up.
    assert max(save["left"] for save in saves) == 1
    assert report["at last"] == ["cache.ptq", "new"]


def test_a_file_that_is_being_written_is_not_a_leftover(tmp_path):
    path = tmp_path / "cache.ptq"
    seen = []

    def chunks():
        yield b"outer "
        write_atomically(path, [b"inner"])
        seen.append((path.read_bytes(), len(leftovers(path))))
        yield b"file"

    write_atomically(path, chunks())
    assert seen == [(b"inner", 1)]
    assert path.read_bytes() == b"outer file"
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_of_this_file_only_are_removed(tmp_path):
    path = tmp_path / "a+b.ptq"
    stale = tmp_path / ".a+b.ptq.123-0123abcd.tmp"
    others = {
        tmp_path / name
        for name in (".aab.ptq.123-0123abcd.tmp", ".a+b.ptq.123.tmp", "a+b.ptq.123-0123abcd.tmp")
    }
    for file in (stale, *others):
        file.write_bytes(b"x")
    assert leftovers(path) == [stale]
    write_atomically(path, [b"whole"])
    assert set(tmp_path.iterdir()) == {path, *others}


def test_a_failed_flush_on_the_way_is_not_lost(tmp_path, monkeypatch):
    path = tmp_path / "cache.ptq"
    path.write_bytes(b"old")
    errors = [OSError(5, "Input/output error")]

    def flush(_):
        # The kernel tells one call only.
        if errors:
            raise errors.pop()

    monkeypatch.setattr("pagedtq.wire.atomic._flush", flush)
    monkeypatch.setattr("pagedtq.wire.atomic._FLUSH_BYTES", 2)
    with pytest.raises(OSError, match="Input/output error"):
        write_atomically(path, [b"new"] * 3)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
