"""Exact shadows: they change no result, follow every operation, and measure what is true."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedtq import KeepFirstLast, PagedKVCache, preset
from pagedtq.errors import ArgumentError, OutOfPages
from pagedtq.telemetry import LogHistogram, ShadowedCache

SHAPE = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 16, "page_size": 16}


def config(name="k2v2", **changes):
    return preset(name, **{**SHAPE, "num_pages": 60, "num_window_slots": 12, **changes})


def vectors(rng, count):
    return rng.standard_normal((2, 3, count, 2, 16)).astype(np.float32)


def queries(rng, count):
    return rng.standard_normal((count, 4, 16)).astype(np.float32)


def test_results_are_those_of_a_cache_without_shadows():
    plain, watched = PagedKVCache(config()), ShadowedCache(config(), fraction=0.5, debug=True)
    pairs = [(plain.open(), watched.open()) for _ in range(6)]
    rng = np.random.default_rng(0)
    for mine, theirs in pairs:
        data = vectors(rng, int(rng.integers(1, 60)))
        plain.append(mine, *data)
        watched.append(theirs, *data)
    assert 0 < watched.shadow_report().shadowed < 6
    mine, theirs = (list(ids) for ids in zip(*pairs))
    asked = queries(rng, 6)
    for layer in range(3):
        for a, b in zip(plain.attend(layer, asked, mine), watched.attend(layer, asked, theirs)):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(plain.score(layer, asked, mine), watched.score(layer, asked, theirs)):
            np.testing.assert_array_equal(a, b)


def test_errors_are_those_against_the_original_vectors():
    cache = ShadowedCache(config(window=0, kv_dtype="f32"), fraction=1.0)
    seq = cache.open()
    rng = np.random.default_rng(1)
    keys, values = vectors(rng, 40)
    cache.append(seq, keys, values)
    asked = queries(rng, 1)
    out, lse = cache.attend(1, asked, seq)
    scores = cache.score(1, asked, seq).values
    group = np.repeat(keys[1], 2, axis=1), np.repeat(values[1], 2, axis=1)
    exact_scores = np.einsum("hd,nhd->hn", asked[0], group[0])
    weights = np.exp(exact_scores / 4)
    exact_lse = np.log(weights.sum(axis=1))
    exact = np.einsum("hn,nhd->hd", weights, group[1]) / weights.sum(axis=1)[:, None]
    errors = np.linalg.norm(out[0] - exact, axis=1) / np.linalg.norm(exact, axis=1)
    report = cache.shadow_report()
    layer = report.layers[1]
    assert (layer.layer, layer.output.count, layer.logit.count) == (1, 4, 4 * 40)
    assert layer.output.maximum == pytest.approx(errors.max(), rel=1e-4)
    assert layer.output.mean == pytest.approx(errors.mean(), rel=1e-4)
    assert layer.lse.maximum == pytest.approx(np.abs(lse[0] - exact_lse).max(), rel=1e-3)
    logits = np.abs(scores - exact_scores) / 4
    assert layer.logit.mean == pytest.approx(logits.mean(), rel=1e-4)
    assert report.total.output == layer.output
    assert report.layers[0].output.count == 0


def test_more_bits_give_smaller_errors_and_exact_pages_give_none():
    seen = {}
    for name in ("k2v2", "k4v4", "k8v8", "exact"):
        cache = ShadowedCache(config(name, window=0), fraction=1.0)
        seq = cache.open()
        rng = np.random.default_rng(2)
        cache.append(seq, *vectors(rng, 100))
        for layer in range(3):
            cache.attend(layer, queries(rng, 1), seq)
        seen[name] = cache.shadow_report().total.output.p50
    assert seen["k2v2"] > 2 * seen["k4v4"] > 4 * seen["k8v8"] > 0
    assert seen["exact"] == 0


def test_shadows_follow_forks_truncation_and_eviction():
    # With exact pages any disagreement is a shadow that lost its place.
    cache = ShadowedCache(config("exact", num_pages=200), fraction=1.0, debug=True)
    rng = np.random.default_rng(3)
    ids = [cache.open()]
    cache.append(ids[0], *vectors(rng, 90))
    for _ in range(60):
        seq = ids[int(rng.integers(len(ids)))]
        kind = int(rng.integers(6))
        if kind == 0 and len(ids) < 8:
            ids.append(cache.fork(seq))
        elif kind == 1:
            size = cache.length(seq)
            cut = int(rng.integers(size // 2, size + 1)) if size else 0
            block = cut // 16
            table = cache.tables.block_table([seq])[0]
            if cut % 16 == 0 or table[block]:
                cache.truncate(seq, cut)
        elif kind == 2:
            cache.evict(seq, KeepFirstLast(20, 30))
        elif kind == 3 and len(ids) > 3:
            cache.close(seq)
            ids.remove(seq)
        else:
            members = ids[: int(rng.integers(1, len(ids) + 1))]
            counts = rng.integers(0, 12, len(members))
            cache.append(members, *vectors(rng, int(counts.sum())), num_new_tokens=counts)
        for layer in range(3):
            cache.attend(layer, queries(rng, len(ids)), ids)
            cache.score(layer, queries(rng, len(ids)), ids)
    total = cache.shadow_report().total
    assert total.output.count > 1000
    assert total.output.maximum < 1e-5
    assert total.lse.maximum < 1e-5
    assert total.logit.maximum == 0
    cache.close(ids)
    assert cache.shadow.stats().num_sequences == 0
    assert cache.shadow.stats().pages_used == 0


def test_chunks_and_steps_that_are_given_up_are_followed():
    cache = ShadowedCache(config("exact"), fraction=1.0)
    seq, other = cache.open(), cache.open()
    rng = np.random.default_rng(4)
    cache.append(seq, *vectors(rng, 20))
    cache.begin_step([seq, other], [3, 2])
    cache.store(0, *vectors(rng, 5)[:, 0])
    cache.abort_step()
    keys, values = vectors(rng, 5)
    cache.begin_step([seq, other], [3, 2])
    for layer in range(3):
        cache.store(layer, keys[layer], values[layer])
        cache.attend(
            layer,
            queries(rng, 5),
            [seq, other],
            q_lens=[3, 2],
            keys=keys[layer],
            values=values[layer],
            soft_cap=20.0,
            sink_logits=np.zeros(4, np.float32),
            window_left=9,
        )
    cache.commit()
    total = cache.shadow_report().total.output
    assert (total.count, total.maximum < 1e-5) == (3 * 5 * 4, True)
    assert cache.length(seq) == 23


def test_only_chosen_layers_are_kept():
    cache = ShadowedCache(config(), fraction=1.0, layers=[-1, 0])
    seq = cache.open()
    rng = np.random.default_rng(5)
    cache.append(seq, *vectors(rng, 40))
    for layer in range(3):
        cache.attend(layer, queries(rng, 1), seq)
    report = cache.shadow_report()
    assert [layer.layer for layer in report.layers] == [0, 2]
    assert [layer.output.count for layer in report.layers] == [4, 4]
    assert cache.shadow.config.num_layers == 2


def test_a_full_shadow_pool_gives_shadows_up_and_never_the_step():
    cache = ShadowedCache(config(), fraction=1.0, num_shadow_pages=4, debug=True)
    ids = [cache.open() for _ in range(4)]
    rng = np.random.default_rng(6)
    cache.append(ids, *vectors(rng, 60), num_new_tokens=[15] * 4)
    report = cache.shadow_report()
    assert (report.opened, report.shadowed, report.dropped) == (4, 3, 1)
    cache.append(ids, *vectors(rng, 8), num_new_tokens=[2] * 4)
    assert cache.shadow_report().dropped == 3
    cache.attend(0, queries(rng, 4), ids)
    assert cache.shadow_report().total.output.count == 4
    before = cache.shadow.stats()
    with pytest.raises(OutOfPages):
        cache.append(ids[0], *vectors(rng, 1000))
    assert cache.shadow.stats() == before


def test_reports_count_the_shadows():
    cache, plain = ShadowedCache(config(), fraction=0.5), PagedKVCache(config())
    assert plain.memory_report().shadow_bytes == 0
    report = cache.memory_report()
    assert report.shadow_bytes >= cache.shadow.memory_report().pool_bytes > 0
    twin = None
    while twin is None:
        seq = cache.open()
        twin = seq if cache.shadow_report().shadowed else None
    rng = np.random.default_rng(7)
    cache.append(seq, *vectors(rng, 64))
    plain.append(plain.open(), *np.zeros((2, 3, 64, 2, 16), np.float32))
    with_shadow, without = cache.memory_report(), plain.memory_report()
    assert with_shadow.shadow_used_bytes == 4 * cache.shadow.backend.layout.page_bytes
    assert with_shadow.pages_used_bytes == without.pages_used_bytes
    assert with_shadow.compression_vs_fp16 < 0.7 * without.compression_vs_fp16
    assert cache.shadow_report().shadow_bytes == with_shadow.shadow_bytes


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"fraction": 1.5}, r"fraction must be in \[0, 1\], got 1.5"),
        ({"fraction": -0.1}, "fraction must be in"),
        ({"layers": [3]}, r"layers must be some of \[0, 2\], got \[3\]"),
        ({"layers": []}, "layers must be some of"),
    ],
)
def test_bad_options_are_refused(options, problem):
    with pytest.raises(ArgumentError, match=problem):
        ShadowedCache(config(), **options)


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_quantiles_are_upper_bounds_within_a_bin(errors, share):
    histogram = LogHistogram()
    half = len(errors) // 2
    histogram.add(np.array(errors[:half]))
    other = LogHistogram()
    other.add(np.array(errors[half:]))
    histogram.merge(other)
    summary = histogram.summary()
    assert summary.count == len(errors)
    assert summary.maximum == max(errors)
    assert summary.mean == pytest.approx(np.mean(errors))
    true = sorted(errors)[max(1, int(np.ceil(share * len(errors)))) - 1]
    got = histogram.quantile(share)
    if true < 1e-9:
        assert got <= 1.1e-9
    elif true >= 1e3:
        assert got == max(errors)
    else:
        assert true * (1 - 1e-9) <= got <= true * 1.0747


def test_no_errors_and_broken_ones_have_a_summary():
    histogram = LogHistogram()
    assert (histogram.summary().count, histogram.summary().p99) == (0, 0.0)
    histogram.add(np.array([np.nan, 1.0, 1.0]))
    assert histogram.summary().maximum == np.inf
    assert histogram.summary().p50 == pytest.approx(1.0, rel=0.08)
