"""Compiled kernels on disk: found again, never wrong, and never in the way."""

import pytest

from pagedtq.backends import kernel_cache, kernel_source
from pagedtq.backends.kernel_cache import cache_folder, entry_name, load_image
from pagedtq.backends.kernel_source import Cubin, specialise

SPECIAL = specialise("store.cu", {"A": 1})


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """What was compiled, into a cache of this test's own."""
    done = []

    def compile_cubin(special, arch):
        done.append((special, arch))
        return Cubin(f"machine code {len(done)}".encode(), 1, 0, 0)

    monkeypatch.setattr(kernel_source, "compile_cubin", compile_cubin)
    monkeypatch.setattr(kernel_source, "compiler_build", lambda: "build 1")
    monkeypatch.setenv(kernel_cache.FOLDER, str(tmp_path / "cache"))
    return done


def test_what_was_compiled_once_is_found_again(compiled, tmp_path):
    first = load_image(SPECIAL, 90)
    assert load_image(SPECIAL, 90) == first == b"machine code 1"
    assert compiled == [(SPECIAL, 90)]
    (entry,) = (tmp_path / "cache").iterdir()
    assert entry.suffix == ".cubin" and (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_whatever_decides_the_machine_code_makes_another_entry(compiled, monkeypatch, tmp_path):
    header = tmp_path / "rows.cuh"
    header.write_text("// one")
    elsewhere = specialise(str(tmp_path / "plain.cu"), {})
    names = [entry_name(SPECIAL, 90), entry_name(SPECIAL, 80), entry_name(elsewhere, 90)]
    names.append(entry_name(specialise("store.cu", {"A": 2}), 90))
    names.append(entry_name(specialise("seal.cu", {"A": 1}), 90))
    header.write_text("// another")
    kernel_source._digest_of.cache_clear()
    names.append(entry_name(elsewhere, 90))
    monkeypatch.setattr(kernel_source, "source_digest", lambda: "f" * 64)
    names.append(entry_name(SPECIAL, 90))
    monkeypatch.setattr(kernel_source, "compiler_build", lambda: "build 2")
    names.append(entry_name(SPECIAL, 90))
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 100])
def test_a_damaged_entry_is_compiled_again_and_replaced(compiled, tmp_path, damage):
    load_image(SPECIAL, 90)
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(damage)
    assert load_image(SPECIAL, 90) == load_image(SPECIAL, 90) == b"machine code 2"
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_a_folder_that_cannot_be_written_costs_time_only(compiled, monkeypatch, tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("in the way")
    monkeypatch.setenv(kernel_cache.FOLDER, str(blocked / "cache"))
    assert [load_image(SPECIAL, 90) for _ in range(2)] == [b"machine code 1", b"machine code 2"]

    def full(*args):
        raise OSError("no space left on device")

    monkeypatch.setenv(kernel_cache.FOLDER, str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_cache.os, "replace", full)
    assert load_image(SPECIAL, 90) == b"machine code 3"
    assert not list((tmp_path / "cache").iterdir())


def test_an_empty_name_keeps_nothing_and_no_name_means_the_users_cache(compiled, monkeypatch):
    monkeypatch.setenv(kernel_cache.FOLDER, "")
    assert cache_folder() is None
    load_image(SPECIAL, 90), load_image(SPECIAL, 90)
    assert len(compiled) == 2
    monkeypatch.delenv(kernel_cache.FOLDER)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(cache_folder()) == "/somewhere/pagedtq/kernels"
