"""What eviction policies cost in attention error, at equal budgets of resident tokens.

Synthetic decoding: sequences with attention sinks, keys that resemble their neighbours' (a random
walk), and topics that come back, some of them often (Zipf). A prompt is stored, then tokens are
decoded one by one. For the first 32 of them nothing is evicted, so that policies can watch; then a
policy brings each sequence to its budget, and keeps it there after every step. Outputs are compared
with those of the same cache without eviction, so that quantisation is on both sides.

Three questions: queries about recurring topics (error over all steps with eviction); a needle that
is asked for every 16 steps, before eviction begins as well; a needle nobody asked for before the
last step (error at the needle's queries only). Every policy keeps the first 4 and the newest 32
tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from benchmarks.report import arguments, publish
from pagedtq import KeepFirstLast, PagedKVCache, preset
from pagedtq.cache import AttentionMass, NormRatio, QueryBounds
from pagedtq.paging import EvictionPolicy, EvictLowest, OldestFirst, RandomOrder

HEADS, GROUP, DIM, PAGE = 2, 2, 64, 16
SINKS, RECENT = 4, 32
TOPICS = 24
#: Steps before anything is evicted.
WATCHED = 32
#: A needle is asked for every so many steps, the last time 8 steps before eviction begins.
ASKED, FIRST_ASKED = 16, 7


class Draw(NamedTuple):
    """Inputs of a case.

    ``keys, values`` are ``[batch, tokens, HEADS, DIM]``, ``queries`` those of the last tokens,
    ``[batch, steps, HEADS * GROUP, DIM]``; ``judged`` lists the steps whose error counts, and
    ``needle`` the block of each sequence's needle, or -1.
    """

    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    judged: np.ndarray
    needle: np.ndarray


def units(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Return random directions ``[*shape, DIM]`` of norm ``sqrt(DIM)``."""
    vectors = rng.standard_normal((*shape, DIM))
    return vectors * DIM**0.5 / np.linalg.norm(vectors, axis=-1, keepdims=True)


def draw(case: str, batch: int, prompt: int, steps: int, rng: np.random.Generator) -> Draw:
    """Make the inputs of a case."""
    tokens = prompt + steps
    sink, topics = units(rng, HEADS), units(rng, batch, TOPICS, HEADS)
    popularity = 1 / np.arange(1, TOPICS + 1)
    popularity /= popularity.sum()
    # Segments of some pages about one topic each.
    starts = rng.random((batch, tokens)) < 1 / (3 * PAGE)
    starts[:, 0] = True
    drawn = rng.choice(TOPICS, (batch, tokens), p=popularity)
    about = np.take_along_axis(
        drawn, np.maximum.accumulate(np.where(starts, np.arange(tokens), 0), axis=1), axis=1
    )
    walk = np.empty((batch, tokens, HEADS, DIM))
    walk[:, 0] = rng.standard_normal((batch, HEADS, DIM))
    memory = 0.97
    for t in range(1, tokens):
        step = rng.standard_normal((batch, HEADS, DIM))
        walk[:, t] = memory * walk[:, t - 1] + (1 - memory**2) ** 0.5 * step
    rows = np.arange(batch)[:, None]
    keys = 0.7 * topics[rows, about] + 0.6 * walk + 0.4 * rng.standard_normal(walk.shape)
    values = rng.standard_normal(walk.shape)
    # Norms of tokens differ, and say nothing about what will be asked for.
    keys *= np.exp(0.25 * rng.standard_normal((batch, tokens, HEADS, 1)))
    values *= np.exp(0.25 * rng.standard_normal((batch, tokens, HEADS, 1)))
    keys[:, :SINKS] = 1.2 * sink + 0.1 * keys[:, :SINKS]
    values[:, :SINKS] *= 0.1
    asked = rng.choice(TOPICS, (batch, steps), p=popularity)
    same = rng.random((batch, steps)) < 0.5
    asked = np.where(same, about[:, prompt:], asked)
    queries = 0.9 * topics[rows, asked] + 0.5 * walk[:, prompt:] + 0.6 * sink
    queries = queries + 0.3 * rng.standard_normal(queries.shape)
    judged, needle = np.arange(WATCHED + 1, steps), np.full(batch, -1)
    if case != "recurring topics":
        place = rng.integers(2 * PAGE, prompt - 4 * RECENT, batch)
        direction = units(rng, batch, HEADS)
        keys[np.arange(batch), place] = 1.2 * direction
        often = case == "needle, asked before"
        asked_at = np.arange(FIRST_ASKED, steps, ASKED) if often else np.array([steps - 1])
        queries[:, asked_at] = 1.1 * direction[:, None] + 0.6 * sink
        judged = asked_at[asked_at > WATCHED]
        needle = place // PAGE
    wide = np.repeat(queries, GROUP, axis=2) + 0.1 * rng.standard_normal(
        (batch, steps, HEADS * GROUP, DIM)
    )
    kinds = (keys, values, wide)
    return Draw(*(one.astype(np.float32) for one in kinds), judged, needle)


