"""The machine of prefix sharing, with every other way to name, publish and append blocks."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test
from naming_model import NamingCache
from swap_rules import INDEX
from test_sharing_machine import machine_for

EXTRAS = st.sampled_from([{3: b"x"}, {0: b"x"}, {1: b"y", 3: b"x"}, {}])


def naming_machine(page_size, window, num_sinks, totals):
    chunks = st.sampled_from([0, 1, 2, page_size, page_size + 1, 2 * page_size + 1])

    class Machine(machine_for(page_size, window, num_sinks, "sha256", [])):
        def __init__(self):
            super().__init__()
            slots = 3 if window else 0
            self.cache = NamingCache(
                page_size, 28, window, num_sinks, slots, num_host_pages=24, verify_tokens=True
            )

        @initialize(twins=st.booleans())
        def begin_with_names(self, twins):
            # The second one finds what the first one wrote.
            prompt = [at % 3 for at in range(3 * page_size + 1)]
            for on_pages in (False, True) if twins else ():
                seq_id = self.cache.open_named(prompt, 9, on_pages)
                left = len(prompt) - len(self.cache.model[seq_id].tokens)
                self.cache.append({seq_id: left})

        def named(self):
            cache = self.cache
            return [one for one in cache.usable() if cache.model[one].opaque]

        def pick_named(self, index):
            return self.named()[index % len(self.named())]

        @precondition(lambda self: len(self.cache.model) < 7)
        @rule(
            length=st.sampled_from([5 * page_size, 3 * page_size + 1, 2 * page_size + 1, 1]),
            strange=st.sampled_from([None, None, None, page_size]),
            num_keys=st.sampled_from([9, 9, 2, 0]),
            on_pages=st.booleans(),
            chunk=st.one_of(st.none(), chunks),
        )
        def open_named(self, length, strange, num_keys, on_pages, chunk):
            prompt = [at % 3 for at in range(length)]
            if strange is not None and strange < length:
                prompt[strange] = 9
            seq_id = self.cache.open_named(prompt, num_keys, on_pages)
            left = length - len(self.cache.model[seq_id].tokens)
            self.cache.append({seq_id: left if chunk is None else chunk})

        @precondition(lambda self: len(self.cache.model) < 7)
        @rule(length=st.sampled_from([5 * page_size, 3 * page_size + 1]), extras=EXTRAS)
        def open_with_extras(self, length, extras):
            seq_id = self.cache.open_with([at % 3 for at in range(length)], b"", extras)
            self.cache.append({seq_id: length - len(self.cache.model[seq_id].tokens)})
            # Behind the prompt too a block has its extra key.
            self.cache.append({seq_id: page_size})

        @precondition(lambda self: self.named())
        @rule(index=INDEX, count=st.integers(0, 3))
        def extend_keys(self, index, count):
            self.cache.extend_keys(self.pick_named(index), count)

        @precondition(lambda self: self.named())
        @rule(index=INDEX, count=st.integers(0, 4), with_tokens=st.booleans())
        def publish_keys(self, index, count, with_tokens):
            self.cache.publish_keys(self.pick_named(index), count, with_tokens)

        @precondition(lambda self: self.some_open())
        @rule(
            members=st.lists(st.tuples(INDEX, chunks), min_size=1, max_size=4),
            kept=st.integers(0, page_size),
            rejected=st.booleans(),
        )
        def draft(self, members, kept, rejected):
            """Some tokens are drafts: cut away again, or published by what follows."""
            counts = {self.pick(index): chunk for index, chunk in members}
            lengths = {one: len(self.cache.model[one].tokens) for one in counts}
            if self.cache.append(counts, kept=kept) and rejected:
                for seq_id, length in lengths.items():
                    self.cache.truncate(seq_id, min(length + kept, length + counts[seq_id]))

        @precondition(lambda self: not window and self.some_open())
        @rule(index=INDEX, count=chunks, keep_free=st.sampled_from([0, 0, 2, 9]))
        def lengthen(self, index, count, keep_free):
            self.cache.lengthen(self.pick(index), count, keep_free)

        @precondition(lambda self: self.some_open() and len(self.cache.model) < 7)
        @rule(picks=st.lists(INDEX, min_size=1, max_size=2))
        def adopt(self, picks):
            self.cache.adopt(sorted({self.pick(index) for index in picks}))

        def teardown(self):
            cache = self.cache
            totals["found"] += cache.hits
            totals["found by name"] += cache.named_hits
            totals["held back"] += cache.num_drafts
            totals["adopted"] += cache.num_adopted
            super().teardown()

    return Machine


@pytest.mark.parametrize(("page_size", "window", "num_sinks"), [(4, 0, 0), (3, 0, 0), (4, 4, 2)])
def test_whoever_names_a_block_it_holds_what_the_name_says(page_size, window, num_sinks):
    totals = Counter()
    run_state_machine_as_test(
        naming_machine(page_size, window, num_sinks, totals),
        settings=settings(
            max_examples=30,
            stateful_step_count=40,
            derandomize=True,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    reached = "found", "found by name", "held back", "adopted"
    assert all(totals[what] for what in reached), totals
