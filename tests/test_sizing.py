"""What a budget holds is what the layout says, and it never exceeds the budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedtq import CacheConfig, preset
from pagedtq.errors import ArgumentError, ConfigError
from pagedtq.models import MODELS, ModelShape
from pagedtq.paging.layout import PageLayout
from pagedtq.sizing import (
    Format,
    bytes_for,
    fit_to_budget,
    format_bytes,
    parse_bytes,
    plan_capacity,
)

LLAMA = MODELS["llama-3.1-8b"]
FORMATS = ("fp16", "fp8", "k4v4", "k4v4-w0", "k4v4-w128", "k3v3", "k2v2", "prod4v4", "exact")


@given(
    st.sampled_from(FORMATS),
    st.sampled_from(sorted(MODELS)),
    st.sampled_from([16, 64]),
    st.integers(30, 38),
    st.one_of(st.none(), st.floats(1, 5000)),
)
def test_a_plan_fits_the_budget_and_one_page_more_would_not(name, model, page_size, log, tokens):
    storage = Format.parse(name)
    config = storage.config(MODELS[model], page_size)
    budget = 3 << log
    plan = plan_capacity(config, budget, tokens_per_sequence=tokens, byte_share=storage.byte_share)
    assert plan.total_bytes <= budget < plan.total_bytes + plan.page_bytes
    assert plan.tokens == (plan.num_pages - 1) * page_size
    assert (plan.num_window_slots > 0) == (plan.window_slot_bytes > 0)


@pytest.mark.parametrize("name", ["k4v4", "k4v4-w0", "k2v2-w128", "exact"])
def test_fitting_and_counting_are_inverse(name):
    config = Format.parse(name).config(LLAMA)
    fitted = fit_to_budget(config, 4 << 30, max_sequences=20)
    assert bytes_for(fitted) <= 4 << 30
    assert bytes_for(fitted.replace(num_pages=fitted.num_pages + 1)) > 4 << 30
    if fitted.window_tokens and name != "exact":
        assert fitted.num_window_slots == 20
    # Asking for exactly these bytes gives the same pages back.
    assert fit_to_budget(config, bytes_for(fitted), max_sequences=20) == fitted


def test_window_slots_are_counted_with_their_sinks():
    config = preset("k4v4", num_layers=2, num_kv_heads=2, head_dim=128, num_pages=2)
    slot = 2 * 2 * (64 + 4) * 2 * 128 * 2
    assert PageLayout(config).window_slot_bytes == slot
    few, many = (plan_capacity(config, 1 << 26, max_sequences=n) for n in (1, 65))
    assert few.window_slot_bytes == slot
    assert (few.num_pages - many.num_pages) * few.page_bytes == pytest.approx(
        64 * slot, abs=few.page_bytes
    )


def test_slots_and_pages_are_balanced_for_an_expected_length():
    plan = plan_capacity(Format.parse("k4v4").config(LLAMA), 4 << 30, tokens_per_sequence=1000)
    pages_each = -(-1000 // 64)
    assert plan.usable_pages // pages_each in (plan.num_window_slots, plan.num_window_slots + 1)
    assert plan.sequences(1000) == plan.num_window_slots
    assert plan.sequences(10) == plan.num_window_slots
    assert plan.sequences(10**9) == 0


def test_known_bytes_per_token():
    sizes = {
        name: plan_capacity(
            Format.parse(name).config(LLAMA), 1 << 32, byte_share=Format.parse(name).byte_share
        ).page_bytes
        / 64
        for name in ("fp16", "fp8", "k4v4", "k3v3", "k2v2")
    }
    per_head = {name: size / LLAMA.num_layers / LLAMA.num_kv_heads for name, size in sizes.items()}
    assert per_head == {"fp16": 512, "fp8": 256, "k4v4": 132, "k3v3": 100, "k2v2": 68}


@pytest.mark.parametrize(
    ("name", "window"), [("fp16", 0), ("fp8", 0), ("k4v4", 64), ("k4v4-w0", 0), ("k8v4-w128", 128)]
)
def test_a_format_name_decides_the_window(name, window):
    assert Format.parse(name).config(LLAMA).window_tokens == window


@pytest.mark.parametrize(
    "name",
    ["", "k5v5", "fp4", "fp16-w64", "fp8-w0", "k4v4-", "k4v4-w", "k4v4-w-1", "k4v4-wx", "-w0"],
)
def test_an_unknown_format_is_refused_with_the_known_ones(name):
    with pytest.raises(ConfigError, match="there are: fp16, fp8, k8v8"):
        Format.parse(name)


def test_a_window_that_is_no_multiple_of_the_page_is_refused():
    with pytest.raises(ConfigError, match="multiple of page_size"):
        Format.parse("k4v4-w100").config(LLAMA)


@pytest.mark.parametrize(
    "arguments",
    [
        {"budget_bytes": 0},
        {"budget_bytes": 1 << 20},
        {"budget_bytes": 1 << 30, "max_sequences": 0},
        {"budget_bytes": 1 << 30, "max_sequences": -1},
        {"budget_bytes": 1 << 30, "max_sequences": 10_000},
    ],
)
def test_a_budget_that_holds_nothing_is_refused(arguments):
    config = Format.parse("k4v4").config(LLAMA)
    with pytest.raises(ArgumentError, match=r"need at least|at least 1"):
        plan_capacity(config, **arguments)
    if "max_sequences" not in arguments:
        with pytest.raises(ArgumentError, match="need at least"):
            fit_to_budget(config, **arguments)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("40GiB", 40 << 30),
        (" 512 MiB ", 512 << 20),
        ("1.5GB", 1_500_000_000),
        ("4096", 4096),
        ("2kB", 2000),
        ("1TiB", 1 << 40),
        ("7B", 7),
    ],
)
def test_sizes_are_read_with_binary_and_decimal_units(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "0", "0.1", "4gib", "4 G iB", "1e9", "nan"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ArgumentError, match="expected a size such as 40GiB"):
        parse_bytes(text)


def test_sizes_are_written_with_binary_units():
    written = [format_bytes(n) for n in (132, 1 << 20, 4 << 30, 3 << 40, 1536)]
    assert written == ["132 B", "1 MiB", "4 GiB", "3 TiB", "1.5 KiB"]


def test_every_named_model_makes_a_cache_configuration():
    for model in MODELS.values():
        assert isinstance(Format.parse("k4v4").config(model), CacheConfig)
        assert model.num_weights > 0


@pytest.mark.parametrize(
    "fields",
    [{"num_layers": 0}, {"num_q_heads": 7}, {"weight_bytes": -1}, {"bytes_per_weight": 0.0}],
)
def test_a_model_shape_that_cannot_be_is_refused(fields):
    good = {f: getattr(LLAMA, f) for f in LLAMA.__struct_fields__}
    with pytest.raises(ConfigError):
        ModelShape(**good | fields)
