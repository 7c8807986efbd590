"""Hypotheses of a beam search go on from each other: forked and closed, and never confused."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedtq.errors import ArgumentError
from pagedtq.serving import GenerationRequest
from tests.serving.paged_engine import PagedEngine
from tests.serving.test_scheduler import assert_drained, request_of, scheduler_of


def cost_of(tokens):
    return zlib.crc32(bytes(tokens)) % 1000


def cost_from(start, tokens):
    return sum(cost_of(tokens[: end + 1]) for end in range(start, len(tokens)))


def best(hypotheses, width):
    """Return the cheapest continuations as (cost, index of the parent, token)."""
    candidates = [
        (cost + cost_of([*tokens, token]), parent, token)
        for parent, (cost, tokens) in enumerate(hypotheses)
        for token in range(width + 1)
    ]
    return sorted(candidates)[:width]


def search(request):
    """Return the hypotheses that a beam search on plain lists ends with."""
    hypotheses, done = [(0, list(request.prompt))], []
    for count in range(request.max_tokens):
        width = request.beam_width - len(done)
        grown = [
            (cost, [*hypotheses[parent][1], token])
            for cost, parent, token in best(hypotheses, width)
        ]
        last = count + 1 == request.max_tokens
        ended = [last or tokens[-1] in request.stop_token_ids for _, tokens in grown]
        done += [h for h, end in zip(grown, ended) if end]
        hypotheses = [h for h, end in zip(grown, ended) if not end]
        if not hypotheses:
            break
    return [tokens[len(request.prompt) :] for _, tokens in done]


class BeamEngine(PagedEngine):
    """Chooses the cheapest continuations of each request from what its pages hold."""

    def __init__(self, scheduler, requests):
        super().__init__(scheduler)
        self.requests = {request.request_id: request for request in requests}

    def sample(self, step):
        contents = [self.read(seq_id).tolist() for seq_id in step.plan.seq_ids.tolist()]
        members = self.scheduler.members(step)
        tokens = np.zeros(step.sample_members.size, np.int32)
        parents = step.sample_members.copy()
        for name in set(members):
            request = self.requests[name]
            at = [i for i, m in enumerate(parents.tolist()) if members[m] == name]
            own = sorted({int(step.sample_members[i]) for i in at})
            start = len(request.prompt)
            hypotheses = [(cost_from(start, contents[m]), contents[m]) for m in own]
            for i, (_, parent, token) in zip(at, best(hypotheses, len(at))):
                tokens[i], parents[i] = token, own[parent]
        return tokens, parents

    def run_step(self, step):
        self.compute(step)
        return self.scheduler.update(*self.sample(step))


def beams(name, prompt, max_tokens, width, **more):
    return request_of(name, prompt, max_tokens, beam_width=width, **more)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 3), min_size=1, max_size=12),
            st.integers(1, 12),
            st.sampled_from([2, 3, 5]),
            st.sampled_from([(), (2,)]),
        ),
        min_size=1,
        max_size=5,
    ),
    st.integers(31, 60),
    st.booleans(),
    st.sampled_from([0, 4]),
    st.sampled_from([0, 12, 200]),
)
@settings(max_examples=80)
def test_a_search_finds_what_it_finds_on_plain_lists_whatever_the_pool(
    shapes, num_pages, sharing, window, host
):
    scheduler = scheduler_of(
        num_pages,
        sharing=sharing,
        window=window,
        slots=9,
        step_tokens=16,
        max_running=9,
        host=host,
        preemption="swap" if host else "recompute",
    )
    requests = [
        beams(f"r{at}", prompt, count, width, stop_token_ids=stops)
        for at, (prompt, count, width, stops) in enumerate(shapes)
    ]
    engine, finished, steps = BeamEngine(scheduler, requests), {}, 0
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        output = engine.run_step(scheduler.schedule())
        scheduler.tables.check_integrity()
        finished |= {done.request_id: done for done in output.finished}
        steps += 1
        assert steps < 3000
    for request in requests:
        found = [c.token_ids.tolist() for c in finished[request.request_id].completions]
        assert found == search(request)
    assert_drained(scheduler)


def test_a_preempted_search_begins_again_and_ends_the_same():
    requests = [beams(name, 7, 12, 3) for name in "ab"]
    scheduler = scheduler_of(13)
    engine, finished = BeamEngine(scheduler, requests), {}
    for request in requests:
        scheduler.add(request)
    while scheduler.has_work:
        output = engine.run_step(scheduler.schedule())
        finished |= {done.request_id: done for done in output.finished}
    assert [finished[name].num_preemptions > 0 for name in "ab"] == [False, True]
    for request in requests:
        found = [c.token_ids.tolist() for c in finished[request.request_id].completions]
        assert found == search(request)


def test_hypotheses_without_a_child_give_their_pages_back():
    scheduler = scheduler_of(40)
    scheduler.add(GenerationRequest(request_id="a", prompt=8, max_tokens=9, beam_width=3))
    step = scheduler.schedule()
    assert step.sample_members.tolist() == [0, 0, 0]
    scheduler.update([1, 2, 3])
    scheduler.schedule()
    assert scheduler.tables.pool.num_used == 2 + 3
    # All go on from the second.
    scheduler.update([1, 2, 3], [1, 1, 1])
    assert scheduler.tables.pool.num_used == 2 + 1
    scheduler.schedule()
    assert scheduler.tables.pool.num_used == 2 + 3


@pytest.mark.parametrize("parents", [[0, 3, 2, 3], [0, 1, 2, 2], [0, 1, 9, 3], [0, 1, -1, 3]])
def test_a_token_cannot_continue_a_hypothesis_of_another_request(parents):
    scheduler = scheduler_of(40)
    scheduler.add(beams("a", 8, 9, 2))
    scheduler.add(request_of("b", 8, 9, num_samples=2))
    step = scheduler.schedule()
    scheduler.update(np.arange(step.sample_members.size))
    scheduler.schedule()
    with pytest.raises(ArgumentError, match="hypothesis of the same beam search"):
        scheduler.update([1, 2, 3, 4], parents)
    with pytest.raises(ArgumentError, match="expected 4 parents, got 2"):
        scheduler.update([1, 2, 3, 4], [0, 1])
    scheduler.update([1, 2, 3, 4], [1, 1, 2, 3])
