"""With exact codecs the cache is transformers' own, bit for bit, however it is used."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from tests.integrations.tiny_models import (
    FAMILIES,
    generate,
    left_padded,
    paged,
    prompt,
    reference_cache,
    tiny,
)


@pytest.fixture(params=FAMILIES)
def model(request):
    chosen = tiny(request.param)
    chosen.set_attn_implementation("eager" if request.param in ("gpt-oss", "gemma2") else "sdpa")
    return chosen


@pytest.fixture
def llama():
    chosen = tiny("llama")
    chosen.set_attn_implementation("sdpa")
    return chosen


def assert_same(one, other):
    assert torch.equal(one.sequences, other.sequences)
    assert len(one.logits) == len(other.logits)
    for step, (mine, theirs) in enumerate(zip(one.logits, other.logits)):
        assert torch.equal(mine, theirs), f"logits differ at step {step}"


def assert_close(one, other, bound=1e-4):
    """Logits within the bound, and tokens equal as long as no choice was closer than it."""
    for step, (mine, theirs) in enumerate(zip(one.logits, other.logits)):
        assert (mine - theirs).abs().max() <= bound, f"step {step}"
        top = theirs.topk(2).values
        if ((top[:, 0] - top[:, 1]) <= bound).any():
            return
    assert torch.equal(one.sequences, other.sequences)


def pages_attention(model, run):
    before = model.config._attn_implementation
    model.set_attn_implementation("pagedtq")
    try:
        return run()
    finally:
        model.set_attn_implementation(before)


def test_greedy_256_tokens_equal_dynamic_cache(llama):
    ids = prompt(1, 20)
    theirs = generate(llama, ids, reference_cache(llama), max_new_tokens=256)

    def mine():
        return generate(llama, ids, paged(llama, debug=False), max_new_tokens=256)

    assert_same(mine(), theirs)
    assert_close(pages_attention(llama, mine), theirs)


@pytest.mark.parametrize("window", [0, 16])
def test_greedy_equals_dynamic_cache_in_every_family(model, window):
    ids = prompt(2, 13)
    theirs = generate(model, ids, reference_cache(model))
    fields = {"page_size": 16, "window": window, "sinks": 4}
    assert_same(generate(model, ids, paged(model, **fields)), theirs)
    mine = pages_attention(model, lambda: generate(model, ids, paged(model, **fields)))
    assert_close(mine, theirs)


def test_beam_search_equals_dynamic_cache(model):
    ids = prompt(2, 11)
    options = {"num_beams": 4, "max_new_tokens": 40, "num_return_sequences": 2}
    theirs = generate(model, ids, reference_cache(model), **options)
    cache = paged(model, page_size=16)
    assert_same(generate(model, ids, cache, **options), theirs)
    mine = pages_attention(
        model, lambda: generate(model, ids, paged(model, page_size=16), **options)
    )
    assert_close(mine, theirs)


def test_left_padding_equals_dynamic_cache_at_real_tokens(model):
    ids, mask = left_padded([14, 3, 9, 1])
    theirs = generate(model, ids, reference_cache(model), attention_mask=mask)
    cache = paged(model, page_size=16)
    assert_same(generate(model, ids, cache, attention_mask=mask), theirs)
    # Pads are not stored: 23 generated tokens are, the last one never came back.
    assert [cache.pages.length(i) for i in cache.sequence_ids] == [37, 26, 32, 24]
    mine = pages_attention(model, lambda: generate(model, ids, paged(model), attention_mask=mask))
    assert_close(mine, theirs)


def test_padded_rows_generate_what_they_generate_alone(llama):
    ids, mask = left_padded([14, 5])
    together = generate(llama, ids, paged(llama), attention_mask=mask)
    alone = generate(llama, ids[1:, 9:], paged(llama))
    assert torch.equal(together.sequences[1, 14:], alone.sequences[0, 5:])


@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_chunked_prefill_equals_dynamic_cache(model, chunk):
    ids, mask = left_padded([20, 6])
    options = {"attention_mask": mask, "prefill_chunk_size": chunk, "max_new_tokens": 6}
    theirs = generate(model, ids, reference_cache(model), **options)
    assert_same(generate(model, ids, paged(model, page_size=16), **options), theirs)
    mine = pages_attention(
        model, lambda: generate(model, ids, paged(model, page_size=16), **options)
    )
    assert_close(mine, theirs)


def test_sampling_equals_dynamic_cache_with_the_same_seed(llama):
    ids = prompt(2, 9)
    options = {"do_sample": True, "top_k": 20, "num_return_sequences": 3}
    torch.manual_seed(5)
    theirs = generate(llama, ids, reference_cache(llama), **options)
    torch.manual_seed(5)
    assert_same(generate(llama, ids, paged(llama), **options), theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 16])
def test_half_precision_models_are_stored_bit_for_bit(dtype, window):
    model = tiny("llama", dtype)
    model.set_attn_implementation("sdpa")
    ids = prompt(2, 13)
    cache = paged(model, page_size=16, window=window)
    assert_same(generate(model, ids, cache), generate(model, ids, reference_cache(model)))
    assert cache.config.kv_dtype == {torch.float16: "f16", torch.bfloat16: "bf16"}[dtype]
    mine = pages_attention(model, lambda: generate(model, ids, paged(model, page_size=16)))
    assert all(logits.isfinite().all() for logits in mine.logits)


def test_prompt_lookup_crops_drafts_that_were_refused(model):
    ids = prompt(1, 6).repeat(1, 4)
    options = {"prompt_lookup_num_tokens": 4, "max_new_tokens": 20}
    theirs = model.generate(ids, do_sample=False, eos_token_id=None, max_new_tokens=20)
    cache = paged(model, page_size=16)
    mine = model.generate(ids, do_sample=False, eos_token_id=None, past_key_values=cache, **options)
    assert torch.equal(mine, theirs)
    # The last token was never read, drafts behind it were cut off.
    assert cache.get_seq_length() == cache.pages.length(cache.sequence_ids[0]) == 24 + 19


def test_a_second_turn_continues_where_the_first_ended(llama):
    ids = prompt(1, 9)
    cache = paged(llama)
    first = generate(llama, ids, cache, max_new_tokens=5).sequences
    longer = torch.cat([first, prompt(1, 4, seed=3)], dim=1)
    second = generate(llama, longer, cache, max_new_tokens=5)
    whole = llama.generate(longer, do_sample=False, eos_token_id=None, max_new_tokens=5)
    assert torch.equal(second.sequences, whole)


def test_repeat_select_and_crop_equal_dynamic_cache(model):
    ids, mask = left_padded([18, 7, 12])
    mine, theirs = paged(model, page_size=16, window=16), reference_cache(model)
    for cache in (mine, theirs):
        cache.activate_past_recording()
    with torch.no_grad():
        for cache in (mine, theirs):
            model(ids, attention_mask=mask, past_key_values=cache)
    used = mine.pages.stats().pages_used
    for cache in (mine, theirs):
        cache.batch_repeat_interleave(2)
    assert mine.pages.stats().pages_used == used, "a fork takes no page"
    for cache in (mine, theirs):
        cache.batch_select_indices(torch.tensor([4, 0, 1, 4]))
        cache.crop(-3)
    rows = [2, 0, 0, 2]
    kept = mask[rows][:, :15]
    more = prompt(4, 2, seed=7)
    longer = torch.cat([kept, torch.ones(4, 2, dtype=torch.long)], dim=1)
    with torch.no_grad():
        out = [
            model(more, attention_mask=longer, past_key_values=cache).logits
            for cache in (mine, theirs)
        ]
    assert torch.equal(*out)
    assert mine.batch_size == 4 and mine.get_seq_length() == 17


def test_a_copy_of_a_prompt_cache_is_independent(llama):
    cache = paged(llama, "k4v4", page_size=16, window=16)
    ids = prompt(1, 40)
    with torch.no_grad():
        llama(ids, past_key_values=cache)
        twin = copy.deepcopy(cache)
        before = [layer.dense() for layer in twin.layers]
        generate(llama, prompt(1, 41), cache, max_new_tokens=8)
    assert twin.get_seq_length() == 40 and cache.get_seq_length() == 48
    for layer, (keys, values) in zip(twin.layers, before):
        now = layer.dense()
        assert torch.equal(now[0], keys) and torch.equal(now[1], values)
    twin.pages.check_integrity()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("Bloom", {"n_layer": 2, "n_head": 4}),
        ("Falcon", {"num_hidden_layers": 2, "num_attention_heads": 4}),
        ("GPTBigCode", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
    ],
    ids=["alibi", "one KV head, not named so", "learned positions"],
)
def test_models_that_name_or_compute_attention_their_own_way_run_too(name, fields):
    shared = {"vocab_size": 97, "hidden_size": 64, "pad_token_id": 0, "eos_token_id": 2}
    config = getattr(transformers, name + "Config")(**(shared | fields))
    torch.manual_seed(0)
    model = getattr(transformers, name + "ForCausalLM")(config).eval()
    ids, mask = left_padded([14, 5])
    options = {"attention_mask": mask, "num_beams": 2}
    theirs = generate(model, ids, reference_cache(model), **options)
    assert_same(generate(model, ids, paged(model, page_size=16), **options), theirs)
