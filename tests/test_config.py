"""Configuration: round trips, schema, presets, and every invariant's error."""

from __future__ import annotations

import json

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given

from pagedtq import PRESETS, CacheConfig, Exact, LayerOverride, TurboQuant, json_schema, preset
from pagedtq.config import PAGE_SIZES
from pagedtq.errors import ConfigError, PagedTQError

SHAPE = {"num_layers": 4, "num_kv_heads": 2, "head_dim": 64, "num_pages": 8}

dtypes = st.sampled_from(["f16", "bf16", "f32"])
estimators = st.sampled_from(["mse", "prod"])


@st.composite
def codecs(draw, stream):
    if draw(st.booleans()):
        return Exact(dtype=draw(dtypes))
    estimator = draw(estimators) if stream == "key" else "mse"
    return TurboQuant(
        bits=draw(st.integers(2 if estimator == "prod" else 1, 8)),
        estimator=estimator,
        scale=draw(st.sampled_from(["norm_corrected", "searched", "none", "unbiased"])),
        rotation=draw(st.sampled_from(["hadamard", "dense"])),
        projection=draw(st.sampled_from(["gaussian", "orthogonal"])),
        unit_norm=draw(st.booleans()),
    )


@st.composite
def configs(draw):
    num_layers = draw(st.integers(1, 80))
    page_size = draw(st.sampled_from(PAGE_SIZES))
    layers = draw(st.lists(st.integers(0, num_layers - 1), unique=True, max_size=4))
    return CacheConfig(
        num_layers=num_layers,
        num_kv_heads=draw(st.integers(1, 64)),
        head_dim=draw(st.integers(3, 512)),
        num_pages=draw(st.integers(2, 1 << 20)),
        page_size=page_size,
        keys=draw(codecs("key")),
        values=draw(codecs("value")),
        overrides=tuple(
            LayerOverride(
                layers=(layer - draw(st.sampled_from([0, num_layers])),),
                keys=draw(codecs("key")),
                values=draw(codecs("value")),
            )
            for layer in layers
        ),
        window=draw(st.none() | st.integers(0, 4).map(lambda pages: pages * page_size)),
        sinks=draw(st.integers(0, page_size)),
        num_window_slots=draw(st.integers(1, 1 << 12)),
        num_host_pages=draw(st.integers(0, 1 << 12)),
        kv_dtype=draw(dtypes),
        seed=draw(st.integers(0, (1 << 64) - 1)),
        first_kv_head=draw(st.integers(0, 1 << 10)),
        key_bounds=draw(st.booleans()),
        pool_order=draw(st.sampled_from(["layer_major", "page_major"])),
    )


@given(configs())
def test_json_round_trip_gives_an_equal_config(config):
    assert CacheConfig.from_json(config.to_json()) == config


@given(configs())
def test_toml_round_trip_gives_an_equal_config(config):
    assert CacheConfig.from_toml(config.to_toml()) == config


@given(configs())
def test_equal_configs_hash_alike_and_can_key_a_dict(config):
    assert {config: "here"}[CacheConfig.from_json(config.to_json())] == "here"


@given(configs())
def test_every_layer_has_the_override_that_names_it_from_either_end(config):
    named = {}
    for override in config.overrides:
        for layer in override.layers:
            named[layer % config.num_layers] = (override.keys, override.values)
    for layer in range(config.num_layers):
        expected = named.get(layer, (config.keys, config.values))
        assert config.layer_codecs(layer) == expected


def test_json_holds_only_plain_names_and_the_tag_of_each_codec():
    fields = json.loads(preset("k4v3", **SHAPE).to_json())
    assert fields["keys"]["kind"] == "turboquant"
    assert fields["keys"]["bits"] == 4
    assert fields["values"]["bits"] == 3
    assert fields["window"] is None


def test_toml_leaves_the_default_window_out_because_it_has_no_null():
    text = preset("k4v4", **SHAPE).to_toml().decode()
    assert "window" not in text.replace("num_window_slots", "")
    assert "num_layers = 4" in text


def test_codec_is_read_by_its_tag():
    text = '{"num_layers":4,"num_kv_heads":2,"head_dim":64,"num_pages":8,"keys":%s}'
    config = CacheConfig.from_json(text % '{"kind":"exact","dtype":"bf16"}')
    assert config.keys == Exact(dtype="bf16")
    config = CacheConfig.from_json(text % '{"kind":"turboquant","bits":2}')
    assert config.keys == TurboQuant(bits=2)
    assert config.values == TurboQuant()


