"""Divergences, perplexities and errors of heads are what their names say."""

from typing import Any

import numpy as np
import pytest
import torch

from pagedtq import preset
from pagedtq.errors import ArgumentError, UnsupportedError
from pagedtq.fidelity.attention import Reading
from pagedtq.fidelity.evaluation import Plan, evaluate, probe
from pagedtq.fidelity.formats import CacheFormat, Uncompressed
from pagedtq.fidelity.measures import HeadErrors, Reference
from pagedtq.fidelity.peer_formats import vllm_preset
from tests.fidelity.tiny_models import llama, mistral

SHAPE = (2, 2, 32)
EXACT = Uncompressed(*SHAPE)
IDS = np.random.default_rng(0).integers(0, 64, 1000)


@pytest.fixture(scope="module")
def model() -> Any:
    return llama()


def form(name: str, window: int = 0) -> CacheFormat:
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 32, "num_pages": 2, "page_size": 16}
    return CacheFormat(name, preset(name, **shape, window=window))


def test_an_exact_cache_diverges_from_itself_by_nothing(model: Any) -> None:
    found = Reference(model, IDS[:160].reshape(2, 80)).measure(EXACT, EXACT)
    assert found.kl == pytest.approx(0, abs=1e-10)
    assert found.perplexity_change == pytest.approx(0, abs=1e-6)
    assert (found.top1_agreement, found.compression) == (1.0, 1.0)
    assert found.output_error < 1e-6


def test_perplexity_is_the_models_own_loss_over_second_halves(model: Any) -> None:
    windows = IDS[:160].reshape(2, 80)
    ids = torch.from_numpy(windows)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits.double()
    losses = torch.nn.functional.cross_entropy(
        logits[:, 40:-1].flatten(0, 1), ids[:, 41:].flatten(), reduction="none"
    )
    wanted = float(losses.mean().exp())
    assert Reference(model, windows).perplexity == pytest.approx(wanted, rel=1e-6)


def test_divergence_is_the_sum_over_the_vocabulary(model: Any) -> None:
    windows, coded = IDS[:80][None], form("k2v2")
    from pagedtq.fidelity.attention import reading

    ids = torch.from_numpy(windows)
    with torch.no_grad():
        exact = torch.softmax(model(ids, use_cache=False).logits[0, 40:-1].double(), -1).numpy()
        with reading(model, Reading(coded)):
            got = torch.softmax(model(ids, use_cache=False).logits[0, 40:-1].double(), -1).numpy()
    wanted = (exact * np.log(exact / got)).sum(axis=1).mean()
    reference = Reference(model, windows)
    assert reference.divergence(Reading(coded)) == pytest.approx(wanted, rel=1e-9)
    assert reference.measure(coded, EXACT).kl == pytest.approx(wanted, rel=1e-9)
    assert wanted > 1e-3


def test_more_bits_and_a_window_diverge_less(model: Any) -> None:
    reference = Reference(model, IDS[:480].reshape(3, 160))
    kl = [
        reference.divergence(Reading(f))
        for f in (form("k2v2"), form("k3v3"), form("k4v4"), form("k4v4", 64))
    ]
    assert kl == sorted(kl, reverse=True)
    assert kl[0] > 10 * kl[2]


def test_errors_of_heads_are_means_over_scored_positions() -> None:
    errors = HeadErrors(first=2)
    wanted = torch.ones(2, 6, 4)
    out = wanted.clone()
    out[0] *= 1.5
    out[1, :2] *= 9  # not scored
    out[1, 2:4] *= 1.1
    errors(3, None, None, None, out, wanted)  # type: ignore[arg-type]
    assert errors.by_layer()[3] == pytest.approx([0.5, 0.05], rel=1e-5)
    assert errors.mean() == pytest.approx(0.275, rel=1e-5)
    assert [(h.layer, h.head) for h in errors.worst(1)] == [(3, 0)]


def test_windows_must_be_a_rectangle_of_some_tokens(model: Any) -> None:
    with pytest.raises(ArgumentError, match=r"\[count, context >= 4\], got \(2, 3\)"):
        Reference(model, np.zeros((2, 3), np.int64))


def test_a_probe_finds_shape_and_key_means(model: Any) -> None:
    shape, means = probe(model, IDS[:150])
    assert (shape.num_layers, shape.num_kv_heads, shape.num_q_heads, shape.head_dim) == (
        2,
        2,
        4,
        32,
    )
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.no_grad():
        model(torch.from_numpy(IDS[:150][None]), past_key_values=cache)
    for layer in range(2):
        wanted = cache.layers[layer].keys[0].mean(dim=1).numpy()
        assert means[layer] == pytest.approx(wanted, abs=1e-5)


def test_a_model_without_replaceable_attention_is_refused() -> None:
    class Bare(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()
            self.config = self.inner.config

        def set_attn_implementation(self, name: str) -> None:
            """Accept and ignore, as a model with attention of its own."""

        def forward(self, ids: Any, use_cache: bool) -> Any:
            return self.inner(ids, use_cache=use_cache)

    with pytest.raises(UnsupportedError, match="in all 2 layers"):
        probe(Bare(), IDS[:150])


def test_parts_of_a_text_never_overlap_and_a_short_text_is_refused() -> None:
    plan = Plan(context=100, calibration_tokens=50, selection_windows=2, windows=3)
    calibration, selection, scored = plan.split(np.arange(600))
    assert calibration.tolist() == list(range(50))
    assert (selection.shape, selection[0, 0], selection[-1, -1]) == ((2, 100), 50, 249)
    assert (scored.shape, scored[0, 0], scored[-1, -1]) == ((3, 100), 250, 549)
    with pytest.raises(ArgumentError, match="has 549 tokens, expected at least 550: 50 for"):
        plan.split(np.arange(549))


@pytest.mark.parametrize("build", [llama, mistral])
def test_an_evaluation_measures_everything_it_was_asked_for(build: Any) -> None:
    plan = Plan(context=96, calibration_tokens=128, selection_windows=1, windows=2)
    passes: list[int] = []

    def begin(total: int) -> Any:
        passes.append(total)
        return lambda: passes.append(1)

    report, saved = evaluate(
        build(),
        IDS,
        plan,
        setting_names=("exact-w0", "k4v4-w0", "k2v2-w0-centred"),
        budget_bytes_per_token=160.0,
        widths=(2, 4),
        begin=begin,
    )
    assert [f.name for f in report.settings] == ["exact-w0", "k4v4-w0", "k2v2-w0-centred"]
    assert report.settings[0].kl < 1e-5 < report.settings[1].kl < report.settings[2].kl
    assert len(report.sensitivities) == 2 * 2 * 2
    assert report.recommendation is not None
    assert report.recommended is not None
    assert report.recommendation.bytes_per_token <= 160.0
    assert {"vllm-4bit_nc", "fp8-e4m3", "int4"} <= {f.name for f in report.peers}
    assert passes[0] == len(passes) - 1
    assert saved is not None
    assert saved.config == report.recommendation.config
    assert saved.key_means is not None


def test_boundary_layers_help(model: Any) -> None:
    reference = Reference(model, IDS[:160].reshape(1, 160))
    plain = reference.divergence(Reading(vllm_preset("3bit_nc", SHAPE)))
    helped = reference.divergence(Reading(vllm_preset("3bit_nc", SHAPE, boundary_layers=1)))
    assert helped == pytest.approx(0, abs=1e-9)
    assert plain > 1e-4
