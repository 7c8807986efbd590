"""Settings files: what was saved, or a typed error."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedtq import Exact, LayerOverride, TurboQuant, preset
from pagedtq.errors import (
    ArgumentError,
    WireChecksum,
    WireError,
    WireMalformed,
    WireMismatch,
    WireVersion,
)
from pagedtq.wire import CacheSettings, load_settings, save_settings

CONFIG = preset("k3v3", num_layers=2, num_kv_heads=3, head_dim=8, num_pages=2).replace(
    overrides=(LayerOverride(layers=(-1,), keys=Exact(), values=TurboQuant(bits=2)),)
)
MEANS = np.random.default_rng(0).standard_normal((2, 3, 8)).astype(np.float32)


@pytest.fixture
def path(tmp_path):
    save_settings(
        CacheSettings(config=CONFIG, key_means=MEANS, model_digest="ab" * 32, num_tokens=400),
        tmp_path / "settings.json",
    )
    return tmp_path / "settings.json"


def test_what_is_saved_is_loaded(path):
    loaded = load_settings(path)
    assert loaded.config == CONFIG
    assert np.array_equal(loaded.key_means, MEANS)
    assert (loaded.model_digest, loaded.num_tokens) == ("ab" * 32, 400)


def test_settings_without_means_fit_any_model(tmp_path):
    save_settings(CacheSettings(config=CONFIG), tmp_path / "plain.json")
    loaded = load_settings(tmp_path / "plain.json")
    assert loaded.key_means is None
    loaded.refuse_other_model("cd" * 32)


def test_settings_of_another_model_are_refused(path):
    loaded = load_settings(path)
    loaded.refuse_other_model("ab" * 32)
    with pytest.raises(WireMismatch, match="made for model abababababab, this one is cdcd"):
        loaded.refuse_other_model("cd" * 32)


@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path_factory, place, bit):
    folder = tmp_path_factory.mktemp("settings")
    save_settings(CacheSettings(config=CONFIG, key_means=MEANS), folder / "a.json")
    raw = bytearray((folder / "a.json").read_bytes())
    raw[int(place * len(raw))] ^= 1 << bit
    (folder / "b.json").write_bytes(raw)
    try:
        loaded = load_settings(folder / "b.json")
    except WireError:
        return
    # White space only.
    assert loaded.config == CONFIG and np.array_equal(loaded.key_means, MEANS)


def edited(path, **changes):
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(fields))
    return path


def test_an_edited_field_no_longer_matches_its_checksum(path):
    with pytest.raises(WireChecksum):
        load_settings(edited(path, num_tokens=401))


def test_order_and_spacing_of_the_file_do_not_matter(path):
    fields = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(fields.items()))))
    assert load_settings(path).config == CONFIG


@pytest.mark.parametrize(
    "changes", [{"surplus": 1}, {"config": {"num_layers": 0}}, {"key_means": "!"}, {"sha256": 5}]
)
def test_what_is_no_settings_file_is_malformed(path, changes):
    with pytest.raises(WireMalformed, match="not a settings file"):
        load_settings(edited(path, **changes))


def test_another_version_is_named(path):
    with pytest.raises(WireVersion, match="expected 1, got 2"):
        load_settings(edited(path, pagedtq_settings=2))


@pytest.mark.parametrize(
    "means", [MEANS[:1], MEANS.astype(np.float64), np.full_like(MEANS, np.inf)]
)
def test_means_that_do_not_fit_the_configuration_are_refused(means):
    with pytest.raises(ArgumentError, match="key_means must be"):
        CacheSettings(config=CONFIG, key_means=means)
