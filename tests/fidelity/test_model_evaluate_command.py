"""``pagedtq evaluate`` on a tiny model in a folder."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from pagedtq import PagedKVCache
from pagedtq.cli import main
from pagedtq.integrations.transformers import PagedTQCache
from pagedtq.wire.settings import load_settings
from tests.fidelity.tiny_models import byte_tokenizer, llama

SMALL = ["--context", "64", "--windows", "1", "--calibration-tokens", "128"]
SMALL += ["--selection-windows", "1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    llama(vocab_size=256).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    (path / "text.txt").write_text("Each page holds sixteen tokens, or more. " * 20)
    return path


def evaluate(folder: Path, *options: str) -> int:
    return main(["evaluate", str(folder), "--text", str(folder / "text.txt"), *SMALL, *options])


def test_it_recommends_a_setting_that_a_cache_can_be_made_of(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    saved = tmp_path / "cache.json"
    assert evaluate(folder, "--budget", "40", "--save", str(saved), "--no-peers", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["recommendation"]["bytes_per_token"] <= 40 * 2 * 2
    settings = load_settings(saved)
    config = settings.config
    bits = [keys.bits for keys, _ in map(config.layer_codecs, range(2))]  # type: ignore[union-attr]
    assert bits == report["recommendation"]["key_bits"]
    PagedKVCache(config, key_means=settings.key_means).check_integrity()
    model = AutoModelForCausalLM.from_pretrained(folder)
    cache = PagedTQCache.from_model(model, settings)
    model(torch.arange(20)[None], past_key_values=cache)
    assert cache.get_seq_length() == 20


def test_the_table_has_a_line_per_setting_and_peer(folder: Path, capsys: Any) -> None:
    assert evaluate(folder, "--settings", "k4v4-w0,k3v3-w0-centred") == 0
    lines = capsys.readouterr().out.splitlines()
    first = [line.split()[0] for line in lines[3:] if line]
    assert first[:2] == ["k4v4-w0", "k3v3-w0-centred"]
    assert "vllm-4bit_nc" in first


def test_figures_are_drawn_where_asked(folder: Path, tmp_path: Path, capsys: Any) -> None:
    options = ["--settings", "k4v4-w0", "--budget", "40", "--plots", str(tmp_path / "figures")]
    assert evaluate(folder, *options) == 0
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    assert names == {"divergence_by_bytes.png", "perplexity_by_bytes.png", "sensitivities.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--context", "5000"], "the text has 820 tokens, expected at least"),
        (["--settings", "k9v9"], "unknown setting 'k9v9'"),
        (["--budget", "3"], "more than the budget of 12.0"),
        (["--save", "x.json"], "needs --budget"),
    ],
)
def test_bad_options_say_what_to_do(
    folder: Path, capsys: Any, options: list[str], message: str
) -> None:
    assert evaluate(folder, "--no-peers", *options) == 2
    assert message in capsys.readouterr().err


def test_a_folder_without_a_model_and_a_missing_text_are_named(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    text = str(folder / "text.txt")
    assert main(["evaluate", str(tmp_path), "--text", text]) == 2
    assert f"cannot load {tmp_path}" in capsys.readouterr().err
    assert main(["evaluate", str(folder), "--text", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


def test_without_torch_it_names_the_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert evaluate(folder) == 2
    assert "pagedtq[transformers]" in capsys.readouterr().err