class Run:
    """One cache with a batch of prompts, decoded step by step."""

    def __init__(self, given: Draw, prompt: int) -> None:
        batch, tokens = given.keys.shape[:2]
        config = preset(
            "k4v4",
            num_layers=1,
            num_kv_heads=HEADS,
            head_dim=DIM,
            num_pages=batch * (tokens // PAGE + 1) + 1,
            page_size=PAGE,
            num_window_slots=batch,
            key_bounds=True,
        )
        self.cache, self.given, self.prompt = PagedKVCache(config), given, prompt
        self.ids = np.array([self.cache.open() for _ in range(batch)])
        self.append(slice(0, prompt))

    def append(self, part: slice) -> None:
        """Append tokens of all sequences."""
        keys, values = (one[:, part] for one in self.given[:2])
        count = keys.shape[1]
        flat = (1, len(self.ids) * count, HEADS, DIM)
        self.cache.append(
            self.ids, keys.reshape(flat), values.reshape(flat), [count] * len(self.ids)
        )

    def decode(self, choose: Callable[[Run, int], EvictionPolicy] | None) -> Any:
        """Decode all steps; return outputs, lse, and mean resident tokens after eviction."""
        outs, lses, resident = [], [], []
        for step in range(self.given.queries.shape[1]):
            self.append(slice(self.prompt + step, self.prompt + step + 1))
            queries = self.given.queries[:, step]
            out, lse = self.cache.attend(0, queries, self.ids)
            outs.append(out)
            lses.append(lse)
            chosen = None if choose is None else choose(self, step)
            if step < WATCHED:
                continue
            if isinstance(chosen, EvictLowest):
                self.cache.evict_many(self.ids, chosen)
            elif chosen is not None:
                for seq_id in self.ids.tolist():
                    self.cache.evict(seq_id, chosen)
            resident.append(self.cache.tables.resident_lengths(self.ids).mean())
        return np.stack(outs, 1), np.stack(lses, 1), float(np.mean(resident))


def policy(name: str, budget: int, seed: int) -> Callable[[Run, int], EvictionPolicy]:
    """Return what gives the policy after each step."""
    limits = {"max_tokens": budget, "first_tokens": SINKS, "last_tokens": RECENT}
    mass: list[AttentionMass] = []

    def choose(run: Run, step: int) -> EvictionPolicy:
        queries = {0: run.given.queries[:, step]}
        if name == "first and last":
            # Whole pages: what is resident beyond the two counts is less than two pages.
            return KeepFirstLast(PAGE, budget - 2 * PAGE + 1)
        if name.startswith("attention mass"):
            if not mass:
                mass.append(AttentionMass(run.cache, 0.99 if name.endswith("0.99") else 0.9))
            mass[0].observe(run.ids, queries)
            ranking: Any = mass[0]
        elif name == "query bounds":
            ranking = QueryBounds(run.cache, run.ids, queries)
        else:
            ranking = {
                "value/key norms": lambda: NormRatio(run.cache),
                "oldest first": OldestFirst,
                "random": lambda: RandomOrder(seed),
            }[name]()
        return EvictLowest(ranking, **limits)

    return choose


POLICIES = (
    "random",
    "first and last",
    "oldest first",
    "value/key norms",
    "query bounds",
    "attention mass, decay 0.9",
    "attention mass, decay 0.99",
)
CASES = ("recurring topics", "needle, asked before", "needle, never asked")


def main() -> None:
    options = arguments("eviction", __doc__)
    batch, prompt, steps = (4, 256, 48) if options.quick else (16, 1024, 128)
    rows: list[dict[str, Any]] = []
    notes = []
    for number, case in enumerate(CASES):
        rng = np.random.default_rng([options.seed, number])
        given = draw(case, batch, prompt, steps, rng)
        full_out, full_lse, _ = Run(given, prompt).decode(None)
        for share in (0.5, 0.25, 0.125):
            budget = int(share * prompt)
            for name in POLICIES:
                run = Run(given, prompt)
                out, lse, resident = run.decode(policy(name, budget, options.seed))
                judged = given.judged
                size = np.linalg.norm(full_out[:, judged], axis=-1)
                error = np.linalg.norm((out - full_out)[:, judged], axis=-1) / size
                kept = np.exp(lse - full_lse)[:, judged]
                by_sequence = error.mean(axis=(1, 2))
                row = {
                    "case": case,
                    "budget": f"{budget} of {prompt}",
                    "policy": name,
                    "resident tokens": resident,
                    "relative error": float(by_sequence.mean()),
                    "standard error": float(by_sequence.std() / (batch - 1) ** 0.5),
                    "attention kept": float(kept.mean()),
                }
                held = run.cache.tables.block_table(run.ids)[np.arange(batch), given.needle] > 0
                row["needle pages kept"] = float(held.mean()) if given.needle[0] >= 0 else None
                rows.append({**row, "share": share})
        notes.append(f"{case}: {attention_shape(given, prompt)}")
    notes += [
        f"{batch} sequences of {prompt} + {steps} tokens, pages of {PAGE}, k4v4, window of a page.",
        "first and last keeps a page and the newest tokens that fill the budget, to the token.",
        "query bounds rank pages by the last query alone; masses by all queries so far, decaying.",
        "attention kept: part of the full cache's softmax mass on positions that are still there.",
        "synthetic keys and queries; no language model was measured.",
    ]
    publish(
        "eviction",
        rows,
        notes=notes,
        json_path=options.json,
        seed=options.seed,
        quick=options.quick,
    )


def attention_shape(given: Draw, prompt: int) -> str:
    """Say where the attention of the full cache goes, in float64 on the unquantised keys."""
    step = int(given.judged[-1])
    end = prompt + step + 1
    queries = given.queries[:, step].reshape(-1, HEADS, GROUP, DIM).astype(np.float64)
    logits = np.einsum("bhgd,bnhd->bhgn", queries, given.keys[:, :end]) * DIM**-0.5
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    pages = np.add.reduceat(weights, np.arange(0, end, PAGE), axis=-1)
    top = -np.sort(-pages[..., 1:], axis=-1)
    return (
        f"sinks take {weights[..., :SINKS].sum(-1).mean():.0%} of the attention, the newest "
        f"{RECENT} tokens {weights[..., -RECENT:].sum(-1).mean():.0%}, the best 8 other pages "
        f"{top[..., :8].sum(-1).mean():.0%} (at the last step that counts)"
    )


if __name__ == "__main__":
    main()
