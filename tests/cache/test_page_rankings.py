"""Rankings that look at bytes: what they keep, what they never touch, and that they only look."""

from __future__ import annotations

import numpy as np
import pytest

from pagedtq import CacheConfig, Exact, LayerOverride, PagedKVCache, SharingOptions, TurboQuant
from pagedtq.cache import AttentionMass, NormRatio, QueryBounds
from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    OutOfEvictablePages,
    StepError,
    UnknownSequence,
    UnsupportedError,
)
from pagedtq.paging import EvictLowest, OldestFirst, PageTables, RandomOrder
from pagedtq.telemetry import ShadowedCache
from tests.cache.bank import differences, snapshot

LAYERS, HEADS, GROUP, DIM, SIZE = 2, 2, 2, 32, 16
RNG = np.random.default_rng(11)


def config_of(window=0, **fields):
    shape = {"num_layers": LAYERS, "num_kv_heads": HEADS, "head_dim": DIM, "num_pages": 64}
    base = {"page_size": SIZE, "window": window, "num_window_slots": 8, "key_bounds": True}
    return CacheConfig(**(shape | base | fields))


def cache_of(window=0, sharing=None, means=None, **fields):
    config = config_of(window, **fields)
    return PagedKVCache(config, num_threads=1, debug=True, sharing=sharing, key_means=means)


def topics(count, rng=RNG):
    """Keys of one direction per page, and that direction: ``[L, n, H, d]``, ``[count, d]``."""
    centres = rng.standard_normal((count, DIM))
    keys = np.repeat(centres, SIZE, axis=0) + 0.2 * rng.standard_normal((count * SIZE, DIM))
    wide = np.broadcast_to(keys[None, :, None], (LAYERS, count * SIZE, HEADS, DIM))
    return wide.astype(np.float32), centres.astype(np.float32)


def filled(cache, count=6, extra=5):
    """A sequence of pages about one topic each, and a few more tokens."""
    keys, centres = topics(count)
    seq = cache.open()
    values = RNG.standard_normal(keys.shape, np.float32)
    cache.append(seq, keys, values)
    tail = RNG.standard_normal((2, LAYERS, extra, HEADS, DIM), np.float32)
    cache.append(seq, tail[0], tail[1])
    return seq, centres


def about(centre, batch=1):
    return np.broadcast_to(2 * centre, (batch, HEADS * GROUP, DIM)).astype(np.float32)


def resident(cache, seq):
    return np.flatnonzero(cache.tables.block_table([seq])[0]).tolist()


RANKINGS = {
    "norms": lambda cache, seqs, q: NormRatio(cache),
    "bounds": lambda cache, seqs, q: QueryBounds(cache, seqs, {0: q, 1: q}),
    "mass": lambda cache, seqs, q: observed(cache, seqs, {0: q, 1: q}),
    "random": lambda cache, seqs, q: RandomOrder(5),
    "oldest": lambda cache, seqs, q: OldestFirst(),
}


def observed(cache, seqs, queries, decay=0.9):
    mass = AttentionMass(cache, decay)
    mass.observe(seqs, queries)
    return mass


# -- what is kept ---------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, SIZE])
@pytest.mark.parametrize("name", ["bounds", "mass"])
def test_the_page_that_a_query_asks_for_stays_to_the_last(name, window):
    for wanted in range(4):
        cache = cache_of(window)
        seq, centres = filled(cache)
        ranking = RANKINGS[name](cache, [seq], about(centres[wanted]))
        sealed = cache.state(seq).ring_start // SIZE
        kept = list(range(sealed, 7))
        cache.evict(seq, EvictLowest(ranking, max_pages=len(kept) + 1))
        assert resident(cache, seq) == [wanted, *kept]
        assert cache.stats().logical_tokens == 6 * SIZE + 5
        assert cache.stats().resident_tokens == SIZE * (len(kept)) + 5


def test_norm_ratio_keeps_large_values_with_small_centred_keys():
    means = 4 * RNG.standard_normal((LAYERS, HEADS, DIM)).astype(np.float32)
    cache = cache_of(means=means)
    shape = (LAYERS, 4 * SIZE, HEADS, DIM)
    keys, values = RNG.standard_normal((2, *shape))
    of_page = np.repeat([1.0, 1.0, 0.2, 3.0], SIZE)[None, :, None, None]
    keys = keys * of_page + means[:, None]
    values *= np.repeat([1.0, 5.0, 1.0, 1.0], SIZE)[None, :, None, None]
    seq = cache.open()
    cache.append(seq, keys.astype(np.float32), values.astype(np.float32))
    scores = NormRatio(cache).score(cache.tables, [seq])
    # Pages 1 (value 5) and 2 (key 0.2) are worth 5, page 0 is worth 1, page 3 a third.
    assert np.argsort(scores.values)[:2].tolist() == [3, 0]
    np.testing.assert_allclose(scores.values / scores.values[0], [1, 5, 5, 1 / 3], rtol=0.05)
    assert abs(scores.values.sum() - 1) < 1e-12


