"""Evicting the pages that are worth least: what may go, how much goes, planning is pure."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    EvictedError,
    OutOfEvictablePages,
    StepError,
    UnknownSequence,
)
from pagedtq.paging import (
    BlockList,
    EvictionPlan,
    EvictionPolicy,
    EvictLowest,
    KeepFirstLast,
    OldestFirst,
    PageRanking,
    PageScores,
    PageTables,
    RandomOrder,
    SharingOptions,
    evictable_blocks,
    eviction,
    plan_free,
    sealed_blocks,
)
from tests.table_snapshot import snapshot

SIZE = 16
PROMPT = list(range(100, 200))


def filled(*lengths, window=0, num_sinks=0, num_pages=200, sharing=None):
    tables = PageTables(SIZE, num_pages, window, num_sinks, 8, sharing)
    ids = tables.open_many(len(lengths)).tolist()
    tables.commit(tables.reserve(ids, list(lengths)))
    return tables, *ids


def scored(tables, worth):
    """Scores by sequence: {seq_id: {block: value}}."""
    ids = np.array(list(worth), np.int64)
    members = np.repeat(np.arange(ids.size), [len(one) for one in worth.values()])
    blocks = np.array([block for one in worth.values() for block in one], np.int64)
    table = tables.block_table(ids)
    values = np.array([value for one in worth.values() for value in one.values()], float)
    return PageScores(ids, BlockList(members, blocks, table[members, blocks]), values)


def pages_of(tables, seq_id):
    return tables.block_table([seq_id])[0].tolist()


def test_the_blocks_with_the_lowest_scores_go_and_positions_stay():
    tables, seq = filled(100)
    ranking = scored(tables, {seq: {0: 5, 1: 1, 2: 4, 3: 0, 4: 3, 5: 2}})
    freed = eviction.apply(tables, EvictLowest(ranking, max_tokens=60).plan(tables, seq))
    assert freed.tolist() == [6, 4, 2]
    assert pages_of(tables, seq) == [1, 0, 3, 0, 5, 0, 7]
    assert (tables.logical_tokens, tables.resident_tokens) == (100, 52)
    assert tables.csr([seq]).positions.tolist() == [0, 32, 64, 96]
    tables.check_integrity()


@pytest.mark.parametrize(
    ("budget", "left"),
    [
        ({"max_tokens": 100}, 100),
        ({"max_tokens": 99}, 84),
        ({"max_tokens": 84}, 84),
        ({"max_tokens": 83}, 68),
        ({"max_pages": 7}, 100),
        ({"max_pages": 6}, 84),
        ({"max_pages": 1}, 4),
        ({"max_tokens": 0}, 4),
        ({"max_pages": 0}, 4),
    ],
)
def test_a_budget_is_kept_by_as_few_blocks_as_can_do_it(budget, left):
    tables, seq = filled(100)
    eviction.apply(tables, EvictLowest(OldestFirst(), **budget).plan(tables, seq))
    assert tables.resident_tokens == left
    # Applied again, it has nothing to do.
    plan = EvictLowest(OldestFirst(), **budget).plan(tables, seq)
    assert plan.blocks.size == 0


def test_a_sequence_stays_within_its_budget_while_it_grows():
    tables, seq = filled(40)
    policy = EvictLowest(RandomOrder(1), max_tokens=64, first_tokens=4, last_tokens=20)
    for length in range(41, 300):
        tables.commit(tables.reserve([seq], 1))
        eviction.apply(tables, policy.plan(tables, seq))
        assert tables.lengths([seq])[0] == length
        assert tables.resident_tokens <= max(64, min(length, 64))
        assert pages_of(tables, seq)[0] == 1
        tables.check_integrity()


def test_equal_scores_go_in_the_order_of_positions():
    tables, seq = filled(100)
    ranking = scored(tables, {seq: dict.fromkeys(range(6), 1.0)})
    plan = EvictLowest(ranking, max_pages=4).plan(tables, seq)
    assert plan.blocks.tolist() == [0, 1, 2]


@pytest.mark.parametrize("first", [0, 1, 16, 17])
@pytest.mark.parametrize("last", [0, 4, 5, 21, 1000])
def test_protected_tokens_keep_their_blocks(first, last):
    tables, seq = filled(100)
    plan = EvictLowest(OldestFirst(), max_tokens=0, first_tokens=first, last_tokens=last)
    blocks = plan.plan(tables, seq).blocks
    wanted = [b for b in range(6) if b * SIZE >= first and (b + 1) * SIZE <= 100 - last]
    assert blocks.tolist() == wanted


def test_a_batch_is_brought_back_to_its_budgets_at_once():
    tables, *ids = filled(100, 20, 64, 200, 15)
    policy = EvictLowest(RandomOrder(2), max_tokens=50, first_tokens=1)
    wanted = [policy.plan(tables, seq) for seq in ids]
    plans = policy.plan_many(tables, ids)
    assert [plan.seq_id for plan in plans] == [ids[0], ids[2], ids[3]]
    for plan in plans:
        alone = wanted[ids.index(plan.seq_id)]
        assert plan.blocks.tolist() == alone.blocks.tolist()
    eviction.apply_all(tables, plans)
    assert tables.resident_lengths(ids).tolist() == [36, 20, 48, 40, 15]
    assert policy.plan_many(tables, ids) == policy.plan_many(tables, []) == []
    fork = tables.fork(ids[3])
    few = EvictLowest(OldestFirst(), max_pages=1)
    assert few.plan_many(tables, [ids[3], fork]) == []
    with pytest.raises(ArgumentError, match="twice"):
        few.plan_many(tables, [fork, fork])


def test_the_exact_window_and_the_open_block_are_never_taken():
    for length in range(1, 120):
        tables, seq = filled(length, window=2 * SIZE, num_sinks=4)
        plan = EvictLowest(OldestFirst(), max_tokens=0).plan(tables, seq)
        ring_start = tables.state(seq).ring_start
        assert plan.blocks.tolist() == list(range(ring_start // SIZE))
        eviction.apply(tables, plan)
        tables.check_integrity()


def test_pages_of_other_sequences_are_never_taken():
    tables, seq = filled(100)
    fork = tables.fork(seq)
    tables.commit(tables.reserve([fork], 40))
    for one, own in ((seq, []), (fork, [6, 7])):
        plan = EvictLowest(OldestFirst(), max_tokens=0).plan(tables, one)
        assert plan.blocks.tolist() == own


def test_a_page_shared_within_the_batch_goes_from_all_its_owners_or_from_none():
    tables, seq = filled(64)
    fork = tables.fork(seq)
    tables.commit(tables.reserve([seq, fork], [32, 32]))
    other = tables.fork(seq)
    with pytest.raises(OutOfEvictablePages, match="need 1 evictable pages, found 0 of 8 in use"):
        plan_free(tables, 1, OldestFirst(), [seq])
    tables.close([other])
    worth = {seq: {0: 0, 1: 9, 2: 3, 3: 4, 4: 2, 5: 1}, fork: {0: 9, 1: 0, 2: 4, 3: 3, 4: 7, 5: 8}}
    plans = plan_free(tables, 4, scored(tables, worth), [seq, fork])
    # Its own two pages, then the shared ones whose most wanted block is wanted least: 2 and 3.
    assert [(p.seq_id, p.blocks.tolist()) for p in plans] == [(seq, [2, 3, 4, 5]), (fork, [2, 3])]
    assert sorted(eviction.apply_all(tables, plans).tolist()) == [3, 4, 5, 6]
    tables.check_integrity()


def test_freeing_takes_the_lowest_scores_wherever_they_are():
    tables, a, b, c = filled(48, 48, 48)
    worth = {a: {0: 9, 1: 1, 2: 8}, b: {0: 7, 1: 6, 2: 5}, c: {0: 0, 1: 9, 2: 2}}
    before = tables.pool.num_free
    plans = plan_free(tables, 3, scored(tables, worth))
    assert [(p.seq_id, p.blocks.tolist()) for p in plans] == [(a, [1]), (c, [0, 2])]
    assert eviction.apply_all(tables, plans).size == 3
    assert tables.pool.num_free == before + 3
    assert plan_free(tables, 0, OldestFirst()) == []


def test_more_than_can_be_freed_is_refused_with_the_numbers():
    tables, a, b = filled(40, 20)
    with pytest.raises(OutOfEvictablePages) as caught:
        plan_free(tables, 4, OldestFirst())
    assert (caught.value.need, caught.value.free, caught.value.total) == (4, 3, 5)
    assert "need 4 evictable pages, found 3 of 5 in use; name more sequences" in str(caught.value)
    with pytest.raises(OutOfEvictablePages, match="found 2"):
        plan_free(tables, 3, OldestFirst(), [a], first_tokens=0)
    with pytest.raises(OutOfEvictablePages, match="found 1"):
        plan_free(tables, 3, OldestFirst(), [a], first_tokens=4)
    with pytest.raises(OutOfEvictablePages, match="found 0"):
        plan_free(tables, 1, OldestFirst(), [a, b], last_tokens=100)


def test_an_open_step_keeps_the_pages_of_its_members_and_nobody_elses():
    tables, a, b = filled(48, 48)
    step = tables.reserve([a], 1)
    assert EvictLowest(OldestFirst(), max_tokens=0).plan(tables, a).blocks.size == 0
    plan = EvictLowest(OldestFirst(), max_tokens=0).plan(tables, b)
    assert plan.blocks.tolist() == [0, 1, 2]
    with pytest.raises(StepError, match="evict must wait"):
        eviction.apply(tables, plan)
    with pytest.raises(StepError, match="evict must wait"):
        eviction.apply_all(tables, [plan])
    tables.commit(step)
    assert eviction.apply(tables, plan).size == 3


def test_pages_in_flight_are_never_taken():
    tables, seq = filled(100)
    tables.pages_in_flight = lambda: np.array([2, 2, 4], np.int32)
    plan = EvictLowest(OldestFirst(), max_tokens=0).plan(tables, seq)
    assert plan.blocks.tolist() == [0, 2, 4, 5]


def test_blocks_without_a_score_or_with_another_page_by_now_stay():
    tables, seq = filled(100)
    ranking = scored(tables, {seq: {1: 1, 2: 0, 3: np.inf, 5: 2}})
    tables.truncate(seq, 80)
    tables.commit(tables.reserve(tables.open_many(1), 1))  # takes the page that block 5 had
    tables.commit(tables.reserve([seq], 16))
    plan = EvictLowest(ranking, max_tokens=0).plan(tables, seq)
    assert plan.blocks.tolist() == [1, 2]
    with pytest.raises(OutOfEvictablePages, match="found 2"):
        plan_free(tables, 3, ranking, [seq])


def test_a_boundary_that_was_set_before_stays():
    tables, seq = filled(160)
    eviction.apply(tables, KeepFirstLast(20, 80).plan(tables, seq))
    eviction.apply(tables, EvictLowest(OldestFirst(), max_pages=5).plan(tables, seq))
    reads = tables.reads([seq], True)
    assert (reads.keep[0], reads.start[0]) == (20, 80)
    eviction.apply(tables, EvictLowest(OldestFirst(), max_pages=5).plan(tables, seq))
    reads = tables.reads([seq], True)
    assert (reads.keep[0], reads.start[0]) == (20, 80)


def test_what_follows_an_eviction_is_tainted():
    tables = PageTables(SIZE, 50, sharing=SharingOptions())
    seq = tables.open(PROMPT[:50])
    tables.commit(tables.reserve([seq], 50, PROMPT[:50]))
    eviction.apply(tables, EvictLowest(OldestFirst(), max_pages=3).plan(tables, seq))
    tables.commit(tables.reserve([seq], 30, list(range(30))))
    assert len(tables.prefix) == 3
    tables.check_integrity()


def test_a_fork_of_an_evicted_sequence_has_the_same_holes():
    tables, seq = filled(100)
    eviction.apply(tables, EvictLowest(OldestFirst(), max_pages=4).plan(tables, seq))
    fork = tables.fork(seq)
    assert pages_of(tables, fork) == pages_of(tables, seq) == [0, 0, 0, 4, 5, 6, 7]
    assert tables.resident_lengths([fork]).tolist() == [52]


# -- scores ----------------------------------------------------------------------------------------


def test_a_random_order_is_fixed_by_its_seed_and_uniform():
    tables, seq = filled(16_000, num_pages=2000)
    first = RandomOrder(3).score(tables, [seq])
    assert np.array_equal(first.values, RandomOrder(3).score(tables, [seq]).values)
    assert not np.array_equal(first.values, RandomOrder(4).score(tables, [seq]).values)
    assert first.values.min() >= 0 and first.values.max() < 1
    # 1000 uniform numbers: mean and variance within five standard errors.
    assert abs(first.values.mean() - 0.5) < 5 * (1 / 12 / 1000) ** 0.5
    assert abs(first.values.var() - 1 / 12) < 5 * (1 / 180 / 1000) ** 0.5
    # Not an order of the positions.
    assert abs(np.corrcoef(first.values, np.arange(1000))[0, 1]) < 5 / 1000**0.5


def test_scores_answer_for_some_of_their_sequences_in_the_order_asked_for():
    tables, a, b, c = filled(48, 48, 48)
    worth = {a: {0: 1, 2: 2}, b: {1: 3}, c: {0: 4, 1: 5, 2: 6}}
    scores = scored(tables, worth)
    other = tables.open()
    part = scores.score(tables, [c, other, a])
    assert part.seq_ids.tolist() == [c, other, a]
    assert part.blocks.members.tolist() == [0, 0, 0, 2, 2]
    assert part.blocks.blocks.tolist() == [0, 1, 2, 0, 2]
    assert part.values.tolist() == [4, 5, 6, 1, 2]
    assert isinstance(scores, PageRanking) and isinstance(EvictLowest(scores, 1), EvictionPolicy)


def test_sealed_blocks_are_resident_whole_and_below_the_ring():
    tables, a, b = filled(100, 40, window=SIZE)
    tables.evict(a, [1])
    found = sealed_blocks(tables, [b, a])
    assert found.members.tolist() == [0, 1, 1, 1, 1]
    assert found.blocks.tolist() == [0, 0, 2, 3, 4]
    assert found.pages.tolist() == [
        pages_of(tables, b)[0],
        *(pages_of(tables, a)[i] for i in (0, 2, 3, 4)),
    ]
    assert sealed_blocks(tables, []).blocks.size == 0


# -- refusals --------------------------------------------------------------------------------------

BAD = {
    "no budget": (lambda t, s: EvictLowest(OldestFirst()), ArgumentError),
    "two budgets": (
        lambda t, s: EvictLowest(OldestFirst(), max_tokens=1, max_pages=1),
        ArgumentError,
    ),
    "a negative budget": (lambda t, s: EvictLowest(OldestFirst(), max_tokens=-1), ArgumentError),
    "half a page": (lambda t, s: EvictLowest(OldestFirst(), max_pages=0.5), ArgumentTypeError),
    "True tokens": (lambda t, s: EvictLowest(OldestFirst(), max_tokens=True), ArgumentTypeError),
    "negative first tokens": (
        lambda t, s: EvictLowest(OldestFirst(), max_pages=1, first_tokens=-1),
        ArgumentError,
    ),
    "half a last token": (
        lambda t, s: EvictLowest(OldestFirst(), max_pages=1, last_tokens=0.5),
        ArgumentTypeError,
    ),
    "a seed below zero": (lambda t, s: RandomOrder(-1), ArgumentError),
    "a seed of text": (lambda t, s: RandomOrder("1"), ArgumentTypeError),
    "a sequence that is not open": (
        lambda t, s: EvictLowest(OldestFirst(), max_pages=1).plan(t, 5),
        UnknownSequence,
    ),
    "a sequence of text": (
        lambda t, s: EvictLowest(OldestFirst(), max_pages=1).plan(t, "a"),
        ArgumentTypeError,
    ),
    "a NaN score": (
        lambda t, s: EvictLowest(scored(t, {s: {0: np.nan}}), max_pages=1).plan(t, s),
        ArgumentError,
    ),
    "more blocks than scores": (
        lambda t, s: EvictLowest(
            scored(t, {s: {0: 1, 1: 2}})._replace(values=np.ones(1)), max_pages=1
        ).plan(t, s),
        ArgumentError,
    ),
    "a sequence twice": (lambda t, s: plan_free(t, 1, OldestFirst(), [s, s]), ArgumentError),
    "an unknown sequence": (lambda t, s: plan_free(t, 1, OldestFirst(), [7]), UnknownSequence),
    "negative pages": (lambda t, s: plan_free(t, -1, OldestFirst()), ArgumentError),
    "half a page to free": (lambda t, s: plan_free(t, 1.5, OldestFirst()), ArgumentTypeError),
    "more than there are": (lambda t, s: plan_free(t, 99, OldestFirst()), OutOfEvictablePages),
    "negative tokens to protect": (
        lambda t, s: plan_free(t, 1, OldestFirst(), first_tokens=-1),
        ArgumentError,
    ),
    "two plans for a sequence": (
        lambda t, s: eviction.apply_all(
            t, [EvictionPlan(s, np.array([0]), 0, 0), EvictionPlan(s, np.array([1]), 0, 0)]
        ),
        ArgumentError,
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_has_its_error_and_changes_nothing(name):
    call, error = BAD[name]
    tables, seq = filled(100)
    before = snapshot(tables)
    with pytest.raises(error) as caught:
        call(tables, seq)
    assert type(caught.value) is error
    assert snapshot(tables) == before


def test_the_message_of_a_nan_score_names_block_and_sequence():
    tables, a, b = filled(40, 40)
    ranking = scored(tables, {a: {0: 1}, b: {0: 1, 1: np.nan}})
    with pytest.raises(ArgumentError, match=f"score of block 1 of sequence {b} is NaN"):
        plan_free(tables, 1, ranking)


FAULTS = {
    "evicted meanwhile": (lambda t, s: t.evict(s, [1]), EvictedError),
    "cut meanwhile": (lambda t, s: t.truncate(s, 20), ArgumentError),
    "closed meanwhile": (lambda t, s: t.close([s]), UnknownSequence),
    "a step opened meanwhile": (lambda t, s: t.reserve([s], 1), StepError),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("at", range(4))
def test_plans_of_several_sequences_apply_together_or_not_at_all(fault, at):
    spoil, error = FAULTS[fault]
    tables, *ids = filled(48, 48, 48, 48)
    plans = [EvictionPlan(seq, np.array([0, 1]), 3, 40) for seq in ids]
    spoil(tables, ids[at])
    before = snapshot(tables)
    with pytest.raises(error):
        eviction.apply_all(tables, plans)
    assert snapshot(tables) == before


# -- laws ------------------------------------------------------------------------------------------


@st.composite
def worlds(draw):
    """Tables with sequences of all kinds: windows, forks, holes, boundaries, sharing."""
    window = draw(st.sampled_from([0, 0, SIZE, 2 * SIZE]))
    tables = PageTables(SIZE, 300, window, 4 if window else 0, 16, SharingOptions())
    ids = []
    for number in range(draw(st.integers(1, 4))):
        length = draw(st.integers(0, 150))
        tokens = list(range(number % 2, number % 2 + length))
        seq = tables.open(tokens)
        rest = length - tables.length_of(seq)
        tables.commit(tables.reserve([seq], rest))
        ids.append(seq)
        if draw(st.booleans()):
            ids.append(tables.fork(seq))
            tables.commit(
                tables.reserve([draw(st.sampled_from(ids[-2:]))], draw(st.integers(0, 40)))
            )
        if draw(st.booleans()):
            low = tables.state(seq).ring_start // SIZE
            gone = draw(st.sets(st.integers(0, max(low - 1, 0)), max_size=3)) if low else set()
            tables.evict(seq, sorted(gone))
    step = draw(st.booleans())
    if step:
        tables.reserve([draw(st.sampled_from(ids))], draw(st.integers(0, 20)))
    return tables, ids, step


@settings(max_examples=150, derandomize=True, deadline=None)
@given(worlds(), st.data())
def test_planning_is_pure_and_takes_only_what_may_go(world, data):
    tables, ids, step = world
    first, last = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 40))
    ranking = RandomOrder(data.draw(st.integers(0, 9)))
    seq = data.draw(st.sampled_from(ids))
    budget = data.draw(st.sampled_from([{"max_pages": 2}, {"max_tokens": 20}, {"max_tokens": 0}]))
    policy = EvictLowest(ranking, **budget, first_tokens=first, last_tokens=last)
    before = snapshot(tables)
    plan = policy.plan(tables, seq)
    again = policy.plan(tables, seq)
    free = evictable_blocks(tables, ids, first, last)
    need = data.draw(st.integers(0, np.unique(free.pages).size))
    plans = plan_free(tables, need, ranking, ids, first, last)
    assert snapshot(tables) == before
    assert plan.blocks.tolist() == again.blocks.tolist()

    length, ring_start = tables.length_of(seq), tables.state(seq).ring_start
    busy = set(tables.pages_in_flight().tolist())
    refs, pages = tables.pool.ref_counts, pages_of(tables, seq)
    for block in plan.blocks.tolist():
        assert first <= block * SIZE and (block + 1) * SIZE <= min(length - last, ring_start)
        assert pages[block] and refs[pages[block]] == 1 and pages[block] not in busy
    owners = {}
    for one in plans:
        for block in one.blocks.tolist():
            page = pages_of(tables, one.seq_id)[block]
            owners[page] = owners.get(page, 0) + 1
    assert len(owners) == need
    assert all(refs[page] == count for page, count in owners.items())
    if step:
        return
    logical = tables.logical_tokens
    assert set(eviction.apply_all(tables, plans).tolist()) == set(owners)
    assert tables.logical_tokens == logical
    tables.check_integrity()
    freed = eviction.apply(tables, policy.plan(tables, seq))
    assert freed.size == 0 or tables.resident_lengths([seq])[0] < length
    tables.check_integrity()
