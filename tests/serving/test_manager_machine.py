"""A rule-based state machine over every verb of the block manager.

Beside it runs `NaiveManager`, which says the id of every page; and an engine, which writes into the
pages it is given what each position stands for: its tokens and salt up to there. So a page that two
requests write, or a block found by the wrong one, shows as a wrong value.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from naive_manager import NaiveManager, SharedPage, StalePages
from served import manager_of, request_of

from pagedtq.errors import ArgumentError, OutOfPages, StepError
from pagedtq.serving import AllBlocksCleared, BlockRemoved, Blocks, BlockStored

SIZE, PAGES, POISON, DRAFT = 4, 14, -7, -1000
INDEX = st.integers(0, 1 << 16)
#: How an allocation is asked for; most often plainly.
ASKED = st.fixed_dictionaries(
    {
        "lookahead": st.sampled_from([0, 0, 0, 1, 3, 6]),
        "delay": st.sampled_from([False, False, True]),
        "whole": st.sampled_from([False, False, True]),
        "reserved": st.sampled_from([0, 0, 0, 1, 4, 9, 20]),
        "beside": st.booleans(),
    }
)
#: How a request is admitted: how much of it is computed, how much comes from elsewhere, whether
#: that is there at once, whether it is looked up again, and whether a block is forgotten just then.
BEGUN = st.fixed_dictionaries(
    {
        "chunk": st.sampled_from([100, 100, 6, 4, 1]),
        "external": st.sampled_from([0, 0, 3, 8]),
        "arrived": st.booleans(),
        "fresh": st.sampled_from([True, True, False]),
        "forgotten": st.sampled_from([False, False, True]),
        "asked": ASKED,
    }
)


class Engine:
    """The bytes: one number per position, standing for all that decides a key and a value."""

    def __init__(self) -> None:
        self.pages = np.full((PAGES, SIZE), POISON)
        self.contexts: dict[object, int] = {}

    def context(self, salt: bytes, tokens: list[int]) -> list[int]:
        """Return what the positions of some tokens stand for."""
        found, last = [], salt
        for token in tokens:
            last = self.contexts.setdefault((last, token), len(self.contexts))
            found.append(last)
        return found

    def write(self, pages: list[int], first: int, values: list[int]) -> None:
        for at, value in enumerate(values, first):
            if at // SIZE < len(pages):
                self.pages[pages[at // SIZE], at % SIZE] = value

    def read(self, pages: list[int], count: int) -> list[int]:
        return self.pages[pages].ravel()[:count].tolist()


class Replay:
    """What the events add up to."""

    def __init__(self) -> None:
        self.holders: Counter[bytes] = Counter()
        self.blocks: dict[bytes, tuple[object, list[int]]] = {}

    def take(self, events) -> None:
        for event in events:
            if isinstance(event, BlockStored):
                parent = event.parent_block_hash
                for at, key in enumerate(event.block_hashes):
                    own = parent, event.token_ids[at * SIZE : (at + 1) * SIZE]
                    assert self.blocks.setdefault(key, own) == own
                    assert len(own[1]) == SIZE
                    self.holders[key] += 1
                    parent = key
            elif isinstance(event, BlockRemoved):
                self.holders.subtract(event.block_hashes)
                assert min(self.holders.values()) >= 0
            else:
                assert isinstance(event, AllBlocksCleared)
                self.holders.clear()


def machine_for(caching, longest, watermark, totals):
    class Machine(RuleBasedStateMachine):
        def __init__(self):
            super().__init__()
            self.manager = manager_of(
                PAGES,
                SIZE,
                enable_caching=caching,
                max_model_len=longest,
                watermark=watermark,
                enable_events=True,
                log_stats=True,
            )
            limit = 1 << 30 if longest is None else longest
            self.naive = NaiveManager(PAGES, SIZE, caching, limit, int(watermark * PAGES))
            self.engine, self.replay, self.salts = Engine(), Replay(), {}
            self.waiting, self.running = [], []
            #: Running requests whose tokens from elsewhere are not there yet.
            self.loading = {}
            #: What was found for waiting requests, some time ago.
            self.found = {}
            self.asked = [0, 0, 0]
            self.number = 0

        # -- the engine's side ---------------------------------------------------------------

        def expected(self, request, count):
            tokens, salt = request.all_token_ids[:count].tolist(), self.salts[request.request_id]
            values, held = self.engine.context(salt, tokens), self.naive.held[request.request_id]
            if held.taint is not None:
                # What is computed without some tokens is worth nothing to others.
                own = self.engine.context((salt, request.request_id), tokens)
                values[held.taint :] = own[held.taint :]
            return values

        def compute(self, request, start, stop):
            """Write the positions of known tokens; those found before must read right."""
            pages = self.naive.held[request.request_id].pages
            values = self.expected(request, stop)
            assert self.engine.read(pages, start) == values[:start]
            self.engine.write(pages, start, values[start:])
            request.num_computed_tokens = stop

        def usable(self):
            return [one for one in self.running if one.request_id not in self.loading]

        def pick(self, requests, index):
            return requests[index % len(requests)]

        def allocate(self, request, new, found=(), external=0, **asked):
            """Ask both managers; return what both say."""
            before = self.state()
            arguments = {
                "num_lookahead_tokens": asked["lookahead"],
                "num_external_computed_tokens": external,
                "delay_cache_blocks": asked["delay"],
                "full_sequence_must_fit": asked["whole"],
                "reserved_blocks": asked["reserved"],
                "has_scheduled_reqs": asked["beside"],
            }
            given = (len(found) * SIZE, Blocks(list(found))) if found else ()
            try:
                expected = self.naive.allocate(request, new, found, external=external, **asked)
            except StalePages:
                with pytest.raises(ArgumentError, match="look its blocks up again"):
                    self.manager.allocate_slots(request, new, *given, **arguments)
                assert before == self.state()
                totals["stale"] += 1
                return None
            except SharedPage:
                message = f"request {request.request_id}: .* shares its open page: append with"
                with pytest.raises(StepError, match=message):
                    self.manager.allocate_slots(request, new, *given, **arguments)
                assert before == self.state()
                totals["shared"] += 1
                return None
            blocks = self.manager.allocate_slots(request, new, *given, **arguments)
            if expected is None:
                assert blocks is None
                assert before == self.state()
                totals["refused"] += 1
                return None
            assert blocks.page_ids == expected or (not blocks and not expected)
            self.engine.pages[expected] = POISON
            return expected

        def state(self):
            tables, prefix = self.manager.tables, self.manager.tables.prefix
            keys = [] if prefix is None else [prefix.key_of(page) for page in range(PAGES)]
            events = [] if self.manager._log is None else list(self.manager._log._events)
            return (
                tables.pool.ref_counts.tolist(),
                tables.pool.free_ids().tolist(),
                tables._fields.tolist(),
                tables._table.tolist(),
                (tables.version, tables.num_sequences, len(self.manager._holdings)),
                keys,
                events,
            )

        # -- requests come -------------------------------------------------------------------

        @precondition(lambda self: len(self.waiting) + len(self.running) < 7)
        @rule(
            length=st.sampled_from([1, 3, 4, 5, 8, 9, 13, 17, 30, 45]),
            strange=st.sampled_from([None, None, None, 0, 4, 9]),
            salt=st.sampled_from([b"", b"", b"s"]),
            skips=st.sampled_from([False, False, False, True]),
            begun=st.one_of(BEGUN, BEGUN, st.none()),
        )
        def arrive(self, length, strange, salt, skips, begun):
            tokens = [at % 3 for at in range(length)]
            if strange is not None and strange < length:
                tokens[strange] = 9
            name, self.number = f"r{self.number}", self.number + 1
            options = {"salt": salt, "skip_reading_prefix_cache": skips}
            self.salts[name] = salt
            self.waiting.append(request_of(name, tokens, SIZE, **options))
            if begun is not None:
                self.begin(self.waiting[-1], **begun)

        @precondition(lambda self: self.waiting)
        @rule(index=INDEX)
        def look_up(self, index):
            self.look(self.pick(self.waiting, index))

        def look(self, request):
            blocks, num_found = self.manager.get_computed_blocks(request)
            found = self.naive.find(request)
            assert (list(blocks.page_ids), num_found) == (found, len(found) * SIZE)
            self.found[request.request_id] = found
            if caching and not request.skip_reading_prefix_cache:
                counted = 1, request.num_tokens, num_found
                self.asked = [a + b for a, b in zip(self.asked, counted, strict=True)]

        @precondition(lambda self: self.waiting)
        @rule(index=INDEX, begun=BEGUN)
        def admit(self, index, begun):
            self.begin(self.pick(self.waiting, index), **begun)

        def begin(self, request, chunk, external, arrived, fresh, forgotten, asked):
            if fresh or request.request_id not in self.found:
                self.look(request)
            found = self.found.pop(request.request_id)
            if forgotten and found:
                self.evict_blocks_now(found[-1:])
            totals["found"] += len(found)
            start = len(found) * SIZE
            external = min(external, request.num_tokens - 1 - start)
            limit = request.num_tokens if longest is None else min(request.num_tokens, longest)
            if start + external >= limit:
                return
            if not arrived:
                # An engine that waits for them computes and publishes nothing meanwhile.
                asked = asked | {"delay": asked["delay"] or external > 0}
            new = min(chunk, limit - start - external)
            new = 0 if external and not arrived else new
            if self.allocate(request, new, found, external, **asked) is None:
                return
            self.waiting.remove(request)
            self.running.append(request)
            if external and not arrived:
                self.loading[request.request_id] = start, start + external
                request.num_computed_tokens = start + external
            else:
                self.compute(request, start, start + external + new)

        @precondition(lambda self: self.loading)
        @rule(index=INDEX, publish=st.booleans())
        def load(self, index, publish):
            name = self.pick(sorted(self.loading), index)
            request = next(one for one in self.running if one.request_id == name)
            self.compute(request, *self.loading.pop(name))
            if publish:
                self.manager.cache_blocks(request, request.num_computed_tokens)
                self.naive.publish(request, request.num_computed_tokens)

        # -- requests go on ------------------------------------------------------------------

        @precondition(lambda self: self.usable())
        @rule(
            index=INDEX,
            chunk=st.sampled_from([1, 1, 1, 3, 8]),
            drafts=st.sampled_from([0, 0, 0, 2, 5]),
            accepted=st.integers(0, 5),
            asked=ASKED,
        )
        def step(self, index, chunk, drafts, accepted, asked):
            request = self.pick(self.usable(), index)
            start = request.num_computed_tokens
            limit = 60 if longest is None else longest
            if start >= limit:
                return
            if start == request.num_tokens:
                request.append([start % 3])
            known = min(start + chunk, request.num_tokens, limit)
            drafts = min(drafts, limit - known) if known == request.num_tokens else 0
            if self.allocate(request, known - start + drafts, **asked) is None:
                return
            self.compute(request, start, known)
            if not drafts:
                return
            # Some drafts are what the model says; what follows the first wrong one is rejected.
            accepted = min(accepted, drafts)
            pages = self.naive.held[request.request_id].pages
            self.engine.write(pages, known, [DRAFT - at for at in range(drafts)])
            right = [at % 3 for at in range(known, known + accepted)]
            request.append(right)
            self.compute(request, known, known + accepted)
            totals["rejected"] += drafts - accepted

        @precondition(lambda self: self.usable())
        @rule(picks=st.lists(INDEX, min_size=1, max_size=4))
        def step_together(self, picks):
            """Some requests decode by the batched call, whose tokens only the requests know."""
            chosen = {id(one): one for one in (self.pick(self.usable(), i) for i in picks)}
            rooms = self.naive.held
            limit = 60 if longest is None else longest
            batch = [
                one
                for one in chosen.values()
                if one.num_computed_tokens == rooms[one.request_id].room < limit
                and self.naive.owners_of_open_page(rooms[one.request_id]) < 2
            ]
            if not batch:
                return
            tables = self.manager.tables
            ids = [self.manager.sequence_of(one.request_id) for one in batch]
            need = sum(one.num_computed_tokens % SIZE == 0 for one in batch)
            if need > len(self.naive.free):
                before = self.state()
                with pytest.raises(OutOfPages):
                    tables.reserve(ids, 1)
                assert before == self.state()
                return
            tables.commit(tables.reserve(ids, 1))
            for request in batch:
                start = request.num_computed_tokens
                if start == request.num_tokens:
                    request.append([start % 3])
                self.naive.grow(rooms[request.request_id], start + 1)
            for request in batch:
                start = request.num_computed_tokens
                self.compute(request, start, start + 1)

        @precondition(lambda self: self.usable())
        @rule(index=INDEX, count=st.one_of(st.none(), st.integers(0, 30)))
        def cache_blocks(self, index, count):
            request = self.pick(self.usable(), index)
            computed = request.num_computed_tokens
            count = computed if count is None else min(count, computed)
            self.manager.cache_blocks(request, count)
            self.naive.publish(request, count)

        # -- somebody works on their sequences -----------------------------------------------

        @precondition(lambda self: self.usable())
        @rule(
            index=INDEX,
            length=st.one_of(st.integers(0, 20), st.integers(0, 4).map(SIZE.__mul__)),
            inside=st.booleans(),
        )
        def truncate(self, index, length, inside):
            request = self.pick(self.usable(), index)
            owners = [self.naive.owners[page] for page in self.naive.held[request.request_id].pages]
            if inside and max(owners, default=1) > 1:
                length = owners.index(max(owners)) * SIZE + 1 + length % (SIZE - 1)
            length = min(length, request.num_computed_tokens)
            totals["cut"] += length < request.num_computed_tokens
            freed = self.manager.tables.truncate(
                self.manager.sequence_of(request.request_id), length
            )
            assert freed.tolist() == self.naive.truncate(request, length)
            self.engine.pages[[p for p in freed.tolist() if p not in self.naive.key_of]] = POISON
            request.num_computed_tokens = length

        @precondition(lambda self: self.usable())
        @rule(index=INDEX, hidden=st.booleans())
        def hide(self, index, hidden):
            request = self.pick(self.usable(), index)
            hidden = hidden and self.naive.held[request.request_id].room >= SIZE
            seq_id = self.manager.sequence_of(request.request_id)
            self.manager.tables.set_start(seq_id, 0, SIZE if hidden else 0)
            self.naive.hide(request, hidden)
            totals["hidden"] += hidden

        # -- requests go ---------------------------------------------------------------------

        @precondition(lambda self: self.running)
        @rule(index=INDEX, preempt=st.booleans())
        def free(self, index, preempt):
            request = self.pick(self.running, index)
            self.manager.free(request)
            freed = self.naive.release(request)
            # Nobody reads what has no owner and no block.
            self.engine.pages[[page for page in freed if page not in self.naive.key_of]] = POISON
            self.loading.pop(request.request_id, None)
            self.running.remove(request)
            if preempt:
                request.num_computed_tokens = 0
                self.waiting.append(request)

        @precondition(lambda self: len(self.waiting) > 2)
        @rule(index=INDEX)
        def leave(self, index):
            request = self.pick(self.waiting, index)
            self.manager.free(request)
            self.waiting.remove(request)
            self.found.pop(request.request_id, None)

        @precondition(lambda self: len(self.naive.key_of) > 2)
        @rule(pages=st.sets(st.integers(1, PAGES - 1), max_size=3))
        def evict_blocks(self, pages):
            self.evict_blocks_now(pages)

        def evict_blocks_now(self, pages):
            self.manager.evict_blocks(pages)
            for page in pages:
                self.naive.forget(page)

        @precondition(lambda self: self.naive.key_of and len(self.running) < 2)
        @rule()
        def reset_prefix_cache(self):
            assert self.manager.reset_prefix_cache() == self.naive.reset()

        @precondition(lambda self: self.running and self.waiting)
        @rule(index=INDEX, count=st.integers(1, 9))
        def claim_what_is_not_theirs(self, index, count):
            """A namesake gets nothing, nor does a request that says it has computed tokens."""
            request, new = self.pick(self.running, index), self.pick(self.waiting, index)
            twin = request_of(request.request_id, request.all_token_ids.tolist(), SIZE)
            new.num_computed_tokens, before = count, self.state()
            for call, message in (
                (lambda: self.manager.allocate_slots(twin, 5), "another object of that name"),
                (lambda: self.manager.cache_blocks(twin, SIZE), "another object of that name"),
                (lambda: self.manager.free(twin), "another object of that name"),
                (lambda: self.manager.allocate_slots(new, 1), f"num_computed_tokens {count}; set"),
            ):
                with pytest.raises(ArgumentError, match=message):
                    call()
            assert before == self.state()
            new.num_computed_tokens = 0

        # -- what must hold ------------------------------------------------------------------

        @invariant()
        def every_page_is_where_the_model_has_it(self):
            manager, naive, pool = self.manager, self.naive, self.manager.tables.pool
            if pool.num_free % 4 == 0:
                manager.tables.check_integrity()
            assert pool.free_ids().tolist() == naive.free
            assert pool.ref_counts.tolist() == naive.owners
            assert manager.num_free_blocks == len(naive.free)
            assert manager.usage == pytest.approx(1 - len(naive.free) / (PAGES - 1))
            for request in (*self.waiting, *self.running):
                held = naive.held.get(request.request_id)
                pages = [] if held is None else held.pages
                assert manager.get_block_ids(request.request_id) == (pages,)
                shared = [naive.owners[page] == len(naive.held) for page in pages]
                common = (*shared, False).index(False)
                assert manager.get_num_common_prefix_blocks(request.request_id) == [common]
            if caching:
                prefix = manager.tables.prefix
                keys = {page: prefix.key_of(page) for page in np.flatnonzero(prefix.held)}
                assert keys == naive.key_of
                assert {key: prefix.pages_of(key) for key in naive.pages_of} == naive.pages_of
            stats = manager.make_prefix_cache_stats()
            if caching:
                assert [stats.requests, stats.queries, stats.hits] == self.asked
            self.asked = [0, 0, 0]
            self.replay.take(manager.take_events())
            holders = {key: len(pages) for key, pages in naive.pages_of.items()}
            assert +self.replay.holders == Counter(holders)

        @invariant()
        def every_request_reads_its_own_tokens(self):
            for request in self.usable():
                count = request.num_computed_tokens
                pages = self.naive.held[request.request_id].pages
                assert self.engine.read(pages, count) == self.expected(request, count)

        @invariant()
        def every_block_that_can_be_found_holds_what_its_key_says(self):
            contents = {}
            for page, key in self.naive.key_of.items():
                values = self.engine.pages[page].tolist()
                assert contents.setdefault(key, values) == values
                assert min(values) >= 0

        def teardown(self):
            for request in [*self.running]:
                self.manager.free(request)
            self.manager.tables.check_integrity()
            assert self.manager.usage == 0
            assert self.manager.reset_prefix_cache()

    return Machine


@pytest.mark.parametrize(
    ("caching", "longest", "watermark"),
    [(True, None, 0.0), (True, 22, 0.25), (False, 22, 0.0)],
)
def test_no_sequence_of_calls_gives_a_page_or_a_block_to_the_wrong_request(
    caching, longest, watermark
):
    totals = Counter()
    run_state_machine_as_test(
        machine_for(caching, longest, watermark, totals),
        settings=settings(
            max_examples=150,
            stateful_step_count=50,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    reached = {"refused", "rejected", "cut", "hidden"}
    reached |= {"found", "stale", "shared"} if caching else set()
    assert all(totals[what] for what in reached), totals