def test_schema_names_every_field_and_refuses_others():
    schema = json_schema()
    root = schema["$defs"]["CacheConfig"]
    assert schema["$ref"].endswith("/CacheConfig")
    assert set(root["properties"]) == set(CacheConfig.__struct_fields__)
    assert root["required"] == list(SHAPE)
    for name in ("CacheConfig", "TurboQuant", "Polar", "Exact", "LayerOverride"):
        assert schema["$defs"][name]["additionalProperties"] is False
    assert root["properties"]["keys"]["discriminator"]["propertyName"] == "kind"
    json.dumps(schema)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_its_codec_pair_in_a_valid_config(name):
    config = preset(name, **SHAPE)
    assert (config.keys, config.values) == PRESETS[name]
    assert CacheConfig.from_json(config.to_json()) == config


def test_preset_names_say_their_bits():
    assert PRESETS["k3v2"] == (TurboQuant(bits=3), TurboQuant(bits=2))
    assert PRESETS["prod4v4"][0] == TurboQuant(bits=4, estimator="prod")
    assert PRESETS["exact"] == (Exact(dtype="f16"), Exact(dtype="f16"))


def test_prod_spends_one_of_its_bits_on_the_sign_sketch():
    assert TurboQuant(bits=4, estimator="prod").code_bits == 3
    assert TurboQuant(bits=4).code_bits == 4


def test_codecs_print_as_words():
    assert str(TurboQuant(bits=3)) == "3-bit TurboQuant mse"
    assert str(Exact(dtype="bf16")) == "exact bf16"


def test_window_defaults_to_one_page_and_zero_turns_it_and_the_sinks_off():
    config = preset("k4v4", **SHAPE, page_size=32)
    assert (config.window_tokens, config.num_sinks) == (32, 4)
    off = config.replace(window=0)
    assert (off.window_tokens, off.num_sinks) == (0, 0)
    assert off.replace(num_window_slots=0).num_window_slots == 0


def test_overlay_is_kept_by_layers_with_a_coded_stream_only():
    exact = LayerOverride(layers=(0, -1), keys=Exact(), values=Exact())
    half = LayerOverride(layers=(1,), keys=Exact(), values=TurboQuant())
    config = CacheConfig(**SHAPE, overrides=(exact, half))
    assert [config.has_overlay(layer) for layer in range(4)] == [False, True, True, False]
    off = config.replace(window=0)
    assert not any(off.has_overlay(layer) for layer in range(4))


def test_replace_returns_a_checked_copy():
    config = preset("k4v4", **SHAPE)
    assert config.replace(page_size=16, sinks=16).page_size == 16
    assert config.page_size == 64
    with pytest.raises(ConfigError, match="num_pages must be in"):
        config.replace(num_pages=1)
    with pytest.raises(ConfigError, match="sinks must be in"):
        config.replace(page_size=16, sinks=17)


def test_config_cannot_be_changed_in_place():
    config = preset("k4v4", **SHAPE)
    with pytest.raises(AttributeError):
        config.num_pages = 3


PROD = TurboQuant(estimator="prod")
TWICE = LayerOverride(layers=(1, -3), keys=Exact(), values=Exact())
BEYOND = LayerOverride(layers=(4,), keys=Exact(), values=Exact())
BEFORE = LayerOverride(layers=(-5,), keys=Exact(), values=Exact())

