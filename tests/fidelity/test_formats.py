"""A cache's configuration as a format agrees with the cache itself."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedtq import PagedKVCache, preset
from pagedtq.config import CacheConfig, Exact, LayerOverride
from pagedtq.errors import ArgumentError, ConfigError
from pagedtq.fidelity.formats import CacheFormat, Uncompressed
from pagedtq.fidelity.settings import setting
from pagedtq.models import ModelShape
from pagedtq.paging import PageTables

SHAPE = ModelShape(
    name="m", num_layers=2, num_kv_heads=2, num_q_heads=4, head_dim=32, weight_bytes=0
)


def config(name: str = "k4v4", window: int | None = 0, **fields: object) -> CacheConfig:
    return preset(
        name,
        num_layers=2,
        num_kv_heads=2,
        head_dim=32,
        num_pages=12,
        page_size=16,
        window=window,
        **fields,
    )


def draw(tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (2, 2, tokens, 2, 32)
    keys, values = rng.standard_normal(shape).astype(np.float32)
    return keys, values


@pytest.mark.parametrize("name", ["k4v4", "k3v2", "prod4v4", "exact"])
def test_what_comes_back_is_what_a_cache_loads(name: str) -> None:
    keys, values = draw(50)
    means = np.full((2, 2, 32), 0.5, np.float32)
    form = CacheFormat(name, config(name), means)
    cache = PagedKVCache(config(name), key_means=means)
    seq = cache.open()
    cache.append(seq, keys, values)
    for layer in range(2):
        wanted = cache.load(layer, seq, exact=False)[:2]
        got = form.roundtrip(layer, keys[layer], values[layer])
        assert np.array_equal(got[0], wanted[0])
        assert np.array_equal(got[1], wanted[1])


@settings(max_examples=20)
@given(st.sampled_from([0, 16, 32]), st.integers(0, 16), st.integers(1, 150))
def test_spans_are_the_reads_of_a_cache_grown_token_by_token(
    window: int, sinks: int, length: int
) -> None:
    tables = PageTables(16, 12, window, sinks if window else 0, 1 if window else 0)
    seq = tables.open()
    for _ in range(length):
        tables.commit(tables.reserve([seq], 1))
    reads = tables.reads(np.array([seq]), window > 0)
    spans = CacheFormat("", config(window=window, sinks=sinks)).spans(0, np.array([length]))
    assert (spans.first[0], spans.key_stop[0]) == (reads.first[0], reads.stop[0])
    assert spans.value_stop[0] == reads.stop[0]


def test_exact_layers_are_read_from_their_pages_whole() -> None:
    exact = LayerOverride(layers=(0,), keys=Exact(), values=Exact())
    form = CacheFormat("", config(window=16, overrides=(exact,)))
    assert form.spans(0, np.array([100])).key_stop[0] == 100
    assert form.spans(1, np.array([100])).key_stop[0] == 84


@pytest.mark.parametrize("window", [0, 16])
@pytest.mark.parametrize("tokens", [1, 16, 17, 100])
def test_bytes_are_those_a_cache_reports_as_held(window: int, tokens: int) -> None:
    cache = PagedKVCache(config(window=window, num_window_slots=2))
    cache.append(cache.open(), *draw(tokens))
    report = cache.memory_report()
    held = report.pages_used_bytes + report.window_used_bytes
    assert CacheFormat("", config(window=window)).sequence_bytes(tokens) == held


def test_uncompressed_takes_two_bytes_a_number() -> None:
    assert Uncompressed(2, 2, 32).sequence_bytes(10) == 10 * 2 * 2 * 32 * 2 * 2


def test_settings_are_built_from_their_names() -> None:
    means = np.ones((2, 2, 32), np.float32)
    form = setting("k3v4-w128-centred", SHAPE, means, seed=3)
    assert (form.config.keys.bits, form.config.values.bits) == (3, 4)  # type: ignore[union-attr]
    assert (form.config.window, form.config.seed) == (128, 3)
    assert form.key_means is means
    assert setting("k4v4", SHAPE, means).key_means is None
    assert setting("k4v4", SHAPE).config.window_tokens == 64


def test_searched_settings_search_both_streams_and_change_nothing_else() -> None:
    plain, form = setting("k3v4-w64", SHAPE), setting("k3v4-w64-searched", SHAPE)
    for stream in ("keys", "values"):
        codec, searched = getattr(plain.config, stream), getattr(form.config, stream)
        assert searched == msgspec.structs.replace(codec, scale="searched")
    assert form.sequence_bytes(1000) == plain.sequence_bytes(1000)
    for name in ("prod4v4-searched", "exact-searched"):
        with pytest.raises(ConfigError, match="searched by MSE TurboQuant only"):
            setting(name, SHAPE)


@pytest.mark.parametrize("name", ["", "k4v5", "k4v4-w", "k4v4-centered", "k4v4 ", "k4v4-w0-x"])
def test_an_unknown_setting_is_refused_with_the_names_there_are(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected PRESET\[-wN\]\[-centred\].*k4v4"):
        setting(name, SHAPE)


def test_a_centred_setting_needs_means() -> None:
    with pytest.raises(ArgumentError, match="key means were not calibrated"):
        setting("k4v4-centred", SHAPE)
