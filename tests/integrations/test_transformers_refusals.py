"""What is refused, with which error, and that the cache is as it was afterwards."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
import transformers

from pagedtq import preset
from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConfigError,
    NonFiniteError,
    OutOfTokens,
    StepError,
    UnsupportedError,
    WireMismatch,
)
from pagedtq.integrations.transformers import (
    PagedTQCache,
    calibrate_key_means,
    model_digest,
)
from pagedtq.wire import load_settings, save_settings
from tests.integrations.tiny_models import (
    left_padded,
    paged,
    prompt,
    reference_cache,
    tiny,
)


@pytest.fixture
def llama():
    model = tiny("llama")
    model.set_attn_implementation("sdpa")
    return model


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def contents(cache):
    tensors = [part for layer in cache.layers for part in layer.dense()]
    return (cache.get_seq_length(), cache.batch.pads.tolist(), cache.pages.stats()), tensors


def assert_unchanged(cache, before):
    counts, tensors = contents(cache)
    assert counts == before[0]
    assert all(torch.equal(one, other) for one, other in zip(tensors, before[1]))
    cache.pages.check_integrity()


@pytest.fixture(params=["k4v4", "exact"])
def filled(request, llama):
    """A cache that holds a padded batch, and the mask of what it holds."""
    ids, mask = left_padded([21, 4])
    cache = paged(llama, request.param, page_size=16, window=16)
    llama(ids, attention_mask=mask, past_key_values=cache)
    return cache, mask


def ones(*shape):
    return torch.ones(shape, dtype=torch.long)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: None, r"attention_mask must be given, of shape \[2, 23\]"),
        (lambda mask: mask[:, 1:], r"must have shape \[2, 23\].* got \[2, 22\]"),
        (lambda mask: ones(2, 23), "row 1 has 0 pads, it had 17"),
        (lambda mask: mask.roll(1, dims=1), "has a 0 behind a 1"),
        (lambda mask: torch.cat([mask[:, :-1], 0 * ones(2, 1)], dim=1), "padding_side"),
        (lambda mask: mask[:1], r"must have shape \[2, 23\]"),
    ],
)
def test_other_padding_than_before_is_refused_before_anything_changes(
    llama, filled, change, message
):
    cache, mask = filled
    before = contents(cache)
    whole = torch.cat([mask, ones(2, 2)], dim=1)
    with pytest.raises(ArgumentError, match=message):
        llama(prompt(2, 2), attention_mask=change(whole), past_key_values=cache)
    assert_unchanged(cache, before)
    llama(prompt(2, 2), attention_mask=whole, past_key_values=cache)
    assert cache.get_seq_length() == 23


def test_a_mask_with_holes_or_right_padding_is_refused(llama):
    cache = paged(llama)
    for mask in ([[1, 0, 1, 1]], [[0, 1, 0, 1]], [[1, 1, 1, 0]]):
        with pytest.raises(ArgumentError, match="only left padding is supported"):
            llama(prompt(1, 4), attention_mask=torch.tensor(mask), past_key_values=cache)
    assert cache.batch_size == -1 and cache.get_seq_length() == 0


def test_masks_of_other_kinds_are_refused(llama):
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(UnsupportedError, match=r"got \[1, 1, 4, 4\]"):
        llama(prompt(1, 4), attention_mask=mask, past_key_values=paged(llama))


def test_another_number_of_rows_is_refused(llama, filled):
    cache, _ = filled
    before = contents(cache)
    with pytest.raises(ArgumentError, match=r"holds a batch of 2, got 3 rows; call reset\(\)"):
        llama(prompt(3, 1), past_key_values=cache)
    assert_unchanged(cache, before)
    cache.reset()
    llama(prompt(3, 5), past_key_values=cache)
    assert cache.batch_size == 3


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("where", ["k_proj", "o_proj", "mlp"])
def test_a_forward_that_fails_anywhere_leaves_no_token(llama, filled, layer, where):
    cache, mask = filled
    before = contents(cache)
    block = llama.model.layers[layer]
    part = block.mlp if where == "mlp" else getattr(block.self_attn, where)

    def fail(*_):
        raise RuntimeError("out of memory, say")

    hook = part.register_forward_pre_hook(fail)
    whole = torch.cat([mask, ones(2, 40)], dim=1)
    try:
        with pytest.raises(RuntimeError, match="say"):
            llama(prompt(2, 40), attention_mask=whole, past_key_values=cache)
    finally:
        hook.remove()
    # What the exact window covers may have shrunk; no token is lost or added.
    assert cache.get_seq_length() == 21
    assert [cache.pages.length(i) for i in cache.sequence_ids] == [21, 4]
    if "exact" in repr(cache):
        assert_unchanged(cache, before)
    cache.pages.check_integrity()


def test_a_first_forward_that_fails_leaves_an_empty_cache(llama):
    cache = paged(llama)

    def fail(*_):
        raise RuntimeError("now")

    hook = llama.model.layers[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="now"):
            llama(prompt(2, 5), past_key_values=cache)
    finally:
        hook.remove()
    assert (cache.batch_size, cache.get_seq_length()) == (-1, 0)
    assert cache.pages.stats().num_sequences == 0
    llama(prompt(3, 5), past_key_values=cache)


def test_an_interrupted_forward_is_undone_by_what_comes_next(llama, filled):
    cache, mask = filled

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = llama.model.layers[2].register_forward_pre_hook(interrupt)
    whole = torch.cat([mask, ones(2, 3)], dim=1)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            llama(prompt(2, 3), attention_mask=whole, past_key_values=cache)
    hook.remove()
    cache.crop(-1)
    assert cache.get_seq_length() == 20
    llama(prompt(2, 3), attention_mask=whole[:, :23], past_key_values=cache)
    assert cache.get_seq_length() == 23


def test_nan_keys_are_refused_and_leave_no_token(llama, filled):
    cache, mask = filled
    hook = llama.model.layers[2].self_attn.k_proj.register_forward_hook(
        lambda module, args, out: out * float("nan")
    )
    whole = torch.cat([mask, ones(2, 1)], dim=1)
    try:
        with pytest.raises(NonFiniteError):
            llama(prompt(2, 1), attention_mask=whole, past_key_values=cache)
    finally:
        hook.remove()
    assert cache.get_seq_length() == 21
    assert [cache.pages.length(i) for i in cache.sequence_ids] == [21, 4]


def test_more_tokens_than_max_tokens_are_refused(llama):
    cache = paged(llama, max_tokens=30)
    ids, mask = left_padded([28, 20])
    llama(ids, attention_mask=mask, past_key_values=cache)
    before = contents(cache)
    with pytest.raises(OutOfTokens, match="need 3 tokens, 2 free of 30") as caught:
        llama(
            prompt(2, 3),
            attention_mask=torch.cat([mask, ones(2, 3)], dim=1),
            past_key_values=cache,
        )
    assert (caught.value.need, caught.value.free, caught.value.total) == (3, 2, 30)
    assert_unchanged(cache, before)
    assert cache.get_max_length() == 30


def test_keys_outside_a_forward_call_are_refused(llama):
    cache = paged(llama)
    states = torch.zeros(1, 2, 4, 16)
    with pytest.raises(StepError, match="outside a forward call"):
        cache.update(states, states, 0)
    with pytest.raises(StepError, match=r"call model\(\.\.\.\)"):
        llama.model.forward(prompt(1, 4), past_key_values=cache)
    assert cache.batch_size == -1


def test_a_cache_of_another_model_is_refused(llama):
    other = tiny("qwen3-24")
    PagedTQCache.from_model(other, "exact")
    with pytest.raises(ArgumentError, match=r"keys must have shape \[rows, 2, tokens, 16\]"):
        other(prompt(1, 4), past_key_values=paged(llama))
    shape = {"num_layers": 2, "num_kv_heads": 2, "head_dim": 16}
    cache = PagedTQCache(preset("exact", num_pages=2, kv_dtype="f32", **shape))
    with pytest.raises(ArgumentError, match="the cache has 2 layers, got layer 2"):
        llama(prompt(1, 4), past_key_values=cache)


def test_a_model_that_leaves_layers_out_is_refused_and_the_call_undone(llama):
    shape = {"num_layers": 5, "num_kv_heads": 2, "head_dim": 16}
    cache = PagedTQCache(preset("exact", num_pages=2, kv_dtype="f32", **shape))
    PagedTQCache.from_model(llama)
    with pytest.raises(UnsupportedError, match=r"no keys and values in layers \[3, 4\]"):
        llama(prompt(1, 4), past_key_values=cache)
    assert cache.batch_size == -1 and cache.pages.stats().num_sequences == 0


def test_another_dtype_or_device_than_before_is_refused(llama):
    cache = paged(llama)
    llama(prompt(1, 4), past_key_values=cache)
    before = contents(cache)
    half = tiny("llama", torch.bfloat16)
    half.set_attn_implementation("sdpa")
    PagedTQCache.from_model(half)
    with pytest.raises(ArgumentTypeError, match=r"must be torch\.float32 on cpu as before"):
        half(prompt(1, 1), past_key_values=cache)
    cache.begin_forward(1, 1)
    meta = torch.zeros(1, 2, 1, 16, device="meta")
    with pytest.raises(ArgumentTypeError, match="on meta; put the whole model on one device"):
        cache.update(meta, meta, 0)
    cache.end_forward(failed=True)
    assert_unchanged(cache, before)


def test_float64_models_are_refused(llama):
    double = copy.deepcopy(llama).double()
    with pytest.raises(
        ArgumentTypeError, match=r"float32, float16 or bfloat16, got torch\.float64"
    ):
        PagedTQCache.from_model(double)


def small(name, **fields):
    shared = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
    return getattr(transformers, name)(**(shared | fields))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: transformers.MambaForCausalLM(small("MambaConfig", state_size=4)),
            "MambaModel has no attention cache",
        ),
        (
            lambda: transformers.T5ForConditionalGeneration(
                small("T5Config", d_model=32, d_ff=32, num_heads=2, d_kv=16, num_layers=2)
            ),
            "has an encoder",
        ),
        (
            lambda: transformers.DeepseekV3ForCausalLM(
                small(
                    "DeepseekV3Config",
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    q_lora_rank=8,
                    kv_lora_rank=8,
                    n_routed_experts=4,
                    n_group=1,
                    topk_group=1,
                    num_experts_per_tok=1,
                    moe_intermediate_size=8,
                    intermediate_size=16,
                )
            ),
            "multi-head latent attention",
        ),
        (
            lambda: transformers.Llama4ForCausalLM(
                small(
                    "Llama4TextConfig",
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    head_dim=16,
                    intermediate_size=16,
                    intermediate_size_mlp=16,
                    num_local_experts=2,
                    attention_chunk_size=8,
                    pad_token_id=0,
                )
            ),
            "layers of type chunked_attention",
        ),
        (
            lambda: transformers.Qwen3NextForCausalLM(
                small(
                    "Qwen3NextConfig",
                    num_attention_heads=2,
                    num_key_value_heads=2,
                    head_dim=16,
                    intermediate_size=16,
                    linear_num_value_heads=2,
                    linear_num_key_heads=2,
                    linear_key_head_dim=8,
                    linear_value_head_dim=8,
                    num_experts=2,
                    num_experts_per_tok=1,
                    moe_intermediate_size=8,
                    shared_expert_intermediate_size=8,
                )
            ),
            "layers of type linear_attention",
        ),
    ],
    ids=["mamba", "t5", "deepseek", "llama4", "qwen3-next"],
)
def test_models_whose_cache_we_cannot_be_are_refused_by_name(model, message):
    with pytest.raises(UnsupportedError, match=message):
        PagedTQCache.from_model(model())


def test_what_is_no_model_is_refused():
    with pytest.raises(ArgumentTypeError, match="PreTrainedModel, got Linear"):
        PagedTQCache.from_model(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ("k5v5", {}, "unknown preset 'k5v5'"),
        ("k4v4", {"num_pages": 9}, "num_pages follows the model"),
        ("k4v4", {"pages": 9}, "pages.*see CacheConfig"),
        ("k4v4", {"window": 10}, "window must be a multiple"),
        (
            preset("k4v4", num_layers=3, num_kv_heads=4, head_dim=16, num_pages=2),
            {},
            "the model has num_kv_heads 2, the configuration 4",
        ),
    ],
)
def test_bad_settings_are_refused(llama, settings, fields, message):
    with pytest.raises(ConfigError, match=message):
        PagedTQCache.from_model(llama, settings, **fields)
    with pytest.raises(ArgumentError, match="own_tokens"):
        PagedTQCache.from_model(llama, own_tokens="raw")


def test_attention_on_pages_needs_our_cache(llama):
    llama.set_attn_implementation("pagedtq")
    with pytest.raises(StepError, match="pass past_key_values=PagedTQCache"):
        llama(prompt(1, 3), past_key_values=reference_cache(llama))


def test_attention_on_pages_refuses_dropout_and_other_masks(llama):
    from pagedtq.integrations.transformers.attention import no_mask

    llama.set_attn_implementation("pagedtq")
    cache = paged(llama)
    noisy = copy.deepcopy(llama).train()
    for layer in noisy.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UnsupportedError, match=r"dropout is not supported, got 0\.1"):
        noisy(prompt(1, 3), past_key_values=cache)
    assert cache.batch_size == -1
    with pytest.raises(UnsupportedError, match="causal masks with left padding"):
        no_mask(allow_is_causal_skip=False)


def test_gradients_through_the_cache_are_refused_not_lost(llama):
    for attention in ("sdpa", "pagedtq"):
        llama.set_attn_implementation(attention)
        with torch.enable_grad():
            loss = llama(prompt(1, 6), past_key_values=paged(llama)).logits.sum()
            with pytest.raises(UnsupportedError, match="gradients do not pass"):
                loss.backward()


def test_a_compiled_model_gives_the_same_logits(llama):
    ids = prompt(1, 8)
    for attention in ("sdpa", "pagedtq"):
        llama.set_attn_implementation(attention)
        mine, theirs = paged(llama), paged(llama)
        compiled = torch.compile(llama, backend="eager")
        for part in ids.split([7, 1], dim=1):
            one = compiled(part, past_key_values=mine).logits
            assert torch.equal(one, llama(part, past_key_values=theirs).logits)


def test_hooks_are_put_on_a_model_once_and_copies_of_it_keep_them(llama):
    PagedTQCache.from_model(llama)
    PagedTQCache.from_model(llama)
    twin = copy.deepcopy(llama)
    PagedTQCache.from_model(twin)
    assert len(llama.model._forward_pre_hooks) == len(twin.model._forward_pre_hooks) == 1
    # They leave calls with any other cache, or none, alone.
    twin(prompt(1, 3), past_key_values=reference_cache(twin))
    assert torch.equal(twin(prompt(1, 3)).logits, llama(prompt(1, 3)).logits)


def test_rows_that_do_not_exist_and_other_misuse_of_the_batch(llama, filled):
    cache, _ = filled
    before = contents(cache)
    with pytest.raises(ArgumentError, match="row 2 is not in a batch of 2"):
        cache.reorder_cache(torch.tensor([0, 2]))
    with pytest.raises(ArgumentError, match="negative or 0, got 3"):
        cache.crop(3)
    with pytest.raises(ArgumentError, match="cannot crop 22 of 21"):
        cache.crop(-22)
    with pytest.raises(ArgumentError, match="repeats must be"):
        cache.batch_repeat_interleave(0)
    with pytest.raises(UnsupportedError, match="call crop on the cache"):
        cache.layers[0].crop(-1)
    with pytest.raises(ArgumentTypeError, match="cannot be pickled"):
        pickle.dumps(cache)
    assert_unchanged(cache, before)


# -- calibration ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (prompt(1, 60), "at least 128 tokens, got 60"),
        (torch.full((1, 400), 7), "1 different tokens, the commonest is 100%"),
        (prompt(1, 400) % 9 + 3, "9 different tokens"),
        (prompt(1, 400)[0], r"shape \[rows, n\], got \[400\]"),
        ([], "at least 128 tokens, got 0"),
    ],
)
def test_calibration_refuses_few_or_dull_tokens(llama, ids, message):
    with pytest.raises(ArgumentError, match=message):
        calibrate_key_means(llama, ids)


def test_calibration_refuses_tokens_of_which_most_are_the_same(llama):
    ids = prompt(1, 400)
    ids[:, 150:] = 5
    with pytest.raises(ArgumentError, match="none above 50%"):
        calibrate_key_means(llama, ids)
    # Pads are no tokens.
    with pytest.raises(ArgumentError, match="got 100"):
        calibrate_key_means(
            llama, prompt(1, 400), attention_mask=(torch.arange(400) >= 300)[None].long()
        )


def test_calibration_refuses_keys_that_are_all_the_same(llama):
    dead = copy.deepcopy(llama)
    dead.model.layers[1].self_attn.k_proj.weight.data.zero_()
    with pytest.raises(ArgumentError, match="all keys of layer 1, head 0 are the same"):
        calibrate_key_means(dead, prompt(2, 100))


def test_a_calibration_of_a_different_model_is_refused(llama, tmp_path):
    settings = calibrate_key_means(llama, prompt(2, 100))
    save_settings(settings, tmp_path / "llama.json")
    loaded = load_settings(tmp_path / "llama.json")
    cache = PagedTQCache.from_model(llama, loaded, debug=True)
    llama(prompt(1, 4), past_key_values=cache)
    assert np.array_equal(cache.pages.backend.key_means, settings.key_means)
    for other in (tiny("llama", seed=1), tiny("mistral")):
        with pytest.raises(WireMismatch, match="calibrate this model"):
            PagedTQCache.from_model(other, loaded)


def test_the_digest_tells_weights_apart_but_not_how_they_are_loaded(llama):
    half = copy.deepcopy(llama).to(torch.bfloat16)
    assert model_digest(half) == model_digest(llama)
    assert model_digest(half.float()) == model_digest(llama)
    tuned = copy.deepcopy(llama)
    tuned.model.layers[2].self_attn.k_proj.weight.data.add_(0.01)
    assert model_digest(tuned) != model_digest(llama)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(llama.config)
    with pytest.raises(UnsupportedError, match="is not loaded"):
        model_digest(empty)


def test_a_model_that_is_training_reads_in_evaluation_mode_and_goes_on_training(llama):
    training = copy.deepcopy(llama).train()
    calibrate_key_means(training, prompt(2, 100))
    assert training.training