@pytest.mark.parametrize("name", ["norms", "bounds", "mass"])
def test_scores_of_a_sequence_do_not_depend_on_who_else_is_asked_about(name):
    cache = cache_of()
    (a, centres), (b, _) = filled(cache), filled(cache, 3)
    queries = np.concatenate([about(centres[1]), about(centres[2])])
    ranking = RANKINGS[name](cache, [a, b], queries)
    both = ranking.score(cache.tables, [b, a])
    alone = ranking.score(cache.tables, [a])
    mine = both.blocks.members == 1
    assert np.array_equal(both.values[mine], alone.values)
    assert both.blocks.blocks[mine].tolist() == alone.blocks.blocks.tolist() == list(range(6))
    for member in (0, 1):
        # Votes: what all heads and layers give to a sequence's pages adds up to one.
        total = both.values[both.blocks.members == member].sum()
        assert 0.8 < total <= 1 + 1e-9


def test_mass_is_the_attention_a_page_received():
    """Against softmax in float64 over what `load` returns, all layers and heads averaged."""
    cache = cache_of()
    seq, _ = filled(cache)
    queries = {layer: RNG.standard_normal((1, HEADS * GROUP, DIM)) for layer in range(LAYERS)}
    queries = {layer: one.astype(np.float32) for layer, one in queries.items()}
    mass = observed(cache, seq, queries).score(cache.tables, [seq])
    want = np.zeros(7)
    for layer, one in queries.items():
        keys, _, positions = cache.load(layer, seq)
        for head in range(HEADS * GROUP):
            logits = keys[:, head // GROUP].astype(float) @ one[0, head].astype(float) * DIM**-0.5
            weights = np.exp(logits - logits.max())
            np.add.at(want, positions // SIZE, weights / weights.sum() / (LAYERS * HEADS * GROUP))
    np.testing.assert_allclose(mass.values, want[:6], rtol=1e-5)


def test_older_mass_decays_and_a_decay_of_one_never_forgets():
    for decay, expected in ((0.5, 2), (1.0, 1), (0.0, 2)):
        cache = cache_of()
        seq, centres = filled(cache)
        mass = AttentionMass(cache, decay)
        for _ in range(3):
            mass.observe(seq, {0: about(centres[1])})
        mass.observe(seq, {0: about(centres[2])})
        scores = mass.score(cache.tables, [seq])
        assert int(np.argmax(scores.values)) == expected
        total = sum(decay**age for age in range(4))
        assert scores.values.sum() == pytest.approx(total, rel=0.05)


def test_mass_follows_a_sequence_that_grows_is_cut_and_changes_pages():
    cache = cache_of()
    seq, centres = filled(cache, 4, 0)
    mass = observed(cache, seq, {0: about(centres[3])}, decay=1.0)
    cache.truncate(seq, 2 * SIZE)
    filled(cache, 2, 0)  # takes the pages that were cut off
    more = RNG.standard_normal((2, LAYERS, 2 * SIZE, HEADS, DIM), np.float32)
    cache.append(seq, more[0], more[1])
    scores = mass.score(cache.tables, [seq])
    # The new pages have never been seen: no score, and so they are not evicted.
    assert scores.blocks.blocks.tolist() == [0, 1]
    mass.observe(seq, {0: about(centres[0])})
    scores = mass.score(cache.tables, [seq])
    assert scores.blocks.blocks.tolist() == [0, 1, 2, 3]
    assert scores.values[2:].sum() < 1
    mass.forget(seq)
    assert mass.score(cache.tables, [seq]).values.size == 0


def test_mass_of_closed_sequences_is_dropped():
    cache = cache_of()
    mass = AttentionMass(cache)
    for _ in range(80):
        seq, centres = filled(cache, 1)
        mass.observe(seq, {0: about(centres[0])})
        cache.close(seq)
    assert len(mass._seen) <= 33


# -- what is never touched ------------------------------------------------------------------------


@pytest.mark.parametrize("name", RANKINGS)
@pytest.mark.parametrize("window", [0, SIZE])
def test_scoring_and_planning_change_no_byte(name, window):
    cache = cache_of(window)
    seq, centres = filled(cache)
    ranking = RANKINGS[name](cache, [seq], about(centres[0]))
    before = snapshot(cache)
    first = EvictLowest(ranking, max_pages=3).plan(cache.tables, seq)
    second = EvictLowest(ranking, max_pages=3).plan(cache.tables, seq)
    assert differences(before, snapshot(cache)) == []
    assert first.blocks.tolist() == second.blocks.tolist()
    assert first.blocks.size == 4


@pytest.mark.parametrize("name", RANKINGS)
def test_what_is_left_reads_as_before_and_the_sequence_goes_on(name):
    cache = cache_of(SIZE)
    seq, centres = filled(cache)
    dense = cache.load(1, seq)
    ranking = RANKINGS[name](cache, [seq], about(centres[2]))
    cache.evict(seq, EvictLowest(ranking, max_tokens=50, first_tokens=4))
    keys, values, positions = cache.load(1, seq)
    assert 0 in positions and positions.size <= 50
    assert np.array_equal(keys, dense[0][positions])
    assert np.array_equal(values, dense[1][positions])
    more = RNG.standard_normal((2, LAYERS, 20, HEADS, DIM), np.float32)
    cache.append(seq, more[0], more[1])
    assert cache.length(seq) == 6 * SIZE + 25
    assert cache.load(1, seq)[2][-1] == 6 * SIZE + 24


@pytest.mark.parametrize("name", RANKINGS)
def test_pages_that_sequences_share_stay_unless_all_of_them_are_asked(name):
    cache = cache_of()
    seq, centres = filled(cache, 4, 0)
    fork = cache.fork(seq)
    own = RNG.standard_normal((2, LAYERS, 2 * SIZE, HEADS, DIM), np.float32)
    cache.append(fork, own[0], own[1])
    queries = np.repeat(about(centres[0]), 2, axis=0)
    ranking = RANKINGS[name](cache, [seq, fork], queries)
    cache.evict(seq, EvictLowest(ranking, max_pages=0))
    cache.evict(fork, EvictLowest(ranking, max_pages=0))
    assert resident(cache, seq) == resident(cache, fork) == [0, 1, 2, 3]
    plans = cache.free_pages(3, ranking, [seq, fork])
    assert len(plans) == 2
    assert len(resident(cache, seq)) == 1
    assert resident(cache, seq) == resident(cache, fork)


def test_free_pages_frees_so_many_or_none():
    cache = cache_of()
    (a, _), (b, _) = filled(cache), filled(cache, 3)
    free = cache.stats().pages_free
    plans = cache.free_pages(4, NormRatio(cache), first_tokens=1)
    assert sum(plan.blocks.size for plan in plans) == 4
    assert cache.stats().pages_free == free + 4
    assert resident(cache, a)[0] == resident(cache, b)[0] == 0
    before = snapshot(cache)
    with pytest.raises(OutOfEvictablePages) as caught:
        cache.free_pages(6, NormRatio(cache))
    assert (caught.value.need, caught.value.free) == (6, 5)
    assert differences(before, snapshot(cache)) == []
    assert cache.free_pages(0, NormRatio(cache)) == []
    cache.free_pages(5, OldestFirst(), [b, a])
    assert resident(cache, a) == [6] and resident(cache, b) == [3]


def test_a_batch_returns_to_its_budgets_in_one_call():
    cache = cache_of()
    (a, _), (b, _) = filled(cache), filled(cache, 3)
    policy = EvictLowest(NormRatio(cache), max_pages=4)
    wanted = policy.plan(cache.tables, a).blocks.tolist()
    (plan,) = cache.evict_many([b, a], policy)
    assert (plan.seq_id, plan.blocks.tolist()) == (a, wanted)
    assert len(resident(cache, a)) == len(resident(cache, b)) == 4
    cache.begin_step(a)
    with pytest.raises(StepError, match="evict_many cannot run inside an open step"):
        cache.evict_many(b, policy)
    cache.abort_step()


def test_evicted_pages_that_were_published_are_still_found():
    cache = cache_of(sharing=SharingOptions())
    tokens = list(range(4 * SIZE + 2))
    keys, _ = topics(4)
    keys = np.concatenate([keys, keys[:, :2]], axis=1)
    seq = cache.open(tokens)
    cache.append(seq, keys, keys)
    cache.evict(seq, EvictLowest(NormRatio(cache), max_pages=2))
    again = cache.open(tokens)
    assert cache.length(again) == 4 * SIZE


def test_a_shadow_loses_the_same_pages():
    cache = ShadowedCache(config_of(), fraction=1.0, num_threads=1, debug=True)
    (a, _), (b, _) = filled(cache), filled(cache, 3)
    cache.free_pages(4, NormRatio(cache))
    cache.evict(a, EvictLowest(NormRatio(cache), max_pages=2))
    cache.evict_many([a, b], EvictLowest(NormRatio(cache), max_pages=1))
    for seq in (a, b):
        twin = cache._twins[seq]
        assert np.array_equal(
            cache.tables.block_table([seq])[0] > 0, cache.shadow.tables.block_table([twin])[0] > 0
        )


# -- refusals -------------------------------------------------------------------------------------


class World:
    def __init__(self):
        self.cache, self.other = cache_of(), cache_of()
        self.seq, centres = filled(self.cache)
        self.foreign, _ = filled(self.other)
        self.query = about(centres[0])
        exact = LayerOverride(layers=(1,), keys=Exact(), values=Exact())
        self.mixed = cache_of(overrides=(exact,))
        self.mixed_seq, _ = filled(self.mixed)
        self.mass = AttentionMass(self.cache)


BAD = {
    "another cache's ranking": (
        lambda w: w.cache.evict(w.seq, EvictLowest(NormRatio(w.other), max_pages=0)),
        ArgumentError,
        "reads another cache",
    ),
    "tables of nobody": (
        lambda w: w.mass.score(PageTables(SIZE, 4), []),
        ArgumentError,
        "reads another cache",
    ),
    "no layers": (lambda w: NormRatio(w.cache, []), ArgumentError, "one or more"),
    "a layer twice": (lambda w: NormRatio(w.cache, [0, 0]), ArgumentError, "distinct"),
    "a layer that is not there": (lambda w: NormRatio(w.cache, [2]), ArgumentError, "layer"),
    "norms of an exact layer": (
        lambda w: NormRatio(w.mixed, [1]).score(w.mixed.tables, [w.mixed_seq]),
        UnsupportedError,
        r"layer 1 \(exact f16 keys, exact f16 values\)",
    ),
    "bounds of an exact layer": (
        lambda w: QueryBounds(w.mixed, w.mixed_seq, {1: w.query}).score(
            w.mixed.tables, [w.mixed_seq]
        ),
        UnsupportedError,
        "keeps no bounds",
    ),
    "bounds without queries": (
        lambda w: QueryBounds(w.cache, w.seq, {}),
        ArgumentError,
        "one or more",
    ),
    "bounds of another sequence": (
        lambda w: QueryBounds(w.cache, [], {0: w.query[:0]}).score(w.cache.tables, [w.seq]),
        ArgumentError,
        "no queries of sequence",
    ),
    "queries of the wrong shape": (
        lambda w: QueryBounds(w.cache, w.seq, {0: w.query[:, :, 1:]}).score(
            w.cache.tables, [w.seq]
        ),
        ArgumentError,
        "queries",
    ),
    "a decay above one": (lambda w: AttentionMass(w.cache, 1.1), ArgumentError, "decay"),
    "a decay of text": (lambda w: AttentionMass(w.cache, "1"), ArgumentTypeError, "decay"),
    "a NaN decay": (lambda w: AttentionMass(w.cache, float("nan")), ArgumentError, "decay"),
    "a step of no layer": (lambda w: w.mass.add(w.seq, []), ArgumentError, "one layer"),
    "statistics of other sequences": (
        lambda w: w.mass.add([], [w.cache.page_stats(w.cache.score(0, w.query, w.seq), DIM**-0.5)]),
        ArgumentError,
        "statistics of 0",
    ),
    "a foreign sequence": (
        lambda w: w.mass.observe(w.foreign, {0: w.query}),
        UnknownSequence,
        "not open",
    ),
    "a sequence twice": (
        lambda w: w.mass.observe([w.seq, w.seq], {0: np.repeat(w.query, 2, axis=0)}),
        ArgumentError,
        "twice",
    ),
    "freeing for a foreign sequence": (
        lambda w: w.cache.free_pages(1, OldestFirst(), w.foreign),
        UnknownSequence,
        "not open",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_has_its_error_and_changes_nothing(name):
    call, error, words = BAD[name]
    w = World()
    before = snapshot(w.cache), snapshot(w.mixed)
    with pytest.raises(error, match=words):
        call(w)
    assert differences(before[0], snapshot(w.cache)) == []
    assert differences(before[1], snapshot(w.mixed)) == []
    assert w.mass._seen == {}


def test_nothing_is_freed_while_a_step_is_open():
    cache = cache_of()
    seq, _ = filled(cache)
    ranking = NormRatio(cache)
    cache.begin_step(seq)
    assert EvictLowest(ranking, max_pages=0).plan(cache.tables, seq).blocks.size == 0
    with pytest.raises(StepError, match="free_pages cannot run inside an open step"):
        cache.free_pages(1, ranking)
    with pytest.raises(StepError):
        cache.evict(seq, EvictLowest(ranking, max_pages=0))
    cache.abort_step()


def test_by_default_norms_are_those_of_layers_that_have_them():
    exact = LayerOverride(layers=(1,), keys=TurboQuant(), values=Exact())
    cache = cache_of(overrides=(exact,))
    assert NormRatio(cache).layers == [0]
    with pytest.raises(ArgumentError, match="one or more"):
        NormRatio(cache_of(keys=Exact(), values=Exact()))