BAD_FIELDS = [
    ({"num_layers": 0}, r"num_layers must be in \[1, 65536\], got 0"),
    ({"num_layers": 1 << 17}, "num_layers must be in"),
    ({"num_kv_heads": 0}, r"num_kv_heads must be in \[1, 65536\], got 0"),
    ({"head_dim": 2}, r"head_dim must be in \[3, 4096\], got 2"),
    ({"head_dim": 5000}, "head_dim must be in"),
    ({"num_pages": 1}, r"num_pages must be in \[2, 2147483647\], got 1"),
    ({"num_pages": 1 << 31}, "num_pages must be in"),
    ({"num_pages": 8.0}, "num_pages must be a Python int, got float"),
    ({"num_pages": np.int64(8)}, "num_pages must be a Python int, got int64"),
    ({"num_pages": True}, "num_pages must be a Python int, got bool"),
    ({"page_size": 48}, "page_size must be one of 16, 32, 64, 128, 256; got 48"),
    ({"page_size": 64.0}, "page_size must be a Python int, got float"),
    ({"kv_dtype": "f8"}, "kv_dtype must be one of f16, bf16, f32; got 'f8'"),
    ({"pool_order": "random"}, "pool_order must be one of layer_major, page_major"),
    ({"seed": -1}, "seed must be in"),
    ({"seed": 1 << 64}, "seed must be in"),
    ({"first_kv_head": -1}, "first_kv_head must be in"),
    ({"window": -64}, "window must be in"),
    ({"window": 32}, "window must be a multiple of page_size 64, got 32"),
    ({"window": True}, "window must be a Python int, got bool"),
    ({"sinks": -1}, "sinks must be in"),
    ({"sinks": 65}, r"sinks must be in \[0, 64\], got 65"),
    ({"num_window_slots": 0}, "num_window_slots must be in"),
    ({"num_window_slots": -1, "window": 0}, "num_window_slots must be in"),
    ({"keys": "k4"}, "keys must be TurboQuant, Polar or Exact, got str"),
    ({"values": None}, "values must be TurboQuant, Polar or Exact, got NoneType"),
    ({"values": PROD}, "values cannot use estimator"),
    ({"overrides": (LayerOverride(layers=(0,), keys=PROD, values=PROD),)}, "values cannot use"),
    ({"overrides": (TWICE,)}, "layer 1 is overridden twice"),
    ({"overrides": (BEYOND,)}, "override names layer 4 of 4"),
    ({"overrides": (BEFORE,)}, "override names layer -5 of 4"),
    ({"overrides": [TWICE]}, "overrides must be a tuple of LayerOverride"),
    ({"overrides": ("first",)}, "overrides must be a tuple of LayerOverride"),
    ({"key_bounds": 1}, "key_bounds must be a bool, got int"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_FIELDS, ids=lambda case: str(case)[:40])
def test_contradicting_field_is_refused_by_name(fields, message):
    with pytest.raises(ConfigError, match=message):
        CacheConfig(**SHAPE | fields)


BAD_CODECS = [
    (TurboQuant, {"bits": 0}, r"bits must be in \[1, 8\], got 0"),
    (TurboQuant, {"bits": 9}, r"bits must be in \[1, 8\], got 9"),
    (TurboQuant, {"bits": 4.0}, "bits must be a Python int"),
    (TurboQuant, {"bits": 1, "estimator": "prod"}, r"bits must be in \[2, 8\], got 1"),
    (TurboQuant, {"estimator": "qjl"}, "estimator must be one of mse, prod; got 'qjl'"),
    (TurboQuant, {"scale": "max"}, "scale must be one of"),
    (TurboQuant, {"rotation": "none"}, "rotation must be one of hadamard, dense"),
    (TurboQuant, {"projection": "srht"}, "projection must be one of gaussian, orthogonal"),
    (TurboQuant, {"unit_norm": 1}, "unit_norm must be a bool, got int"),
    (TurboQuant, {"seed_offset": -1}, "seed_offset must be in"),
    (TurboQuant, {"seed_offset": 1 << 64}, "seed_offset must be in"),
    (Exact, {"dtype": "f64"}, "dtype must be one of f16, bf16, f32; got 'f64'"),
    (LayerOverride, {"layers": 0}, "layers must be a tuple of int, got int"),
    (LayerOverride, {"layers": (0.5,)}, "layers must be a tuple of int"),
    (LayerOverride, {"layers": (0,), "keys": 4}, "keys must be TurboQuant, Polar or Exact"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), BAD_CODECS)
def test_bad_codec_is_refused_by_name(kind, fields, message):
    if kind is LayerOverride:
        fields = {"keys": Exact(), "values": Exact()} | fields
    with pytest.raises(ConfigError, match=message):
        kind(**fields)


BAD_TEXTS = [
    ('{"num_layers":4}', "missing required field `num_kv_heads`"),
    ('{"num_layers":4,"pages":1}', "unknown field `pages`"),
    ('{"num_layers":"4"}', r"Expected `int`, got `str` - at `\$.num_layers`"),
    ('{"keys":{"kind":"lattice"}}', r"Invalid value 'lattice' - at `\$.keys.kind`"),
    ('{"keys":{"bits":4}}', "missing required field `kind`"),
    ('{"keys":{"kind":"exact","bits":4}}', r"unknown field `bits` - at `\$.keys`"),
    ('{"keys":{"kind":"turboquant","bits":12}}', r"bits must be in \[1, 8\], got 12"),
    ('{"num_layers":4', "truncated"),
]


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS)
def test_bad_json_says_what_and_where(text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        CacheConfig.from_json(text)
    assert isinstance(caught.value, PagedTQError)
    assert isinstance(caught.value.__cause__, msgspec.MsgspecError)


def test_decoding_runs_the_same_invariants_as_building():
    text = preset("k4v4", **SHAPE).to_json().replace(b'"sinks":4', b'"sinks":65')
    with pytest.raises(ConfigError, match=r"sinks must be in \[0, 64\], got 65"):
        CacheConfig.from_json(text)


def test_bad_toml_says_what_and_where():
    with pytest.raises(ConfigError, match="unknown field `pages`"):
        CacheConfig.from_toml("num_layers = 4\npages = 3\n")
    with pytest.raises(ConfigError):
        CacheConfig.from_toml("num_layers = = 4")


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(ConfigError, match="unknown preset 'k5v5'; there are: k8v8, k8v4, k4v4"):
        preset("k5v5", **SHAPE)
