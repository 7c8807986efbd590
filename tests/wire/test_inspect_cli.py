"""``pagedtq inspect`` and ``pagedtq convert``: what they print, write and return."""

from __future__ import annotations

import json

import msgspec
import numpy as np
import pytest
from wire_caches import append, assert_same_sequence, busy_cache, small_config

from pagedtq.cli import main
from pagedtq.wire import (
    SnapshotReport,
    export_pages,
    export_sequence,
    inspect_file,
    load_cache,
    read_config,
    save_cache,
)


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(command):
        try:
            code = main(command.split())
        except SystemExit as stop:
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def saved(tmp_path):
    cache = busy_cache(small_config(num_layers=2, num_kv_heads=2))
    save_cache(cache, tmp_path / "cache.ptq")
    return cache


def test_inspect_tells_people_what_is_in_a_file(cli, saved):
    code, out, err = cli("inspect cache.ptq")
    assert (code, err) == (0, "")
    assert "yes, every checksum matches" in out
    assert "2 layers, 2 KV heads, head_dim 8, pages of 16 tokens" in out
    assert "keys 2-bit TurboQuant mse, values 2-bit TurboQuant mse (2 layers)" in out
    assert "3 rings" in out
    states = [saved.state(seq) for seq in saved.tables.sequence_ids().tolist()]
    table = [line.split() for line in out.splitlines()[-6:]]
    assert [int(row[1]) for row in table] == [state.length for state in states]
    assert [int(row[2]) for row in table] == [state.coded for state in states]


def test_inspect_tells_machines_the_same(cli, saved):
    code, out, _ = cli("inspect cache.ptq --json")
    assert code == 0
    report = msgspec.json.decode(out, type=SnapshotReport)
    assert report == inspect_file("cache.ptq")
    assert report.config == saved.config
    assert (report.kind, report.whole, report.problem) == ("cache", True, None)
    stats = saved.stats()
    assert (report.num_pages, report.pages_shared) == (stats.pages_used, stats.pages_shared)
    assert report.num_rings == stats.window_slots_used
    assert sum(s.length for s in report.sequences) == stats.logical_tokens
    held = sum(16 * s.blocks - -s.length % 16 - 16 * s.evicted for s in report.sequences)
    assert held == stats.resident_tokens


def test_a_broken_file_is_described_as_far_as_it_goes_and_gives_code_1(cli, saved, tmp_path):
    data = bytearray((tmp_path / "cache.ptq").read_bytes())
    data[-100] ^= 4
    (tmp_path / "broken.ptq").write_bytes(data)
    code, out, _ = cli("inspect broken.ptq")
    assert code == 1
    assert "NO: sinks" in out or "NO: ring" in out
    assert "2 layers, 2 KV heads" in out
    (tmp_path / "cut.ptq").write_bytes(data[:90])
    code, out, _ = cli("inspect cut.ptq --json")
    assert code == 1
    answer = json.loads(out)
    assert (answer["whole"], answer["problem_field"], answer["problem_offset"]) == (
        False,
        "header",
        0,
    )
    assert answer["kind"] is None and answer["config"] is None


def test_inspect_knows_sequences_and_bare_pages_too(cli, saved, tmp_path):
    seq = int(saved.tables.sequence_ids()[0])
    (tmp_path / "sequence").write_bytes(b"".join(export_sequence(saved, seq)))
    (tmp_path / "pages").write_bytes(b"".join(export_pages(saved, np.array([1, 2]))))
    assert json.loads(cli("inspect sequence --json")[1])["kind"] == "sequence"
    pages = json.loads(cli("inspect pages --json")[1])
    assert (pages["kind"], pages["num_pages"], pages["whole"]) == ("pages", 2, True)
    assert cli("inspect pages")[0] == 0


def test_long_lists_of_sequences_are_cut_for_people_only(cli, tmp_path):
    cache = busy_cache(small_config())
    for _ in range(30):
        cache.open()
    save_cache(cache, tmp_path / "many")
    assert "... and 16 more" in cli("inspect many")[1]
    assert len(json.loads(cli("inspect many --json")[1])["sequences"]) == 36


def test_convert_changes_pool_order_and_size_and_no_page(cli, saved, tmp_path):
    code, out, err = cli(
        "convert cache.ptq other.ptq --pool-order page_major --num-pages 50 --num-window-slots 7"
    )
    assert (code, err) == (0, "")
    assert "other.ptq (snapshot" in out
    config = read_config(tmp_path / "other.ptq")
    assert (config.pool_order, config.num_pages, config.num_window_slots) == ("page_major", 50, 7)
    loaded = load_cache(tmp_path / "other.ptq")
    twins = loaded.tables.sequence_ids().tolist()
    for seq, twin in zip(saved.tables.sequence_ids().tolist(), twins):
        assert_same_sequence(saved, seq, loaded, twin)
    append(loaded, twins[0], 17)
    cli("convert other.ptq back.ptq --pool-order layer_major --num-pages 24 --num-window-slots 6")
    assert (tmp_path / "back.ptq").read_bytes() == (tmp_path / "cache.ptq").read_bytes()


def test_convert_decodes_to_safetensors(cli, saved, tmp_path):
    code, out, _ = cli("convert cache.ptq cache.safetensors --to safetensors --json")
    assert code == 0
    answer = json.loads(out)
    data = (tmp_path / "cache.safetensors").read_bytes()
    assert (answer["to"], answer["num_sequences"]) == ("safetensors", 6)
    assert answer["target_bytes"] == len(data)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    length = saved.length(int(saved.tables.sequence_ids()[4]))
    assert header["sequences.4.layers.1.values"]["shape"] == [length, 2, 8]


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("inspect absent", "cannot use absent: No such file"),
        ("convert absent out", "cannot use absent: No such file"),
        ("convert cache.ptq nowhere/out", "No such file"),
        ("convert cache.ptq out --num-pages 3", "need 7 pages, 2 free"),
        ("convert cache.ptq out --num-pages 1", "num_pages must be in"),
        ("convert cache.ptq out --to numpy", "invalid choice"),
        ("convert text out", "magic at byte 0"),
        ("convert", "required: SOURCE, TARGET"),
    ],
)
def test_wrong_usage_is_one_line_and_code_2(cli, saved, tmp_path, command, problem):
    (tmp_path / "text").write_text("not a snapshot" * 20)
    code, out, err = cli(command)
    assert (code, out) == (2, "")
    assert problem in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
